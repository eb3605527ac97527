"""What cannot work is refused by name and value, before any training step."""

import functools
import inspect

import pytest
from datasets import Dataset, IterableDataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from luffy_trl import LuffyTrainer
from luffy_trl.commands.cli import main
from luffy_trl.shaping import SHAPINGS, get_shaping
from luffy_trl.tasks.letter_walk import build_tokenizer, letter_walk_reward

from .run_two_processes import letters_reward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_demonstrations": 4}, "num_demonstrations=4 must be below num_generations=4"),
        ({"num_demonstrations": -1}, "num_demonstrations=-1 must be 0"),
        ({"shaping": "cubic"}, "Unknown shaping 'cubic'. Known are 'regularized', 'identity', 'power', 'log'"),
        ({"shaping_gamma": 0.0}, "shaping_gamma=0.0 must be a finite number above 0"),
        ({"shaping_gamma": -0.1}, "shaping_gamma=-0.1 must be"),
        ({"shaping_gamma": float("nan")}, "shaping_gamma=nan must be"),
        ({"shaping_exponent": 0.0}, "shaping_exponent=0.0 must be"),
        ({"demonstration_weight": -1.0}, "demonstration_weight=-1.0 must be"),
        ({"demonstration_overflow": "cut"}, "demonstration_overflow='cut' is not one of 'drop', 'truncate', 'error'"),
        ({"demonstration_loss": "dpo"}, "demonstration_loss='dpo' is not one of 'importance_sampling', 'sft'"),
        ({"demonstration_loss": "sft"}, "demonstration_loss='sft' cannot be combined with advantage_baseline='group'"),
        ({"demonstration_weight_schedule": "step"}, "demonstration_weight_schedule='step' is not one of 'constant'"),
        ({"demonstration_loss": "chord_phi"}, "demonstration_loss='chord_phi' cannot be combined with advantage_base"),
        ({"demonstration_average": "row"}, "demonstration_average='row' is not one of 'joint', 'token', 'sequence'"),
        ({"rollout_weight": "none"}, "rollout_weight='none' is not one of 'one', 'complement'"),
        ({"rollout_weight": "complement", "demonstration_weight": 1.5}, "demonstration_weight=1.5 must be at most 1"),
        ({"demonstration_weight_final": 0.1}, "demonstration_weight_final=0.1 has nothing to do with .*'constant'"),
        ({"demonstration_weight_decay_steps": 0}, "demonstration_weight_decay_steps=0 must be 1 or above"),
        ({"demonstration_weight_warmup_steps": -1}, "demonstration_weight_warmup_steps=-1 must be 0 or above"),
        ({"success_target": 0.0}, "success_target=0.0 must be above 0 and at most 1"),
        ({"success_memory": 1.0}, "success_memory=1.0 must be from 0 to below 1"),
        ({"prefix_strategy": "random"}, "prefix_strategy='random' is not one of 'fixed', 'uniform'"),
        ({"prefix_max": 1.5}, "prefix_max=1.5 must be a number from 0 to 1"),
        ({"prefix_min": 0.6, "prefix_max": 0.5}, "prefix_min=0.6 must not be above prefix_max=0.5"),
        ({"solved_threshold": float("nan")}, "solved_threshold=nan must be a finite number"),
        ({"solved_threshold": float("inf")}, "solved_threshold=inf must be a finite number"),
        ({"success_gate": -0.1}, "success_gate=-0.1 must be a number from 0 to 1"),
        ({"advantage_baseline": "best"}, "advantage_baseline='best' is not one of 'group', 'on_policy'"),
        ({"loss_type": "mean"}, "loss_type='mean' is not one of"),
        ({"max_completion_length": None}, "max_completion_length=None: demonstrations need a limit"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True would take the demonstrations out"),
    ],
)
def test_config(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_group_must_not_be_split_between_processes(config, monkeypatch):
    # two processes with two rows each make one whole group of four, which TRL accepts
    monkeypatch.setattr(type(config()), "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"Each process generates 2 completions at a time .* num_generations=4"):
        config(per_device_train_batch_size=2)
    config(per_device_train_batch_size=2, num_demonstrations=0)


def test_a_callable_shaping_is_kept_by_name(config, monkeypatch):
    def halved(log_ratio, gamma, exponent):
        return log_ratio.exp() / 2

    monkeypatch.setattr("luffy_trl.shaping.SHAPINGS", dict(SHAPINGS))
    args = config(shaping=halved)
    assert args.shaping == "halved"
    assert get_shaping("halved") is halved
    assert '"shaping": "halved"' in args.to_json_string()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.select([]), "`train_dataset` has 0 rows, fewer than the 2 prompts of one generation"),
        (lambda d: d.select([0]), "`train_dataset` has 1 rows, fewer than the 2 prompts of one generation"),
        (lambda d: d.remove_columns("prompt"), "`train_dataset` has no `prompt` column, only"),
        (lambda d: IterableDataset.from_generator(lambda: iter(())), "`train_dataset` is empty"),
        (lambda d: d.remove_columns("completion"), "neither a `completion` nor a `demonstrations` column, only"),
        (lambda d: d.add_column("demonstrations", [["a"]] * 16), "both `completion` and `demonstrations`"),
        (lambda d: d.rename_column("completion", "completions"), "has a column 'completions'"),
        (lambda d: d.add_column("prompts", ["a"] * 16), "has a column 'prompts'"),
        (lambda d: d.add_column("image", ["a"] * 16), "the model reads no images"),
        (lambda d: d.add_column("demonstration_ids", [0] * 16), "'demonstration_ids', a name LuffyTrainer uses"),
        (lambda d: d.add_column("completion_logps", [[-1.0]] * 16), "Row 0: `completion_logps` has 1 values"),
        (
            lambda d: (
                d.rename_column("completion", "old")
                .add_column("demonstrations", [["a"]] * 16)
                .add_column("completion_logps", [[-1.0]] * 16)
            ),
            "`completion_logps`, which go with `completion`",
        ),
        (
            lambda d: d.remove_columns("completion").add_column("completion", [*d["completion"][:9], "", *["a"] * 6]),
            "Row 9: `completion` is empty",
        ),
        (lambda d: d.remove_columns("completion").add_column("completion", list(range(16))), "is int 0, no text"),
        (
            lambda d: d.remove_columns("completion").add_column("completion", ["a" * 99] * 16),
            "None of the 16 prompts has a usable demonstration; 16 demonstrations dropped and 0 truncated",
        ),
    ],
)
def test_data(make_trainer, walks, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(change(walks))


def test_each_evaluation_dataset_is_checked(make_trainer, walks):
    with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` has a column 'completions'"):
        make_trainer(trainer_options={"eval_dataset": {"a": walks, "b": walks.add_column("completions", ["a"] * 16)}})


def needs_source(completions, source, **kwargs):
    return [0.0] * len(completions)


async def needs_source_later(completions, source, **kwargs):
    return [0.0] * len(completions)


class NeedsSource:
    columns = ("source",)

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


NEEDS_SOURCE = [needs_source, needs_source_later, NeedsSource(), functools.partial(needs_source, other=1)]


@pytest.mark.parametrize("num_demonstrations", [0, 1])
@pytest.mark.parametrize("reward", NEEDS_SOURCE)
def test_a_column_that_a_reward_needs_is_missed_before_a_model_is_loaded(config, walks, reward, num_demonstrations):
    with pytest.raises(
        ValueError, match=r"function \w+ needs the column 'source', and `train_dataset` has only prompt,"
    ):
        LuffyTrainer(
            "no such model",
            [letters_reward, reward],
            config(num_demonstrations=num_demonstrations),
            train_dataset=walks,
        )


@pytest.mark.parametrize("as_stream", [False, True])
def test_each_dataset_has_the_columns_that_rewards_need(make_trainer, walks, as_stream):
    with_source = walks.add_column("source", ["a"] * 16)
    sets = [walks.to_iterable_dataset(), with_source.to_iterable_dataset()] if as_stream else [walks, with_source]
    without, train = sets
    with pytest.raises(ValueError, match="needs the column 'source', and `train_dataset` has only"):
        make_trainer(without, needs_source)
    with pytest.raises(ValueError, match="needs the column 'source', and `eval_dataset` has only"):
        make_trainer(train, needs_source, trainer_options={"eval_dataset": without})
    with pytest.raises(ValueError, match=r"needs the column 'source', and `eval_dataset\['b'\]` has only"):
        make_trainer(train, needs_source, trainer_options={"eval_dataset": {"a": train, "b": without}})
    make_trainer(train, needs_source, trainer_options={"eval_dataset": {"a": train}})


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_a_column_that_rewards_are_not_given(make_trainer, column):
    namespace: dict = {}
    exec(f"def reward(completions, {column}, **kwargs): return [0.0] * len(completions)", namespace)
    with pytest.raises(
        ValueError, match=f"needs the column '{column}' of `train_dataset`, which reward functions are"
    ):
        make_trainer(reward=namespace["reward"])


def test_demonstrations_are_given_to_rewards_in_plain_grpo_alone(make_trainer, walks):
    def reward(completions, demonstrations, **kwargs):
        return [float(len(row)) for row in demonstrations]

    several = walks.rename_column("completion", "text").add_column("demonstrations", [["a#a"]] * 16)
    with pytest.raises(ValueError, match="'demonstrations' of `train_dataset`, which reward functions are not given"):
        make_trainer(several, reward)
    make_trainer(several, reward, num_demonstrations=0, max_steps=1).train()


def test_a_column_that_is_taken_out_is_not_given(make_trainer, walks):
    options = {"num_demonstrations": 0, "remove_unused_columns": True}
    with pytest.raises(ValueError, match="'solution' of `train_dataset`, which reward functions are not given"):
        make_trainer(walks, letter_walk_reward, **options)
    make_trainer(walks, letters_reward, max_steps=1, **options).train()


def test_a_reward_that_tells_nothing_of_its_arguments_is_called(make_trainer):
    assert_no_signature = functools.partial(dict)  # compiled code
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(assert_no_signature)
    make_trainer(reward=[letters_reward, assert_no_signature])


def test_a_reward_that_decides_must_be_there(config, walks):
    with pytest.raises(
        ValueError, match=r"solved_reward='letters' is not .* Give one of 'letters_reward', or 'total'"
    ):
        LuffyTrainer("no such model", letters_reward, config(solved_reward="letters"), train_dataset=walks)


def test_data_without_demonstrations_is_fine_for_grpo(make_trainer, walks):
    make_trainer(walks.remove_columns("completion"), num_demonstrations=0).train()


def test_too_long_can_be_an_error(make_trainer):
    rows = Dataset.from_list([{"prompt": "Da:", "completion": "b#b"}, {"prompt": "Db:", "completion": "b" * 16}])
    with pytest.raises(ValueError, match="Row 1: `completion` has 17 tokens"):
        make_trainer(rows, demonstration_overflow="error")


def test_a_rollout_function_makes_whole_groups(make_trainer):
    with pytest.raises(ValueError, match="`rollout_func` cannot be combined with demonstrations: it makes all of"):
        make_trainer(trainer_options={"rollout_func": lambda prompts, trainer: {}})


@pytest.mark.parametrize("option", ["tools", "environment_factory"])
def test_replay_does_not_keep_what_tools_say(make_trainer, walks, option):
    def function():
        """Does nothing."""

    value = [function] if option == "tools" else function
    with pytest.raises(ValueError, match=f"`{option}` cannot be combined with demonstration_source='replay'"):
        make_trainer(walks, trainer_options={option: value}, demonstration_source="replay")


def test_an_environment_alone_has_no_demonstrations(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is missing, and with it the demonstrations"):
        make_trainer(None, trainer_options={"environment_factory": object})


def test_rows_in_a_mixture_of_experts_cannot_be_skipped(config, walks, tokenizer):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.01}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), head_dim=8, **shape, **experts))
    args = config(skip_zero_advantages=True)
    with pytest.raises(ValueError, match="skip_zero_advantages=True cannot be combined with the auxiliary loss"):
        LuffyTrainer(model, letters_reward, args, train_dataset=walks, processing_class=tokenizer)


@pytest.mark.parametrize("from_directory", [False, True])
def test_a_tokenizer_without_eos(tiny_model_dir, walks, config, tmp_path, from_directory):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    model = str(tiny_model_dir)
    if from_directory:
        for file in tiny_model_dir.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tokenizer.save_pretrained(tmp_path)
        model, tokenizer = str(tmp_path), None
    with pytest.raises(ValueError, match="The tokenizer has no EOS token"):
        LuffyTrainer(model, letters_reward, config(), train_dataset=walks, processing_class=tokenizer)


def test_a_plain_grpo_config(tiny_model_dir, walks, tmp_path):
    from trl import GRPOConfig

    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="`args` is a GRPOConfig; LuffyTrainer takes a LuffyConfig"):
        LuffyTrainer(str(tiny_model_dir), letters_reward, args, train_dataset=walks)


def test_the_command_refuses_a_reward_that_is_not_there_before_the_model(tmp_path, capsys):
    flags = ["--solved_reward", "letters", "--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit_:
        main(["train", *flags])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "solved_reward='letters' is not the name of a reward function. Give one of 'letter_walk_reward'" in last
