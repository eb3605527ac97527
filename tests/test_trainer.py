"""Groups, data and metrics through the real trainer on a tiny model."""

import json
import math
import re

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyTrainer
from luffy_trl.tasks.letter_walk import build_tokenizer

from .run_two_processes import letters_reward


def generate_batch(trainer, prompts=None):
    """One generation batch, before it is shuffled and split."""
    trainer.model.train()
    rows = [row for row in (prompts or trainer.train_dataset) for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def count_generated(trainer, monkeypatch) -> list[int]:
    """Rows of every call of `model.generate` from now on."""
    counts, generate = [], trainer.model.generate

    def counting(*args, **kwargs):
        counts.append(kwargs["input_ids"].size(0))
        return generate(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", counting)
    return counts


def off_policy_texts(trainer, output) -> list[str | None]:
    """Decoded demonstration of each row, EOS included; None for a rollout."""
    return [
        trainer.processing_class.decode(ids[mask]) if mask.any() else None
        for ids, mask in zip(output["completion_ids"], output["off_policy_mask"], strict=True)
    ]


def with_demonstrations(walks: Dataset, demonstrations: list) -> Dataset:
    walks = walks.select(range(len(demonstrations))).remove_columns("completion")
    return walks.add_column("demonstrations", demonstrations)


def assert_finite(log_history: list[dict]) -> None:
    for line in log_history:
        for key, value in line.items():
            if value is None and key.startswith("clip_ratio/"):  # TRL's word for a step without rollouts of its kind
                continue
            assert value is not None, key
            assert math.isfinite(value), f"{key}={value}"


# The limit that must equal the parent


def test_without_demonstrations_it_is_grpo_bit_for_bit(tmp_path, tiny_model_dir, tokenizer, walks, config):
    options = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 16,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
    }

    def no_reward(completions, **kwargs):
        return [None] * len(completions)

    histories, weights = [], []
    for trainer_class, args in [
        (GRPOTrainer, GRPOConfig(str(tmp_path / "grpo"), **options)),
        (LuffyTrainer, config(**options, num_demonstrations=0)),
    ]:
        trainer = trainer_class(
            str(tiny_model_dir), [letters_reward, no_reward], args, train_dataset=walks, processing_class=tokenizer
        )
        trainer.train()
        histories.append([line for line in trainer.state.log_history if "loss" in line])
        weights.append(trainer.model.state_dict())
    assert len(histories[0]) == 10
    assert histories[0][0]["rewards/no_reward/mean"] is None  # TRL's to keep
    for theirs, ours in zip(*histories, strict=True):
        for key in set(theirs) - {"step_time"}:
            assert ours[key] == theirs[key], key
        assert all(
            key.startswith(("on_policy/", "off_policy/", "groups/", "time/")) for key in set(ours) - set(theirs)
        )
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name
    assert any(not torch.equal(weights[0][n], w) for n, w in _initial(tiny_model_dir).items())  # it did train


def _initial(directory) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


# Groups


def test_only_rollouts_are_sampled(make_trainer, walks, monkeypatch):
    demonstrations = [[walks[0]["completion"]], [], None, [walks[3]["completion"]] * 2]
    trainer = make_trainer(with_demonstrations(walks, demonstrations), per_device_train_batch_size=16)
    counts = count_generated(trainer, monkeypatch)
    output = generate_batch(trainer)
    assert counts == [3 + 4 + 4 + 3]
    expected = [None] * 3 + [walks[0]["completion"] + "<eos>"] + [None] * 11 + [walks[3]["completion"] + "<eos>"]
    assert off_policy_texts(trainer, output) == expected


def test_several_demonstrations_a_group_come_from_the_prompts_own(make_trainer, walks, monkeypatch):
    several = [["a#a", "b#b", "c#c"], ["d#d"]]
    trainer = make_trainer(with_demonstrations(walks, several), num_demonstrations=2)
    counts = count_generated(trainer, monkeypatch)
    drawn = set()
    for _ in range(20):
        texts = off_policy_texts(trainer, generate_batch(trainer))
        assert texts[:2] == [None] * 2
        assert texts[4:] == [None] * 3 + ["d#d<eos>"]
        assert len(set(texts[2:4])) == 2  # two different ones
        drawn |= set(texts[2:4])
    assert drawn == {"a#a<eos>", "b#b<eos>", "c#c<eos>"}
    assert set(counts) == {2 + 3}


def test_advantages_are_over_the_whole_group(make_trainer, walks):
    rewards = iter([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    trainer = make_trainer(
        walks.select(range(2)), reward=lambda completions, **kw: [next(rewards) for _ in completions]
    )
    advantages = generate_batch(trainer)["advantages"]
    assert advantages.tolist() == [-0.25, -0.25, -0.25, 0.75, 0.25, -0.75, 0.25, 0.25]


def test_a_prefix_is_given_and_the_policy_continues_it(make_trainer, walks):
    trainer = make_trainer(prefix_max=0.5)
    output = generate_batch(trainer, trainer.train_dataset.select(range(2)))
    demonstrations = [trainer.processing_class(text + "<eos>")["input_ids"] for text in walks["completion"]]
    for row in range(8):
        given = demonstrations[row // 4][: len(demonstrations[row // 4]) // 2] if row % 4 == 3 else []
        mask = output["off_policy_mask"][row]
        assert output["completion_ids"][row][mask].tolist() == given
        assert mask[: len(given)].all()
        assert len(given) < output["completion_mask"][row].sum() <= trainer.max_completion_length


def test_one_ratio_for_a_group_or_one_for_each(make_trainer, walks):
    several = with_demonstrations(walks, [["a;b;c;d;e;f#g", "b;c;d;e;f;g#h"]] * 8)

    def given(**options) -> list[tuple[int, int]]:
        trainer = make_trainer(several, num_demonstrations=2, prefix_strategy="uniform", prefix_min=0.1, **options)
        lengths = generate_batch(trainer)["off_policy_mask"].sum(1).view(-1, 4)[:, 2:]
        return [tuple(pair) for pair in lengths.tolist()]

    assert all(a == b for a, b in given(prefix_shared=True))
    assert len(set(given(prefix_shared=True))) > 1
    assert any(a != b for a, b in given(prefix_shared=False))


def test_a_ratio_of_one_is_the_whole_demonstration(make_trainer):
    plain = make_trainer(max_steps=3)
    plain.train()
    whole = make_trainer(max_steps=3, prefix_strategy="linear", prefix_min=1.0)  # seeds anew
    whole.train()
    for ours, theirs in zip(whole.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_closed_gate_is_on_policy_training(make_trainer, walks):
    """All rollouts solved: demonstrations are there, and change nothing."""

    def solved(completions, **kwargs):
        return [2.0 + reward for reward in letters_reward(completions)]

    closed = make_trainer(reward=solved, success_gate=0.5, max_steps=1)
    closed.train()
    [line] = [line for line in closed.state.log_history if "loss" in line]
    assert line["groups/guided"] == 1.0
    assert line["groups/gate_open"] == 0.0
    assert line["off_policy/loss"] == 0.0
    assert line["off_policy/token_fraction"] > 0


@pytest.mark.parametrize("scale_rewards", ["none", "group"])
def test_on_policy_baseline_is_the_rollouts_mean(make_trainer, walks, scale_rewards):
    rewards = [0.0, 0.5, 0.25, 1.0, 1.0, None, 0.0, 1.0]  # the last of each four is the demonstration
    trainer = make_trainer(
        walks.select(range(2)),
        reward=lambda completions, **kw: rewards,
        advantage_baseline="on_policy",
        scale_rewards=scale_rewards,
    )
    advantages = generate_batch(trainer)["advantages"]
    expected = torch.tensor([-0.25, 0.25, 0.0, 0.75, 0.5, 0.0, -0.5, 0.5])  # None: no advantage
    if scale_rewards == "group":
        std = torch.tensor([torch.tensor(r).std() for r in ([0.0, 0.5, 0.25, 1.0], [1.0, 0.0, 1.0])])
        expected = expected / (std.repeat_interleave(4) + 1e-4)
    torch.testing.assert_close(advantages, expected)
    assert list(trainer._logs["advantages"]) == pytest.approx(advantages.tolist())


@pytest.mark.parametrize("scale_rewards", ["group", "batch"])
@pytest.mark.parametrize("demonstrations_reward", [0.0, 5.0])
@pytest.mark.parametrize(
    "options", [{"success_gate": 0.3}, {"demonstration_loss": "sft", "advantage_baseline": "on_policy"}]
)
def test_demonstrations_without_an_advantage_move_no_rollout(
    make_trainer, walks, options, demonstrations_reward, scale_rewards
):
    """Neither through the baseline nor through the scale: closed gates, and an SFT loss."""
    rewards = [1.0, 0.0, 0.0, demonstrations_reward, 1.0, 1.0, 0.5, demonstrations_reward]
    trainer = make_trainer(
        walks.select(range(2)), reward=lambda completions, **kwargs: rewards, scale_rewards=scale_rewards, **options
    )
    advantages = generate_batch(trainer)["advantages"].view(2, 4)
    rollouts = torch.tensor(rewards).view(2, 4)[:, :3]
    std = rollouts.std(1, keepdim=True) if scale_rewards == "group" else rollouts.std()
    torch.testing.assert_close(advantages[:, :3], (rollouts - rollouts.mean(1, keepdim=True)) / (std + 1e-4))
    assert advantages[:, 3].tolist() == [0.0, 0.0]


ANSWERS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]  # the last of each four is the demonstration's
FORMATS = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def right_answer(completions, **kwargs):
    return ANSWERS


def right_format(completions, **kwargs):
    return FORMATS


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"success_gate": 0.0}, [0, 1, 2, 4, 5, 6, 7]),
        ({"success_gate": 1.0}, list(range(8))),
        ({"demonstration_loss": "sft", "advantage_baseline": "on_policy"}, [0, 1, 2, 4, 5, 6]),
        ({"demonstration_loss": "sft", "advantage_baseline": "on_policy", "success_gate": 0.0}, [0, 1, 2, 4, 5, 6]),
    ],
)
def test_normalize_then_sum_is_over_the_rows_that_count(make_trainer, walks, options, counted):
    """Plain GRPO's formula on these rows alone: no demonstration that does not count is in a mean or a deviation."""
    trainer = make_trainer(
        walks.select(range(2)),
        reward=[right_answer, right_format],
        reward_weights=[1.0, 0.5],
        multi_objective_aggregation="normalize_then_sum",
        solved_reward="right_answer",
        **options,
    )
    advantages = generate_batch(trainer)["advantages"]
    sums = torch.full((8,), float("nan"))
    for group in ([i for i in counted if i < 4], [i for i in counted if i >= 4]):
        answers, formats = (torch.tensor([values[i] for i in group]) for values in (ANSWERS, FORMATS))
        first, second = ((v - v.mean()) / (v.std() + 1e-4) for v in (answers, formats))
        sums[group] = first + 0.5 * second
    expected = torch.zeros(8)
    expected[counted] = (sums[counted] - sums[counted].mean()) / (sums[counted].std() + 1e-4)
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx(advantages.tolist())


