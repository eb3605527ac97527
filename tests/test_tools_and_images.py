"""Tools, environments and images together, beside demonstrations, on a tiny vision-language model that acts.

With `test_tools.py` and `test_images.py` these are the cases of TRL's own tests (`tests/test_grpo_trainer.py`), with
demonstrations in the groups, and generation in earnest where TRL's replaces it:

    test_train_with_tools                       test_tools: rollouts_call_tools, calls_that_fail
    test_train_with_malformed_tool_calls        test_tools: malformed_calls
    test_train_with_environment_factory         test_tools; here: loss_and_gradients, environments
    test_train_with_multiple_environments,      test_tools: each_row_has_its_environment, an_environment_that_is_not
        _unknown_environment_raises                 _there
    test_train_with_environment_owned_reward,   test_tools: each_row_has_its_environment
        _coexists, _mixed_environments
    test_train_with_environment_owned_data,     test_tools: an_environment_that_makes_the_prompts; without a dataset it
        _requires_max_steps, dataset_required       needs a function that gives demonstrations (test_refusals)
    test_train_vlm, _multi_image,               test_images: loss_and_gradients, of Qwen2.5-VL, Gemma 3, LLaVA and
        _pad_to_multiple_of, _beta_non_zero,        LLaVA-NeXT; an_adapter
        _importance_sampling, _peft
    test_train_vlm_log_multimodal_false         here: images_are_logged
    test_train_with_tools_multimodal_response   here: loss_and_gradients, micro_batches
    test_train_vlm_and_vllm, _and_liger         need packages that are not here
"""

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers.utils import get_json_schema
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.demonstrations.images import without_empty_images

from .acting_vlm import OPENING, acting_rows, build_acting_processor, called, look, save_acting_vlm, trajectory
from .conftest import SMALL_RUN
from .test_trajectories import distinct, plain_loss
from .tiny_vlm import square


GROUP, LONGEST = 4, 70
END = "<|im_end|>"
REPLAYED = (
    f"look(side=l){END}\n<|im_start|>tool\nred{END}\n{OPENING}"
    f"look(side=r){END}\n<|im_start|>tool\nblue{END}\n{OPENING}("
)


@pytest.fixture(scope="module")
def acting_vlm(tmp_path_factory):
    return save_acting_vlm(tmp_path_factory.mktemp("acting-vlm"))


def show(side: str) -> list:
    """Look at a side of the picture.

    Args:
        side: l or r.
    """
    return [{"type": "image", "image": square(look(side), 1)}, {"type": "text", "text": "!"}]


show.__name__ = "look"


class Sides:
    def reset(self, **row):
        self.asked = ""

    def look(self, side: str) -> str:
        """Look at a side of the picture.

        Args:
            side: l or r.
        """
        self.asked += side
        return look(side)


class Speaking(Sides):
    """Says something behind each prompt, and shows a picture of its own."""

    def reset(self, **row):
        super().reset(**row)
        return [{"type": "image", "image": square("grey", 3)}, {"type": "text", "text": " Look!"}]


class Showing(Sides):
    def look(self, side: str) -> list:
        """Look at a side of the picture.

        Args:
            side: l or r.
        """
        self.asked += side
        return show(side)


class Seen:
    """A reward that keeps what it was given: prompts and completions by the tokens of the completion."""

    __name__ = "seen"

    def __init__(self, processor):
        self.tokenizer, self.rows = processor.tokenizer, []

    def __call__(self, prompts, completions, completion_ids, **kwargs) -> list[float]:
        self.rows += zip(prompts, completions, completion_ids, strict=True)
        return [distinct(self.tokenizer.decode(ids)) for ids in completion_ids]


