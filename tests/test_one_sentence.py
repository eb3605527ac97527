"""What cannot work ends with one sentence that helps and status 2, before a model's weights are loaded."""

import json
import os
import sys

import pytest
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config
from transformers.training_args import OptimizerNames
from trl import ModelConfig, TrlParser

from luffy_trl import LuffyConfig
from luffy_trl.checks import check_options, check_reward_inputs, check_signature
from luffy_trl.commands.cli import main
from luffy_trl.commands.inputs import LuffyScriptArguments, peft_config
from luffy_trl.commands.packages import OPTIMIZER_PACKAGES, check_package, check_packages
from luffy_trl.commands.recipes import apply_recipe
from luffy_trl.demonstrations.prompts import Reader, check_prompts
from luffy_trl.rewards import math_reward
from luffy_trl.rewards.signatures import returned_kind
from luffy_trl.tasks.letter_walk import build_tokenizer

from .conftest import SMALL_RUN


CPU = ["--use_cpu", "--bf16", "False"]


@pytest.fixture
def walks_file(walks, tmp_path) -> str:
    walks.to_json(tmp_path / "walks.jsonl")
    return str(tmp_path / "walks.jsonl")


@pytest.fixture
def last_line(tmp_path, capsys):
    """The one line with which a command ends."""

    def run(command: str, *flags: str, **options) -> str:
        options = {"output_dir": tmp_path / "out", "report_to": "none"} | options
        given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        with pytest.raises(SystemExit) as stop:
            main([command, *CPU, *given, *flags])
        assert stop.value.code == 2
        *before, line = capsys.readouterr().err.strip().splitlines()
        assert not any("Loading weights" in text for text in before)
        assert line.startswith(f"luffy-trl {command}: error: ")
        return line

    return run


# Recipes


@pytest.fixture
def read(tmp_path):
    """The fields that a recipe sets."""

    def run(text: str) -> dict:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"use_cpu: true\nbf16: false\n{text}\n")
        parser = TrlParser((LuffyScriptArguments, LuffyConfig, ModelConfig))
        apply_recipe(parser, str(recipe))
        return {k: v for part in parser.parse_args_into_dataclasses([]) for k, v in vars(part).items()}

    return run


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("reward_funcs: math_reward", ["math_reward"]),
        ("reward_funcs: [math_reward, format_reward]", ["math_reward", "format_reward"]),
        ("reward_weights: 0.5", [0.5]),
        ("save_strategy: no", "no"),
        ("save_strategy: 'no'", "no"),
        ("logging_strategy: No", "no"),
        ("lr_scheduler_type: cosine", "cosine"),
        ("num_demonstrations: 1.0", 1),
        ("max_steps: 1e3", 1000),
        ("max_steps: 1_000", 1000),
        ("seed: '7'", 7),
        ("learning_rate: 1e-6", 1e-6),
        ("learning_rate: 1E-6", 1e-6),
        ("learning_rate: 1", 1.0),
        ("epsilon_high: .inf", float("inf")),
        ("reward_weights: [1e-1, 2]", [0.1, 2.0]),
        ("gradient_checkpointing: off", False),
        ("gradient_checkpointing: 'False'", False),
        ("gradient_checkpointing: 0", False),
        ("packed_forward: null", None),
        ("packed_forward:", None),
        ("run_name: 007", "007"),
        ("run_name: no", "no"),
        ("model_revision: 1.0", "1.0"),
        ("model_init_kwargs: {a: 1e-6, b: [1, 2]}", {"a": 1e-6, "b": [1, 2]}),
        ("generation_kwargs: '{\"max_new_tokens\": 3}'", {"max_new_tokens": 3}),
        ("lora_target_modules: all-linear", "all-linear"),
        ("lora_target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
    ],
)
def test_a_field_takes_what_was_written(read, line, value):
    found = read(line)[line.split(":")[0]]
    assert found == value
    assert type(found) is type(value) or value == "no" or value == "cosine"  # members of enumerations


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("shaping_gama: 0.2", "there is no field shaping_gama. Did you mean shaping_gamma?"),
        ("num-demonstrations: 1", "there is no field num-demonstrations. Did you mean num_demonstrations?"),
        ("xyzzy: 1", "there is no field xyzzy. --help lists every field."),
        ("1: 2", "there is no field 1."),
        ("no: 2", "there is no field no."),
        ("seed: 1\nseed: 2", "seed is there twice, in lines 3 and 4."),
        ("model_init_kwargs: {a: 1, a: 2}", "a is there twice, in lines 3 and 3."),
        ("max_steps: 1.5", "max_steps: '1.5' is not a whole number."),
        ("max_steps: yes", "max_steps: 'yes' is not a whole number."),
        ("max_steps: .inf", "max_steps: '.inf' is not a whole number."),
        ("max_steps: many", "max_steps: 'many' is not a whole number."),
        ("max_steps:", "max_steps has no value, expected a whole number."),
        ("max_steps: [1]", "max_steps is a list, expected a whole number."),
        ("learning_rate: true", "learning_rate: 'true' is not a number."),
        ("reward_weights: [1, high]", r"reward_weights\[1\]: 'high' is not a number."),
        ("use_peft: maybe", "use_peft: 'maybe' is not true or false."),
        ("use_peft: {a: 1}", "use_peft has fields of its own, expected true or false."),
        ("save_strategy: false", "save_strategy: false is not one of no, steps, epoch, best."),
        ("lr_scheduler_type: cosin", r"lr_scheduler_type: cosin is not one of .* \(did you mean cosine\?\)"),
        (
            "model_init_kwargs: {a: !!python/object/apply:os.getcwd []}",
            "could not determine a constructor for the tag",
        ),
        ("seed: [1", "is no YAML: while parsing a flow sequence"),
        ("env: [a]", "env must hold names of environment variables with a value each"),
    ],
)
def test_a_value_that_a_field_cannot_take_is_named(read, lines, message):
    with pytest.raises(ValueError, match=message) as refusal:
        read(lines)
    assert "\n" not in str(refusal.value)