# Which completions are solved


def solved_shares(trainer) -> dict[str, float]:
    """Of the first generation."""
    generate_batch(trainer)
    return {name: trainer._metrics["train"][name][0] for name in ("groups/solve_none", "groups/solve_all")}


def renamed(function, name: str):
    def reward(**kwargs):
        return function(**kwargs)

    reward.__name__ = name
    return reward


@pytest.mark.parametrize(
    ("names", "options", "none", "every"),
    [
        # by default the answer decides, whatever the weights, the order and the format
        (("accuracy_reward", "format"), {}, 0.5, 0.0),
        (("accuracy_reward", "format"), {"reward_weights": [0.2, 5.0]}, 0.5, 0.0),
        (("math_reward", "accuracy_reward"), {}, 0.5, 0.0),
        (("style", "choice_reward"), {}, 0.0, 0.0),
        # by name, and from a value on
        (("mine", "format"), {"solved_reward": "mine"}, 0.5, 0.0),
        (("mine", "format"), {"solved_reward": "format"}, 0.0, 0.0),
        (("mine", "format"), {"solved_reward": "mine", "solved_threshold": 0.0}, 0.0, 1.0),
        (("mine", "format"), {"solved_reward": "mine", "solved_threshold": 1.5}, 1.0, 0.0),
        # the total
        (("mine", "format"), {"solved_reward": "total"}, 0.0, 0.0),
        (("mine", "format"), {"solved_reward": "total", "solved_threshold": 2.0}, 0.5, 0.0),
        (("mine", "format"), {"solved_reward": "total", "reward_weights": [1.0, 0.1]}, 0.5, 0.0),
    ],
)
def test_solved_is_what_the_deciding_reward_says(make_trainer, walks, names, options, none, every):
    rewards = [renamed(right_answer, names[0]), renamed(right_format, names[1])]
    trainer = make_trainer(walks.select(range(2)), reward=rewards, **options)
    assert solved_shares(trainer) == {"groups/solve_none": none, "groups/solve_all": every}


