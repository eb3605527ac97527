"""TRL's `tools` and `environment_factory` beside demonstrations: the cases of TRL's own tests, on real generations."""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.tasks.letter_chain import (
    LETTERS,
    RESPONSE_TEMPLATE,
    Links,
    build_chain_tokenizer,
    letter_chain_reward,
)

from .acting_model import chain_of, chain_rows
from .conftest import SMALL_RUN


@pytest.fixture
def trained(acting_model, tmp_path):
    """A trainer that has trained for a step, and what it logged."""

    def run(dataset, reward=letter_chain_reward, eval_dataset=None, **options) -> tuple[LuffyTrainer, dict]:
        args = {**SMALL_RUN, "per_device_train_batch_size": 16, "max_completion_length": 24}
        args |= {"output_dir": str(tmp_path), "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        if eval_dataset is not None:
            args |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
        trainer = LuffyTrainer(
            str(acting_model),
            reward,
            LuffyConfig(**(args | options.pop("config", {}))),
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=build_chain_tokenizer(),
            **options,
        )
        trainer.train()
        return trainer, next(line for line in trainer.state.log_history if "off_policy/reward" in line)

    return run


def follow(letter: str) -> str:
    """Where a letter leads.

    Args:
        letter: the letter to follow.
    """
    asked.append(letter)
    if letter == "z":
        raise RuntimeError("no further")
    return LETTERS[(LETTERS.index(letter) + 1) % 26]


async def follow_later(letter: str) -> str:
    """The same.

    Args:
        letter: the letter to follow.
    """
    return follow(letter)


follow_later.__name__ = "follow"
asked: list[str] = []


@pytest.mark.parametrize("tool", [follow, follow_later])
def test_rollouts_call_tools_and_demonstrations_do_not(trained, tool):
    asked.clear()
    trainer, line = trained(chain_rows([True] * 4), tools=[tool])
    assert line["off_policy/reward"] == 1.0
    assert line["tools/call_frequency"] * 16 == pytest.approx(len(asked))
    assert line["tools/call_frequency"] > 0
    # four trajectories of 11 tokens of their own; a tool's answers are not in TRL's lengths either
    assert line["off_policy/length"] == 11
    assert trainer.state.global_step == 1


def unwilling(letter: str) -> str:
    """Where a letter leads.

    Args:
        letter: the letter to follow.
    """
    raise RuntimeError("no further")


async def unwilling_later(letter: str) -> str:
    """Where a letter leads.

    Args:
        letter: the letter to follow.
    """
    raise RuntimeError("no further")


def of_a_number(number: int) -> int:
    """Another argument than the policy gives.

    Args:
        number: to follow.
    """
    return number


def another(letter: str) -> str:
    """Another tool than the policy calls.

    Args:
        letter: the letter.
    """
    return letter


unwilling.__name__ = unwilling_later.__name__ = of_a_number.__name__ = "follow"


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        (unwilling, "no further"),
        (unwilling_later, "no further"),
        (of_a_number, "unexpected keyword argument 'letter'"),
        (another, "Tool follow not found"),
    ],
)
def test_calls_that_fail_are_answered_and_demonstrations_stand(trained, tool, says):
    told = []

    def reward(completions, **kwargs):
        told.extend(m["content"] for c in completions for m in c if m["role"] == "tool" and "error" in m["content"])
        return [float(len(completion)) for completion in completions]

    _, line = trained(chain_rows([True] * 4), reward, tools=[tool], config={"max_completion_length": 200})
    assert line["tools/call_frequency"] > 0
    assert line["tools/failure_frequency"] == 1.0
    assert told
    assert all(says in answer for answer in told)
    assert line["off_policy/reward"] == 5.0
    assert line["off_policy/length"] == 11


NAMELESS = {"type": "function", "function": {"arguments": {"letter": "{content}"}}}