def test_a_recipe_sets_its_environment_as_written(read, monkeypatch):
    monkeypatch.setenv("LUFFY_TEST", "before")
    assert read("env: {LUFFY_TEST: no}\nseed: 3")["seed"] == 3
    assert os.environ["LUFFY_TEST"] == "no"


def test_flags_override_a_recipe_which_ends_in_one_line_too(tmp_path, last_line):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 1.0\nnum_demonstrations: 1.5\n")
    assert last_line("train", config=recipe).endswith(f"{recipe}: num_demonstrations: '1.5' is not a whole number.")
    recipe.write_text("num_demonstrations: 1.0\n")
    assert "num_demonstrations=9 must be below num_generations=8" in last_line(
        "train", config=recipe, num_demonstrations=9
    )
    recipe.write_bytes(b"\xff\xfe\x00")
    assert "is no YAML" in last_line("sft", config=recipe)


# LoRA's modules


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        (["q_proj"], {"q_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([".*_proj"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_modules_of_lora(names, trained, tiny_model_dir):
    config = peft_config(ModelConfig(use_peft=True, lora_target_modules=names))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config)
    found = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == trained


# Packages


@pytest.mark.parametrize(
    ("flags", "module", "message"),
    [
        (["--use_peft"], "peft", "--use_peft needs the package peft, which is not installed here: pip install"),
        (
            ["--attn_implementation", "kernels-community/flash-attn2"],
            "kernels",
            "flash-attn2 needs the package kernels",
        ),
        (["--load_in_4bit"], "bitsandbytes", "--load_in_4bit needs the package bitsandbytes"),
        (["--load_in_8bit"], "bitsandbytes", "--load_in_8bit needs the package bitsandbytes"),
        (["--use_vllm"], "vllm", "--use_vllm needs the package vllm, which is not installed here: pip install 'luffy"),
        (["--use_liger_kernel"], "liger_kernel", "--use_liger_kernel needs the package liger_kernel"),
        (["--report_to", "wandb"], "wandb", "--report_to wandb needs the package wandb"),
        (["--report_to", "trackio"], "trackio", "--report_to trackio needs the package trackio"),
        (["--report_to", "tensorboard"], "tensorboard", "--report_to tensorboard needs the package tensorboard"),
        (["--report_to", "wandbb"], "wandb", "--report_to wandbb is not one of none, all, "),
        (["--optim", "adamw_8bit"], "bitsandbytes", "--optim adamw_8bit needs the package bitsandbytes"),
        (["--optim", "lomo"], "lomo_optim", "--optim lomo needs the package lomo_optim"),
    ],
)
def test_packages_that_are_missing(flags, module, message, last_line, tiny_model_dir, walks_file, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    options = {"model_name_or_path": tiny_model_dir, "dataset_name": walks_file}
    assert message in last_line("train", "--reward_funcs", "letter_walk_reward", *flags, **options)


def test_deepspeed_of_an_accelerate_configuration(last_line, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "distributed_type: DEEPSPEED, of the configuration for accelerate launch, needs the" in last_line("train")


def test_what_is_installed_is_not_missing(config):
    check_package("--use_peft", "peft")
    check_packages(config(), ModelConfig(use_peft=True))
    names = [member.value for member in OptimizerNames]
    assert all(any(name.startswith(beginning) for name in names) for beginning in OPTIMIZER_PACKAGES)


# Models


@pytest.mark.parametrize("command", ["train", "sft"])
def test_an_adapter_is_no_model(command, last_line, tmp_path, walks_file):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    reward = ["--reward_funcs", "letter_walk_reward"] if command == "train" else []
    line = last_line(command, *reward, model_name_or_path=adapter, dataset_name=walks_file)
    assert f"--model_name_or_path {adapter} is a LoRA adapter of some/base, and no whole model. Merge it" in line
    with pytest.raises(SystemExit):
        main(["prepare-model", "--model_name_or_path", str(adapter), "--output_dir", str(tmp_path / "new")])


def without_weights(model, directory):
    directory.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


def letters(count: int) -> dict:
    return {"prompt": "D" + "a" * count + ":", "completion": "b#b", "solution": "b"}


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_prompt_beyond_the_window(command, last_line, tiny_model_dir, tmp_path):
    Dataset.from_list([letters(n) for n in (5, 126, 127, 5)]).to_json(tmp_path / "rows.jsonl")
    model = without_weights(tiny_model_dir, tmp_path / "model")
    reward = ["--reward_funcs", "letter_walk_reward"] if command == "train" else []
    options = {"model_name_or_path": model, "dataset_name": tmp_path / "rows.jsonl"}
    options |= SMALL_RUN if command == "train" else {}
    line = last_line(command, *reward, **options)
    assert "Row 2: `prompt` has 129 tokens, and the model's window 128, so nothing can be written after it." in line


def test_prompts_of_evaluation_beyond_the_window(last_line, tiny_model_dir, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Dataset.from_list([letters(5)] * 4).to_json(data / "train.jsonl")
    Dataset.from_list([letters(5), letters(150)]).to_json(data / "test.jsonl")
    model = without_weights(tiny_model_dir, tmp_path / "model")
    options = {"model_name_or_path": model, "dataset_name": data, "eval_strategy": "steps"}
    line = last_line("train", "--reward_funcs", "letter_walk_reward", **(options | SMALL_RUN))
    assert "Row 1 of `eval_dataset`: `prompt` has 152 tokens" in line


@pytest.mark.parametrize(
    ("config", "longest", "written", "message"),
    [
        (Qwen2Config(max_position_embeddings=64), 40, 24, None),
        (Qwen2Config(max_position_embeddings=64), 40, 25, "prompt (row 1, 40 tokens) are more than the 64 tokens"),
        (Qwen2Config(max_position_embeddings=64), 63, None, None),
        (
            Qwen2Config(
                max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4,
                },
            ),
            40, 100, None,
        ),
        (GPT2Config(n_positions=64), 40, 24, None),
    ],
)  # fmt: skip
def test_the_window_in_tokens(tokenizer, config, longest, written, message):
    config.vocab_size = len(tokenizer)
    table = Dataset.from_list([{"prompt": text} for text in ("a", "a" * longest, "ab" * 5)])
    found = check_prompts(Reader(tokenizer, config), table, "", written)
    assert len(found) == (message is not None)
    assert all(message in text for text in found)


def test_positions_that_a_model_does_not_have(tokenizer):
    model = Reader(tokenizer, GPT2Config(n_positions=64, vocab_size=len(tokenizer)))
    with pytest.raises(
        ValueError, match=r"Row 1: `prompt` has 40 tokens, with max_completion_length=25 more than the 64"
    ):
        check_prompts(model, [{"prompt": "a"}, {"prompt": "a" * 40}], "", 25)
    narrow = Reader(tokenizer, Qwen2Config(vocab_size=len(tokenizer)), max_window=32)  # vLLM's
    with pytest.raises(ValueError, match="has 40 tokens, and the model's window 32"):
        check_prompts(narrow, [{"prompt": "a" * 40}], "", 8)


def test_the_longest_prompt_is_found_among_many(chat_tokenizer):
    # bytes of UTF-8 bound the tokens; the one with the most of them has the fewest tokens
    chat = [{"prompt": [{"role": "user", "content": "a" * (i % 50)}]} for i in range(5000)]
    chat[3210] = {"prompt": [{"role": "user", "content": "b" * 60}]}
    kwargs = {"chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"}
    model = Reader(chat_tokenizer, Qwen2Config(max_position_embeddings=64), kwargs)
    [message] = check_prompts(model, Dataset.from_list(chat), "", 16)
    assert "(row 3210, 61 tokens)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Da<new>:"}, "Row 1: `prompt` has the token '<new>', number 30 of the tokenizer"),
        ({"completion": "b#<new>"}, "Row 1: `completion` has the token '<new>', number 30 of the tokenizer"),
        ({}, None),
    ],
)
def test_tokens_without_an_embedding(change, message):
    tokenizer = build_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    table = [letters(1), letters(1) | change]
    model = Reader(tokenizer, Qwen2Config(vocab_size=size))
    if message is None:
        assert check_prompts(model, table, "", 8) == []
        tokenizer.pad_token = "<new>"
        message = f"The tokenizer's pad_token '<new>' is token {size}, and the model has embeddings for {size} tokens"
    with pytest.raises(ValueError, match=message.replace("30", str(size))):
        check_prompts(model, Dataset.from_list(table), "", 8)
    check_prompts(Reader(tokenizer, Qwen2Config(vocab_size=size + 1)), table, "", 8)