def test_a_wrong_answer_in_the_right_format_closes_no_gate_and_is_not_replayed(make_trainer, walks):
    rewards = [renamed(right_answer, "math_reward"), renamed(right_format, "format_reward")]
    gated = make_trainer(walks.select(range(2)), reward=rewards, success_gate=0.0)
    assert generate_batch(gated)["off_policy_weight"].tolist() == [0.0] * 7 + [1.0]
    prompts = walks.select(range(2)).remove_columns("completion")
    replay = make_trainer(prompts, reward=rewards, demonstration_source="replay")
    remembered = generate_batch(replay)["row_to_remember"]
    assert (remembered >= 0).tolist() == [answer == 1 for answer in ANSWERS]


def test_one_reward_is_judged_without_its_weight(make_trainer, walks):
    trainer = make_trainer(walks.select(range(2)), reward=right_answer, reward_weights=[0.5])
    assert solved_shares(trainer) == {"groups/solve_none": 0.5, "groups/solve_all": 0.0}


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (("mine",), {}, None),
        (("math_reward", "format_reward"), {}, None),
        (("mine", "format"), {"solved_reward": "mine"}, None),
        (("mine", "format"), {"solved_reward": "total", "reward_weights": [1.0, 0.1]}, "reach it without format"),
        (("mine", "format"), {"solved_reward": "total", "reward_weights": [0.6, 0.6]}, None),
        (("mine", "format"), {"solved_reward": "total"}, "solved_reward='total' counts .* the others can reach it"),
        (("mine", "format"), {}, "none of mine, format is known .* can reach it without .* Set solved_reward"),
        (("mine", "format"), {"reward_weights": [0.6, 0.6]}, "none of mine, format is known to judge answers. Set"),
        (("math_reward", "choice_reward"), {}, "math_reward decides what is solved. Set solved_reward"),
    ],
)
def test_a_sum_that_may_be_made_without_the_answer_is_warned_of(make_trainer, caplog, names, options, said):
    make_trainer(reward=[renamed(right_answer, name) for name in names], **options)
    messages = [record.message for record in caplog.records if "solved" in record.message.lower()]
    if said is None:
        assert messages == []
    else:
        [message] = messages
        assert re.search(said, message)