@pytest.fixture
def acting_trainer(acting_vlm, tmp_path):
    def make(trainer_class=LuffyTrainer, dataset=None, reward=None, trainer_options=None, **overrides):
        processor = build_acting_processor()
        options = {
            **SMALL_RUN, "per_device_train_batch_size": 16, "max_completion_length": LONGEST, "max_steps": 1,
            "output_dir": str(tmp_path), "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        config = LuffyConfig if trainer_class is LuffyTrainer else GRPOConfig
        return trainer_class(
            str(acting_vlm),
            reward or Seen(processor),
            config(**(options | overrides)),
            train_dataset=acting_rows() if dataset is None else dataset,
            processing_class=processor,
            **(trainer_options or {}),
        )

    return make


def context_of(tokens: list[str]) -> list[bool]:
    """Where a row's tokens are no policy's: from behind the end of a turn to the opening of the next."""
    given, behind = [], None
    for token in tokens:
        given.append(behind is not None)
        if behind is not None:
            behind += token
            behind = None if behind.endswith(OPENING) else behind
        elif token == END:
            behind = ""
    return given


def images_in(messages) -> list:
    contents = [message.get("content") for message in messages]
    return [part["image"] for c in contents if isinstance(c, list) for part in c if part["type"] == "image"]


def facts_of(trainer, seen: Seen) -> list[dict]:
    """Each row by itself, its images from the messages that the reward was given."""
    processor, facts = trainer.processing_class, []
    given = {(str(prompt).count("?"), *ids): (prompt, completion) for prompt, completion, ids in seen.rows}
    [batch] = trainer._buffered_inputs
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        tokens = [processor.tokenizer.decode([token]) for token in ids.tolist()]
        asked = processor.tokenizer.decode(prompt).count("?")
        messages, completion = given[asked, *ids.tolist()]
        images = images_in([*messages, *completion])
        fact = {
            "prompt": prompt, "ids": ids, "asked": asked, "own": ~torch.tensor(context_of(tokens)),
            "reward": distinct("".join(tokens)), "off_policy": "".join(tokens).startswith(REPLAYED), "shown": images,
        }  # fmt: skip
        if images:
            both = torch.cat([prompt, ids])[None]
            fact["images"] = dict(processor.image_processor(images=images, return_tensors="pt"))
            fact["images"]["mm_token_type_ids"] = (both == processor.image_token_id).int()
        facts.append(fact)
    for fact in facts:
        rewards = [other["reward"] for other in facts if other["asked"] == fact["asked"]]
        assert len(rewards) == GROUP
        fact["advantage"] = fact["reward"] - sum(rewards) / GROUP
    return facts


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize(
    ("images", "options"),
    [
        ("one", {"tools": [look]}),
        ("several", {"tools": [look]}),
        (None, {"tools": [show]}),
        ("one", {"tools": [show]}),
        ("several", {"environment_factory": Showing}),
        ("one", {"environment_factory": Sides}),
        ("several", {"environment_factory": Speaking}),
        (None, {"environment_factory": Speaking}),
        ("several", {}),
    ],
)
def test_loss_and_gradients_equal_plain_torch(acting_trainer, images, options, loss_type):
    seen = Seen(build_acting_processor())
    trainer = acting_trainer(dataset=acting_rows(4, images), reward=seen, trainer_options=options, loss_type=loss_type)
    model = trainer.model
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(GROUP)])
    facts = facts_of(trainer, seen)
    assert sum(fact["off_policy"] for fact in facts) == 4
    acted = [fact for fact in facts if not fact["off_policy"] and (~fact["own"]).any()]
    assert bool(acted) == bool(options)
    in_prompt = [fact["shown"] for fact in facts if fact["off_policy"]]
    assert all(in_prompt) == (images is not None or options.get("environment_factory") is Speaking)
    if options.get("tools") == [show]:  # what tools show comes on top
        assert max(len(fact["shown"]) for fact in acted) > max(map(len, in_prompt))

    trainer.compute_loss(model, inputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = trainer.compute_loss(model, inputs).detach()
    model.zero_grad()
    expected = plain_loss(model, None, facts, loss_type, beta=0.0)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    assert any("visual" in name for name in gradients)
    for name, gradient in gradients.items():
        own = model.get_parameter(name).grad
        assert (gradient - own).norm() / own.norm() < 2e-5, name


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"trim_padding": False}, {"tokens_per_micro_batch": 300}])
def test_micro_batches_of_which_some_have_no_image_are_the_whole_batch(acting_trainer, options):
    """Where tools alone show images: they do to some rows, and never to demonstrations."""

    def trained(**more):
        trainer = acting_trainer(
            dataset=acting_rows(4, None), trainer_options={"tools": [show]}, optim="sgd", max_grad_norm=0, **more
        )
        numbers = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, inputs: numbers.append("pixel_values" in inputs), with_kwargs=True
        )
        trainer.train()
        return trainer.model.state_dict(), numbers

    whole, _ = trained()
    parts, had_images = trained(per_device_train_batch_size=2, gradient_accumulation_steps=8, **options)
    if "beta" not in options:
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6)
    assert {True, False} <= set(had_images)