# Evaluation


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("flags", [("--eval_strategy", "steps"), ("--eval_on_start", "True")])
def test_evaluation_without_a_split_says_how_to_bring_one(command, flags, last_line, tiny_model_dir, walks_file):
    reward = ["--reward_funcs", "letter_walk_reward"] if command == "train" else []
    options = {"model_name_or_path": tiny_model_dir, "dataset_name": walks_file} | (SMALL_RUN if reward else {})
    line = last_line(command, *reward, *flags, **options)
    wanted = "needs a split to evaluate on, and --dataset_name"
    assert f"{'--eval_on_start' if 'start' in flags[0] else '--eval_strategy steps'} {wanted}" in line
    assert "has no 'test', only 'train'. Give a folder with a file train.jsonl and a file test.jsonl" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.remove_columns("solution"),
            "letter_walk_reward needs the column 'solution', and the eval_dataset of",
        ),
        (lambda d: d.rename_column("prompt", "query"), "only query, completion, solution"),
        (lambda d: d.add_column("prompts", ["a"] * len(d)), "`eval_dataset` has a column 'prompts'"),
        (
            lambda d: d.add_column("demonstration_ids", ["a"] * len(d)),
            "`eval_dataset` has a column 'demonstration_ids'",
        ),
    ],
)
def test_an_evaluation_split_is_checked_as_training_is(change, message, last_line, tiny_model_dir, walks, tmp_path):
    model = without_weights(tiny_model_dir, tmp_path / "model")
    DatasetDict(train=walks, test=change(walks)).save_to_disk(tmp_path / "saved")
    options = {"model_name_or_path": model, "dataset_name": tmp_path / "saved", "eval_strategy": "steps"} | SMALL_RUN
    assert message in last_line("train", "--reward_funcs", "letter_walk_reward", **options)