def test_in_a_closed_group_a_row_with_a_prefix_has_no_advantage(make_trainer, walks):
    rewards = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    trainer = make_trainer(
        walks.select(range(2)), reward=lambda completions, **kwargs: rewards, success_gate=0.0, prefix_max=0.5
    )
    output = generate_batch(trainer)
    assert output["advantages"].tolist() == [0.0, 0.0, 0.0, 0.0, -0.25, -0.25, -0.25, 0.75]
    assert output["off_policy_weight"].tolist() == [0.0] * 7 + [1.0]


def test_weights_that_make_one_in_theory_solve_a_prompt(make_trainer):
    def right(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(reward=[right] * 3, reward_weights=[0.15, 0.65, 0.2])  # 0.99999994 in float32
    trainer.train()
    [first, *_] = [line for line in trainer.state.log_history if "groups/solve_all" in line]
    assert first["groups/solve_all"] == 1.0


def test_rewards_grade_demonstrations_and_see_no_column_of_ours(make_trainer, walks):
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(columns, completions=completions)
        return [1.0] * len(completions)

    trainer = make_trainer(walks.select(range(2)), reward=reward)
    generate_batch(trainer)
    assert seen["completions"][3] == walks[0]["completion"]
    assert seen["solution"] == [walks[0]["solution"]] * 4 + [walks[1]["solution"]] * 4
    ours = {"completion", "demonstrations", "completion_logps"} | {c for c in seen if c.startswith("demonstration")}
    assert not ours & set(seen)


def test_conversational_prompts(make_trainer, walks, monkeypatch):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in walks
    ]

    def reward(completions, **kwargs):
        return [len(completion[0]["content"]) / 16 for completion in completions]

    trainer = make_trainer(Dataset.from_list(rows), reward=reward)
    output = generate_batch(trainer, trainer.train_dataset.select(range(2)))
    assert off_policy_texts(trainer, output)[3] == walks[0]["completion"] + "<eos>"
    trainer.train()
    assert_finite(trainer.state.log_history)


def test_the_template_is_rendered_as_for_rollouts(tiny_model_dir, config, walks):
    # what the template is given decides whether the prompt ends with <think>, which is then not repeated
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if thinking %}<think>{% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": "Da:"}],
            "completion": [{"role": "assistant", "content": "<think>b#b"}],
        }
    ]
    for thinking, text in ((True, "b#b"), (False, "<think>b#b")):
        trainer = LuffyTrainer(
            str(tiny_model_dir),
            lambda completions, **kwargs: [0.0] * len(completions),
            config(chat_template_kwargs={"thinking": thinking}),
            train_dataset=Dataset.from_list(rows * 2),
            processing_class=tokenizer,
        )
        ids = generate_batch(trainer)["completion_ids"][3]
        assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_a_streamed_dataset(make_trainer, walks):
    stream = IterableDataset.from_generator(lambda: iter(walks))
    trainer = make_trainer(stream)
    trainer.train()
    assert trainer.state.log_history[0]["groups/guided"] == 1.0
    assert_finite(trainer.state.log_history)


def test_evaluation_has_no_demonstrations(make_trainer, walks, monkeypatch):
    trainer = make_trainer(
        trainer_options={"eval_dataset": walks.select(range(2))}, per_device_eval_batch_size=8, eval_strategy="steps"
    )
    counts = count_generated(trainer, monkeypatch)
    trainer.model.eval()
    metrics = trainer.evaluate()
    assert counts == [8]
    assert_finite([metrics])
    assert not [key for key in metrics if "off_policy" in key]