def test_features_of_no_image_are_not_handed_on():
    there = {"pixel_values": torch.ones(4, 2), "image_grid_thw": torch.ones(1, 3), "input_ids": torch.ones(1, 5)}
    assert without_empty_images(True, torch.nn.Identity(), (), there) == ((), there)
    empty = there | {"pixel_values": torch.ones(0, 2), "image_grid_thw": torch.ones(0, 3)}
    assert without_empty_images(False, torch.nn.Identity(), (), empty) == ((), {"input_ids": there["input_ids"]})
    with pytest.raises(ValueError, match="Under ZeRO-3 and FSDP all processes must run the same modules: take ZeRO-2"):
        without_empty_images(True, torch.nn.Identity(), (), empty)


@pytest.mark.parametrize("options", [{"tools": [show]}, {"environment_factory": Showing}])
def test_without_demonstrations_it_is_grpo_with_tools_that_show_images(acting_trainer, options):
    weights = []
    for trainer_class, own in [
        (GRPOTrainer, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (LuffyTrainer, {"num_demonstrations": 0}),
    ]:
        trainer = acting_trainer(trainer_class, acting_rows(4, "several"), trainer_options=options, max_steps=2, **own)
        trainer.train()
        assert trainer.state.log_history[0]["tools/call_frequency"] > 0
        weights.append(trainer.model.state_dict())
    grpo, luffy = weights
    assert all(torch.equal(grpo[name], luffy[name]) for name in grpo)


def test_environments_of_rows_and_evaluation(acting_trainer):
    rows = [row | {"environment": ("sides", "showing")[i % 2]} for i, row in enumerate(acting_rows(4, "several"))]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    factories = {"sides": Speaking, "showing": Showing}
    trainer = acting_trainer(
        dataset=dataset,
        trainer_options={"environment_factory": factories, "eval_dataset": dataset},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    trainer.train()
    [line] = [line for line in trainer.state.log_history if "off_policy/length" in line]
    assert line["groups/guided"] == 1.0
    assert line["off_policy/length"] == 15.0
    [evaluated] = [line for line in trainer.state.log_history if "eval_reward" in line]
    assert evaluated["eval_tools/call_frequency"] > 0


@pytest.mark.parametrize("logs", [True, False])
def test_images_are_logged_where_they_should_be(acting_trainer, logs, tmp_path):
    trainer = acting_trainer(
        dataset=acting_rows(4, "several"),
        trainer_options={"tools": [show]},
        log_completions=True,
        num_completions_to_print=0,
        log_multimodal=logs,
    )
    trainer.train()
    assert len(trainer._logs["images"]) == (16 if logs else 0)
    [table] = tmp_path.rglob("completions_*.parquet")
    shown = [c for row in pq.read_table(table)["completion"].to_pylist() for c in row if c["role"] == "tool"]
    assert {part["type"] for message in shown for part in message["content"]} == {"text", "image"}


def test_texts_for_a_model_of_images_with_tools_in_a_column(acting_trainer):
    schemas = [get_json_schema(look)]
    rows = [row | {"tools": schemas if i else None} for i, row in enumerate(acting_rows(4, None))]
    trainer = acting_trainer(dataset=Dataset.from_list(rows, on_mixed_types="use_json"))
    trainer.train()
    [line] = [line for line in trainer.state.log_history if "off_policy/length" in line]
    assert line["off_policy/length"] == 15.0
    rows = [row | {"tools": schemas if i == 2 else None} for i, row in enumerate(acting_rows(4, "one"))]
    with pytest.raises(ValueError, match=r"Row 2: `tools` cannot be combined with the images of its prompt"):
        acting_trainer(dataset=Dataset.from_list(rows, on_mixed_types="use_json"))


PICTURE = {"role": "tool", "name": "look", "content": [{"type": "image", "image": "red.png"}]}


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (
            [called("l"), PICTURE, trajectory("red")[-1]],
            "message 1 has an image, and demonstrations are texts",
        ),
        ([*trajectory("red")[:-1], {"role": "assistant", "content": "<|image_pad|>"}], "holds the token '<.image_pad"),
        ([{"role": "assistant", "content": "#r<|image_pad|>"}], "holds the token '<.image_pad.>', in whose place the"),
    ],
)
def test_images_of_demonstrations_are_refused_by_row(acting_trainer, completion, message):
    rows = list(acting_rows(4, None))
    rows[2]["completion"] = completion
    with pytest.raises(ValueError, match=f"Row 2: `completion`.*{message}"):
        acting_trainer(dataset=Dataset.from_list(rows, on_mixed_types="use_json"))