def test_an_empty_evaluation_set(config, walks):
    arguments = {"train_dataset": walks, "eval_dataset": {"a": walks, "b": walks.select([])}}
    with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` (has no rows|is empty)"):
        check_options(arguments, config())


# Reward functions

REWARDS = {
    "no_kwargs": "def reward(completions):\n    return [0.0] * len(completions)",
    "no_state": "def reward(prompts, completions, completion_ids, log_extra, log_metric):\n    return []",
    "positional": "def reward(completions, /, **kwargs):\n    return [0.0] * len(completions)",
    "a_class": "class reward:\n    def __call__(self, completions, **kwargs):\n        return []",
    "number": "def reward(completions, **kwargs):\n    return 1.0",
    "length": "def reward(completions, **kwargs):\n    return float(len(completions)) / 2",
    "mean": "def reward(completions, **kwargs):\n    return sum(len(c) for c in completions) / len(completions)",
    "sum": "def reward(completions, **kwargs):\n    n = 0\n    for c in completions:\n        n += 1\n    return n",
    "either": "def reward(completions, **kwargs):\n    if completions:\n        return 1.0\n    return 0",
    "text": "def reward(completions, **kwargs):\n    return f'{len(completions)}'",
    "dict": "def reward(completions, **kwargs):\n    return {c: 1.0 for c in completions}",
    "nothing": "def reward(completions, **kwargs):\n    print(completions)",
    "annotated": "def reward(completions, **kwargs) -> float:\n    return max(map(len, completions))",
}
SAID = {
    "no_kwargs": "does not take 'completion_ids', 'log_extra', 'log_metric', 'prompts', 'trainer_state'",
    "no_state": "does not take 'trainer_state', which the trainer gives to every reward function. End its arguments",
    "positional": "takes 'completions' by position alone",
    "a_class": "is a class. Name an object of it",
    "text": "returns a text, and a list with one number for each completion is expected.",
    "dict": "returns a dict, and",
    "nothing": "returns nothing, and",
}


@pytest.fixture
def own_reward(tmp_path, monkeypatch):
    """The dotted path of a function in a module of its own."""

    def write(name: str, source: str) -> str:
        module = f"own_reward_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        return f"{module}.reward"

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return write


@pytest.mark.parametrize("name", REWARDS)
def test_a_function_that_is_no_reward(name, own_reward, last_line, walks_file):
    path = own_reward(name, REWARDS[name])
    line = last_line("train", "--reward_funcs", path, model_name_or_path="none/there", dataset_name=walks_file)
    assert f"--reward_funcs {path} {SAID.get(name, 'returns a number, and a list with one number for each')}" in line


def test_a_dataset_column_that_a_function_does_not_take():
    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, solution):
        return [0.0] * len(completions)

    check_signature(reward, "it")
    table = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "solution": ["c"]})
    check_reward_inputs([reward], table, "reward_funcs", "it")
    with pytest.raises(
        ValueError, match="reward_funcs reward does not take 'level', which the trainer gives to every"
    ):
        check_reward_inputs([reward], table.add_column("level", [1]), "reward_funcs", "it")


def listed(completions, **kwargs):
    if not completions:
        return None
    return [0.0 for _ in completions]


def careless(completions, **kwargs) -> float:
    rewards = [0.0] * len(completions)
    return rewards


def yielding(completions, **kwargs):
    for _ in completions:
        yield 0.0


def repeated(completions, **kwargs):
    return [1.0] * len(completions)


def nested(completions, **kwargs):
    def one(text):
        return 1.0

    return list(map(one, completions))


def summed(completions, **kwargs):
    weights = [0.5, 0.5]
    return sum(weight * f(completions) for weight, f in zip(weights, [len, len], strict=True))


async def asked(completions, **kwargs):
    return [0.0 async for _ in completions]


class Scorer:
    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    "function",
    [
        *(listed, careless, yielding, repeated, nested, summed, asked, Scorer(), Scorer().__call__, math_reward),
        lambda completions, **kwargs: [0.0] * len(completions),
    ],
)
def test_what_may_be_a_reward_is_taken(function):
    check_signature(function, "it")
    assert returned_kind(function) is None