def longest(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def test_each_evaluation_set_has_metrics_of_its_own(make_trainer, walks):
    sets = {"short": walks.select(range(2)), "odd_ones": walks.select(range(2, 6)), "train": walks.select(range(2))}
    options = {"per_device_eval_batch_size": 8, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = make_trainer(reward=[letters_reward, longest], trainer_options={"eval_dataset": sets}, **options)
    trainer.train()
    lines = [line for line in trainer.state.log_history if any(key.startswith("eval_") for key in line)]
    assert len(lines) == 3
    for name, line in zip(sets, lines, strict=True):
        assert f"eval_{name}_reward" in line
        assert {f"eval_{name}_loss", f"eval_{name}_rewards/longest/mean"} <= line.keys()
        assert all(key.startswith(f"eval_{name}_") for key in line if key.startswith("eval_"))
    # nothing of one set is lost in what the evaluation returns
    trainer.model.eval()
    metrics = trainer.evaluate()
    assert {f"eval_{name}_reward" for name in sets} <= metrics.keys()
    assert "eval_reward" not in metrics
    # one set, and a prefix of the user's
    assert "eval_reward" in trainer.evaluate(walks.select(range(2)))
    assert "eval_again_reward" in trainer.evaluate(walks.select(range(2)), metric_key_prefix="eval_again")


# Behavior log-probs and padding


def test_behavior_logps_reach_the_ratio(make_trainer, walks):
    logps = [[-0.5, -0.25, -1.0, -2.0], None]
    dataset = walks.select(range(2)).remove_columns("completion")
    dataset = dataset.add_column("completion", ["b#b", "c#c"]).add_column("completion_logps", logps)
    trainer = make_trainer(dataset)
    output = generate_batch(trainer)
    width = output["completion_ids"].size(1)
    expected = torch.zeros(8, width)
    expected[3, :4] = torch.tensor(logps[0])
    torch.testing.assert_close(output["behavior_logps"], expected)

    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, output)
    policy = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
        torch.cat([output["prompt_mask"], output["completion_mask"]], 1),
        width,
    )[0]
    ratios = (policy - expected).exp()[output["off_policy_mask"]]
    assert len(ratios) == 8
    assert trainer._means.take()["off_policy/ratio"] == pytest.approx(ratios.mean().item(), rel=1e-5)


def only_the_last_of_four(completions, **columns):
    """Which is the demonstration."""
    return [float(i % 4 == 3) for i in range(len(completions))]


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo"])
def test_push_to_pull_is_of_the_losss_own_gradient(make_trainer, walks, loss_type):
    """What the loss does to the logit of each token that is in it, summed by sign."""
    trainer = make_trainer(walks.select(range(2)), reward=only_the_last_of_four, loss_type=loss_type)
    trainer.current_gradient_accumulation_steps = 1
    output = generate_batch(trainer)
    kept = {}
    scores = trainer._get_per_token_logps_and_entropies

    def keep_logps(*args, **kwargs):
        logps, entropies, aux_loss = scores(*args, **kwargs)
        kept["logps"] = logps
        logps.retain_grad()
        return logps, entropies, aux_loss

    trainer._get_per_token_logps_and_entropies = keep_logps
    trainer.compute_loss(trainer.model, output).backward()
    logps = kept["logps"]
    moves = -logps.grad * (1 - logps.exp().detach())  # (B, T), of the tokens' own logits
    off_policy = output["off_policy_mask"]
    rollouts = output["completion_mask"].bool() & ~off_policy
    assert (moves[rollouts] <= 0).all()
    expected = -moves[rollouts].sum() / moves[off_policy].sum()
    assert trainer._means.take()["groups/push_to_pull"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_cold_start_is_warned_of(make_trainer, walks, caplog):
    """A base of high entropy, no right rollout in 20 steps."""
    options = {"reward": only_the_last_of_four, "max_steps": 22, "learning_rate": 1e-6}
    for baseline in ("group", "on_policy"):
        caplog.clear()
        trainer = make_trainer(walks.select(range(2)), advantage_baseline=baseline, **options)
        trainer.train()
        warned = "No rollout has been right for a while" in caplog.text
        assert warned is (baseline == "group")
        pushes = [log["groups/push_to_pull"] for log in trainer.state.log_history if "groups/push_to_pull" in log]
        assert len(pushes) == 22
        assert all(push > 3 for push in pushes) if warned else pushes == [0.0] * 22


def test_a_cold_start_is_warned_of_where_rollouts_are_trained_on_twice(make_trainer, walks, caplog):
    """Every second log has no generation, which is no sign of a right rollout."""
    options = {"reward": only_the_last_of_four, "max_steps": 24, "learning_rate": 1e-6, "steps_per_generation": 2}
    trainer = make_trainer(walks.select(range(8)), **options)
    trainer.train()
    assert len([log for log in trainer.state.log_history if "groups/solve_none" in log]) == 12
    assert "No rollout has been right for a while" in caplog.text


def test_padding_has_no_say(make_trainer, walks):
    trainer = make_trainer(walks.select(range(2)))
    trainer.current_gradient_accumulation_steps = 1
    output = generate_batch(trainer)
    pad = ~output["completion_mask"].bool()
    assert pad.any()
    loss = trainer.compute_loss(trainer.model, output)
    output["completion_ids"] = output["completion_ids"].masked_fill(pad, 7)
    output["behavior_logps"] = torch.where(output["off_policy_mask"], 0.0, torch.nan)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, output), loss)