@pytest.mark.parametrize("broken", [{"transform": NAMELESS}, {"content": "json"}])
def test_malformed_calls_are_texts_that_call_nothing(acting_model, tmp_path, broken):
    """What the model writes is read as a call without a name, or as JSON, which it is not."""
    tokenizer = build_chain_tokenizer()
    fields = RESPONSE_TEMPLATE["fields"]
    tokenizer.response_template = RESPONSE_TEMPLATE | {
        "fields": fields | {"tool_calls": fields["tool_calls"] | broken}
    }
    asked.clear()
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    args = {**SMALL_RUN, "per_device_train_batch_size": 16, "max_completion_length": 24, "max_steps": 1}
    trainer = LuffyTrainer(
        str(acting_model),
        reward,
        LuffyConfig(output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True, **args),
        train_dataset=chain_rows([True] * 4),
        processing_class=tokenizer,
        tools=[follow],
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert not asked
    assert line["tools/call_frequency"] == 0
    lengths = sorted(map(len, seen))
    assert lengths == [1] * 12 + [5] * 4
    assert any("follow(letter=" in c[0]["content"] for c in seen if len(c) == 1)
    assert line["off_policy/reward"] == 5.0


def test_texts_and_trajectories_side_by_side_and_prompts_without_any(trained):
    rows = chain_rows([True] * 4).to_list()
    rows[0]["demonstrations"] = [[{"role": "assistant", "content": "#z"}]]
    rows[1]["demonstrations"] = [*rows[1]["demonstrations"], [{"role": "assistant", "content": "#z"}]]
    rows[2]["demonstrations"] = []
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    _, line = trained(dataset, environment_factory=Links, config={"num_demonstrations": 2})
    assert line["groups/guided"] == 0.75
    assert line["off_policy/length"] == pytest.approx((3 + 11 + 3 + 11) / 4)
    assert line["off_policy/reward"] == 1.0


class Ends:
    """Another environment: its one letter is the last."""

    def reset(self, **row):
        self.asked = 0

    def follow(self, letter: str) -> str:
        """Where a letter leads.

        Args:
            letter: the letter to follow.
        """
        self.asked += 1
        return "."

    def get_reward(self) -> float:
        return float(self.asked)


def test_each_row_has_its_environment_and_the_one_that_gives_rewards_gives_them_to_its_rows(trained):
    rows = [row | {"environment": "ends" if i % 2 else "links"} for i, row in enumerate(chain_rows([True] * 4))]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    factories = {"links": Links, "ends": Ends}
    trainer, line = trained(dataset, environment_factory=factories)
    assert trainer.reward_func_names == ["letter_chain_reward", "Ends"]
    # Two demonstrations of each kind, all right; those of the second have called twice
    assert line["off_policy/reward"] == 1.0 * 0.5 + (1.0 + 2.0) * 0.5


def test_an_environment_that_is_not_there_is_named(trained):
    rows = [row | {"environment": "other"} for row in chain_rows([True] * 4)]
    with pytest.raises(ValueError, match="environment='other'"):
        trained(Dataset.from_list(rows, on_mixed_types="use_json"), environment_factory={"links": Links})


def test_an_environment_that_makes_the_prompts(trained):
    class Asks(Links):
        def reset(self, links, **row):
            super().reset(links, **row)
            return "Da"

    chain = chain_of("az")
    rows = [{"completion": chain.trajectory(), "solution": "z", "links": chain.links}] * 4
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    trainer, line = trained(dataset, environment_factory=Asks)
    assert line["off_policy/reward"] == 1.0
    [batch] = trainer._buffered_inputs
    assert {trainer.processing_class.decode(ids) for ids in batch["prompt_ids"]} == {"Da|"}


def test_an_environment_that_has_the_data_beside_a_function_that_has_the_trajectories(trained):
    class Data(Links):
        def reset(self, **row):
            super().reset(chain_of("az").links)
            return "Da"

    def recorded(row):
        return [chain_of("az").trajectory()]

    def answers(completions, **kwargs):
        return [float(completion[-1]["content"] == "#z") for completion in completions]

    options = {"demonstration_source": recorded, "max_steps": 2}
    _, line = trained(None, answers, environment_factory=Data, config=options)
    assert line["groups/guided"] == 1.0
    assert line["off_policy/reward"] == 1.0


def test_a_function_gives_trajectories_and_a_call_that_the_environment_does_not_have_is_said(trained, caplog):
    def recorded(row):
        messages = chain_of(row["prompt"][0]["content"][1] + "z").trajectory()
        messages[0]["tool_calls"][0]["function"]["name"] = "trail"
        return [messages]

    dataset = chain_rows([False] * 4)
    trained(dataset, environment_factory=Links, config={"demonstration_source": recorded, "max_completion_length": 48})
    assert "A demonstration calls trail, which its environment does not have" in caplog.text


def test_evaluation_acts_and_has_no_demonstrations(trained):
    dataset = chain_rows([True] * 4)
    trainer, _ = trained(dataset, eval_dataset=dataset, environment_factory=Links, config={"num_generations_eval": 4})
    evaluated = [line for line in trainer.state.log_history if "eval_tools/call_frequency" in line]
    assert evaluated
    assert all(line["eval_tools/call_frequency"] > 0 for line in evaluated)


def test_without_demonstrations_it_is_grpo_with_tools(acting_model, tmp_path):
    weights = []
    for trainer_class, config_class, options in [
        (GRPOTrainer, GRPOConfig, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (LuffyTrainer, LuffyConfig, {"num_demonstrations": 0}),
    ]:
        args = {**SMALL_RUN, **options, "per_device_train_batch_size": 16, "max_completion_length": 24}
        args |= {"output_dir": str(tmp_path), "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
        trainer = trainer_class(
            str(acting_model),
            lambda completions, **kwargs: [float(len(completion)) for completion in completions],
            config_class(**args),
            train_dataset=chain_rows([False] * 4),
            processing_class=build_chain_tokenizer(),
            environment_factory=Links,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    grpo, luffy = weights
    assert all(torch.equal(grpo[name], luffy[name]) for name in grpo)