# Micro-batches and groups that lack something


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_micro_batches_of_one_row_are_finite(make_trainer, walks, loss_type):
    demonstrations = [[walks[0]["completion"]], [], None, []]  # 1 of 16 micro-batches holds a demonstration
    trainer = make_trainer(
        with_demonstrations(walks, demonstrations),
        loss_type=loss_type,
        beta=0.1,
        entropy_coef=0.01,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
    )
    trainer.train()
    assert_finite(trainer.state.log_history)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.state.log_history[0]["groups/guided"] == 0.25


def test_a_micro_batch_without_demonstrations_adds_exactly_nothing(make_trainer, walks):
    trainer = make_trainer(walks.select(range(2)))
    trainer.current_gradient_accumulation_steps = 1
    output = generate_batch(trainer)
    output["off_policy_mask"] = torch.zeros_like(output["off_policy_mask"])
    with_term = trainer.compute_loss(trainer.model, output)
    del output["off_policy_mask"]
    assert torch.equal(with_term, trainer.compute_loss(trainer.model, output))


def test_equal_rewards_are_no_signal(make_trainer, walks):
    trainer = make_trainer(walks, reward=lambda completions, **kwargs: [1.0] * len(completions))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_finite(trainer.state.log_history)
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 8, "steps_per_generation": 1, "gradient_accumulation_steps": 2},
        {"num_iterations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.1},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "num_iterations": 2},
        {"use_adaptive_entropy": True, "off_policy_mask_threshold": 0.1, "num_iterations": 2},
        {"multi_objective_aggregation": "normalize_then_sum", "advantage_baseline": "on_policy"},
        {"mask_truncated_completions": True, "delta": 2.0, "gradient_checkpointing": True},
        {"pad_to_multiple_of": 8},
        {"demonstration_weight": 0.0, "shaping": "log"},
    ],
    ids=lambda options: ",".join(options),
)
def test_trl_options_keep_working(make_trainer, options):
    trainer = make_trainer(max_steps=4, **options)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_finite(trainer.state.log_history)
    assert trainer.state.global_step == 4
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"top_entropy_quantile": 0.5},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
        {"delta": 1.1, "epsilon": 0.01},
        {"off_policy_mask_threshold": 0.01},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"loss_type": "vespo"},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_trl_computes_does_not_depend_on_the_demonstrations(make_trainer, walks, options):
    # with a weight of 0 only TRL's part is left: other demonstration tokens must not change it
    # two steps a generation: the old policy's log-probs count
    trainer = make_trainer(walks.select(range(4)), demonstration_weight=0.0, steps_per_generation=2, **options)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss != 0
    trainer._metrics["train"].clear()
    other = dict(batch, completion_ids=batch["completion_ids"].masked_fill(batch["off_policy_mask"], 30))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, other), loss, rtol=1e-6, atol=1e-8)
    # nor do log-probs of any size
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        if key in batch:
            other[key] = batch[key].masked_fill(batch["off_policy_mask"], -300.0 if key[0] == "o" else 0.0)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, other), loss, rtol=1e-6, atol=1e-8)


def test_improbable_demonstrations_keep_the_gradient_finite(make_trainer, walks):
    trainer = make_trainer(walks.select(range(2)), beta=0.1)
    trainer.current_gradient_accumulation_steps = 1
    batch = generate_batch(trainer)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(200)  # some tokens are hundreds of nats away
    logps = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        batch["completion_ids"].size(1),
    )[0]
    assert logps[batch["off_policy_mask"]].min() < -90
    # rollouts as the policy sees them now, so that only the demonstrations are far away
    batch["ref_per_token_logps"] = logps.detach().masked_fill(batch["off_policy_mask"], 0.0)
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())


def test_eight_micro_batches_of_one_are_one_of_eight(make_trainer, walks):
    # greedy, so that both see the same rollouts
    options = {"generation_kwargs": {"do_sample": False}, "max_steps": 3}
    one = make_trainer(per_device_train_batch_size=8, **options)
    eight = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    for trainer in (one, eight):
        trainer.train()
    for line, expected in zip(eight.state.log_history[:3], one.state.log_history[:3], strict=True):
        for key in expected:
            if key in ("loss", "grad_norm") or key.startswith(("on_policy/", "off_policy/", "groups/")):
                assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    for (name, ours), theirs in zip(eight.model.named_parameters(), one.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_an_evaluation_between_two_logs_takes_nothing_from_them(make_trainer, walks):
    options = {"generation_kwargs": {"do_sample": False}, "logging_steps": 2}
    plain = make_trainer(**options)
    evaluated = make_trainer(
        eval_strategy="steps", eval_steps=1, trainer_options={"eval_dataset": walks.select(range(4))}, **options
    )
    for trainer in (plain, evaluated):
        trainer.train()
    evaluations = [line for line in evaluated.state.log_history if "eval_loss" in line]
    assert len(evaluations) == 2
    assert not any("on_policy/" in key for line in evaluations for key in line)
    [expected] = [line for line in plain.state.log_history if "loss" in line]
    [line] = [line for line in evaluated.state.log_history if "loss" in line]
    for key in ("on_policy/length", "on_policy/entropy", "off_policy/prob", "off_policy/loss", "groups/guided"):
        assert line[key] == pytest.approx(expected[key], rel=1e-5), key


def test_a_run_stopped_and_resumed_is_one_never_stopped(make_trainer, walks):
    several = with_demonstrations(walks, [["a#a", "b#b", "c#c"]] * 16)  # so that the choice is random
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(several, **options)
    whole.train()
    resumed = make_trainer(several, **options)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_an_interrupted_step_leaves_no_demonstrations_for_evaluation(make_trainer, walks):
    seen, fail = [], True

    def reward(completions, **kwargs):
        if fail:
            raise KeyboardInterrupt
        seen.extend(completions)
        return [0.0] * len(completions)

    trainer = make_trainer(
        walks.select(range(2)), reward=reward, trainer_options={"eval_dataset": walks}, per_device_eval_batch_size=8
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    fail = False
    trainer.model.eval()
    trainer.evaluate(walks.select(range(2)))
    assert not set(seen) & set(walks["completion"])


def test_training_can_be_taken_up_again_after_an_interrupt(make_trainer):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and trainer._micro_batches_taken == 0:
                trainer.compute_loss = interrupted

    def interrupted(*args, **kwargs):
        del trainer.compute_loss
        raise KeyboardInterrupt

    trainer = make_trainer(trainer_options={"callbacks": [Interrupt()]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps


# Too long


@pytest.mark.parametrize(
    ("overflow", "guided", "dropped", "truncated"), [("drop", 0.5, 1.0, 0.0), ("truncate", 1.0, 0.0, 1.0)]
)
def test_demonstrations_that_are_too_long_are_counted(make_trainer, walks, overflow, guided, dropped, truncated):
    dataset = with_demonstrations(walks, [["a;b;c;d;e#e"], ["b#b"]])  # 12 and 4 tokens
    trainer = make_trainer(
        dataset, max_completion_length=8, demonstration_overflow=overflow, reward=lambda completions, **kw: [0.0] * 8
    )
    texts = off_policy_texts(trainer, generate_batch(trainer))
    assert texts[3] == (None if overflow == "drop" else "a;b;c;d;")  # cut, so without EOS
    assert texts[7] == "b#b<eos>"
    trainer.train()
    line = trainer.state.log_history[0]
    # the cut demonstration is no clipped rollout
    rollouts = 7 if overflow == "drop" else 6
    assert line["on_policy/clipped_ratio"] * rollouts == pytest.approx(
        line["completions/clipped_ratio"] * 8 - truncated
    )
    assert (line["groups/guided"], line["off_policy/dropped"], line["off_policy/truncated"]) == (
        guided, dropped, truncated,
    )  # fmt: skip


def test_a_truncated_demonstration_can_be_masked_out(make_trainer, walks):
    dataset = with_demonstrations(walks, [["a;b;c;d;e#e"], ["b#b"]])
    trainer = make_trainer(
        dataset, max_completion_length=8, demonstration_overflow="truncate", mask_truncated_completions=True
    )
    assert off_policy_texts(trainer, generate_batch(trainer))[3] is None


# What is logged and saved


def test_metrics_worked_by_hand(make_trainer, walks):
    # two prompts x 4: the rollouts are sampled, the rewards are given
    rewards = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, None, 0.5]
    dataset = with_demonstrations(walks, [["b#b"], ["c;d#d"]])
    trainer = make_trainer(dataset, reward=lambda completions, **kwargs: rewards, max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert_finite(trainer.state.log_history)
    assert line["on_policy/reward"] == pytest.approx(1 / 5)  # the None is left out
    assert line["off_policy/reward"] == pytest.approx(0.75)
    assert line["off_policy/length"] == pytest.approx((4 + 6) / 2)
    assert line["completions/mean_length"] * 8 == pytest.approx(line["on_policy/length"] * 6 + 10)
    tokens = line["on_policy/length"] * 6 + 10
    assert line["off_policy/token_fraction"] == pytest.approx(10 / tokens)
    assert line["groups/guided"] == 1.0
    assert line["groups/solve_none"] == 0.5
    assert line["groups/solve_all"] == 0.0
    assert 0 < line["off_policy/prob"] < 1
    assert line["on_policy/clipped_ratio"] == pytest.approx(line["completions/clipped_ratio"] * 8 / 6)
    assert line["off_policy/prob"] == line["off_policy/ratio"]
    assert line["on_policy/entropy"] == pytest.approx(line["entropy"], rel=1e-5)


def test_the_demonstrations_part_of_the_loss(make_trainer, walks):
    # rollouts have no advantage of their own: all of the loss is the demonstrations'
    def reward(completions, **kwargs):
        return [float(text in ("b#b", "c;d#d")) for text in completions]

    dataset = with_demonstrations(walks, [["b#b"], ["c;d#d"]])
    for accumulation in (1, 4):
        trainer = make_trainer(
            dataset, reward=reward, per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation, advantage_baseline="on_policy", max_steps=1,
        )  # fmt: skip
        trainer.train()
        line = trainer.state.log_history[0]
        assert line["loss"] == pytest.approx(line["off_policy/loss"], rel=1e-5)
        assert line["off_policy/loss"] < 0


def test_metrics_are_of_the_steps_since_the_last_log(make_trainer, walks):
    # demonstrations of 4 tokens in the first step, of 6 in the second
    dataset = with_demonstrations(walks, [["b#b"], ["b#c"], ["c;d#d"], ["c;d#e"]])
    trainer = make_trainer(dataset, shuffle_dataset=False)
    trainer.train()
    assert [line["off_policy/length"] for line in trainer.state.log_history[:2]] == [4, 6]
    trainer = make_trainer(dataset, shuffle_dataset=False, logging_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["off_policy/length"] == 5


def test_solved_groups_are_judged_by_their_rollouts(make_trainer, walks):
    rewards = [1.0, 1.0, 2.0, 0.0, 0.0, 0.5, 0.0, 1.0]  # all rollouts right, the demonstration wrong; and the reverse
    trainer = make_trainer(walks.select(range(2)), reward=lambda completions, **kw: rewards, max_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert (line["groups/solve_all"], line["groups/solve_none"]) == (0.5, 0.5)


def test_completions_table_says_which_rows_are_demonstrations(make_trainer, tmp_path):
    trainer = make_trainer(log_completions=True, max_steps=1)
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table["demonstration"].tolist() == [False, False, False, True] * 2


def test_evaluation_rows_of_the_table_are_no_demonstrations(make_trainer, walks, tmp_path):
    trainer = make_trainer(
        trainer_options={"eval_dataset": walks.select(range(2))},
        log_completions=True, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8, max_steps=1,
    )  # fmt: skip
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert not table["demonstration"].any()


def test_saved_model_and_card(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="tiny", dataset_name="letter-walk")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Learning to Reason under Off-Policy Guidance" in card
    assert "2504.14945" in card
    assert "- luffy" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert math.isfinite(state["log_history"][0]["off_policy/loss"])


def test_lora_is_trained_saved_reloaded_and_merged(make_trainer, tiny_model_dir, tmp_path, walks):
    trainer = make_trainer(trainer_options={"peft_config": LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_finite(trainer.state.log_history)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed
    assert all("lora_" in name for name in changed)  # the base model's weights are untouched

    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = trainer.model(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert (base(input_ids=ids).logits - expected).abs().max() > 1e-3
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(reloaded(input_ids=ids).logits, expected)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_qlora(make_trainer):
    trainer = make_trainer(
        trainer_options={
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            "peft_config": LoraConfig(task_type="CAUSAL_LM"),
        }
    )
    quantized = [p for p in trainer.model.parameters() if p.dtype == torch.uint8]
    assert quantized  # four bits: two weights a byte
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_finite(trainer.state.log_history)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed
    assert all("lora_" in name for name in changed)


# vLLM's side, by a stand-in for TRL's client: real vLLM needs an environment of its own


def test_vllm_is_asked_for_rollouts_only(make_trainer, walks):
    class Vllm:
        def __init__(self):
            self.asked = []

        def sync_weights(self):
            pass

        def generate(self, prompts, images, num_generations, profiler):
            self.asked.append((len(prompts), num_generations))
            completion_ids = [[5, 6, 1]] * len(prompts)
            return None, completion_ids, [[[-0.5], [-0.25], [-0.125]]] * len(prompts), None

    demonstrations = [[walks[0]["completion"]], []]
    trainer = make_trainer(with_demonstrations(walks, demonstrations))
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Vllm(), -1
    output = generate_batch(trainer)
    assert trainer.vllm_generation.asked == [(3 + 4, 1)]
    assert off_policy_texts(trainer, output)[3] == walks[0]["completion"] + "<eos>"
    # neutral in the correction for vLLM's other numerics: not sampled, so a ratio of 1
    assert torch.equal(output["importance_sampling_ratio"][3], torch.ones_like(output["importance_sampling_ratio"][3]))
    assert output["sampling_per_token_logps"][3][:4].isnan().all()
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer.compute_loss(trainer.model, output))


def test_all_processes_ask_for_as_many_rows(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(
        "luffy_trl.padding.scoring.gather_object", lambda counts: [*counts, 5]
    )  # another process has five
    assert trainer._as_many_everywhere([0, 2, 3]) == [0, 2, 3, 3, 3]
    assert trainer._as_many_everywhere([0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]
