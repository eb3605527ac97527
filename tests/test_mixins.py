"""The mixins on a plain GRPOTrainer: they know nothing of LUFFY."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from luffy_trl.hub.mixin import HubPushConfig, HubPushMixin
from luffy_trl.padding.config import PaddingFreeConfig
from luffy_trl.padding.mixin import PaddingFreeMixin
from luffy_trl.runs.checkpoints import UNFINISHED_DIR, checkpoints, damage
from luffy_trl.runs.evaluations import EvaluationSetsMixin
from luffy_trl.runs.mixin import WholeCheckpointMixin

from .conftest import HUNG, SMALL_RUN
from .hub_server import TOKEN, HubServer
from .run_two_processes import letters_reward
from .test_padding import SHAPE, assert_same_steps, step_gradients


class PaddingFreeTrainer(PaddingFreeMixin, GRPOTrainer):
    pass


class WholeCheckpointTrainer(WholeCheckpointMixin, GRPOTrainer):
    pass


class EvaluationSetsTrainer(EvaluationSetsMixin, GRPOTrainer):
    pass


class HubPushTrainer(HubPushMixin, GRPOTrainer):
    pass


@pytest.fixture
def prompts() -> Dataset:
    """Of several lengths."""
    return Dataset.from_dict({"prompt": ["Da:", "Db" * 5 + ":", "C" * 3, "Dd+1+2:"] * 4})


@pytest.fixture
def make_plain(tmp_path, tiny_model_dir, tokenizer, prompts) -> Callable:
    """A trainer of the class on so many prompts; keyword arguments go to its config."""

    def make(trainer_class: type, config_class: type = GRPOConfig, rows: int = 4, **overrides):
        options = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
        args = config_class(**(SMALL_RUN | options | overrides))
        dataset = prompts.select(range(rows))
        return trainer_class(
            str(tiny_model_dir), letters_reward, args, train_dataset=dataset, processing_class=tokenizer
        )

    return make


# Padding


@pytest.mark.parametrize(("loss_type", "beta"), [("grpo", 0.0), ("dr_grpo", 0.1), ("dapo", 0.0), ("cispo", 0.1)])
def test_a_step_without_padding_is_grpos(make_plain, loss_type, beta):
    options = {"loss_type": loss_type, "beta": beta, "model_init_kwargs": {"dtype": torch.float64}, **SHAPE}
    theirs, padded = step_gradients(make_plain(GRPOTrainer, **options))
    ours, trimmed = step_gradients(make_plain(PaddingFreeTrainer, PaddingFreeConfig, **options))
    assert_same_steps(ours, theirs)
    assert sum(b * (p + c) for b, p, c in trimmed) < 0.9 * sum(b * (p + c) for b, p, c in padded)


def test_a_packed_step_is_grpos(make_plain):
    theirs, _ = step_gradients(make_plain(GRPOTrainer, beta=0.1, **SHAPE))
    ours, _ = step_gradients(make_plain(PaddingFreeTrainer, PaddingFreeConfig, beta=0.1, packed_forward=True, **SHAPE))
    assert_same_steps(ours, theirs, tolerance=1e-5)


def test_rows_without_advantage_are_left_out_of_a_plain_run(make_plain):
    options = {"model_init_kwargs": {"dtype": torch.float64}, "scale_rewards": "none", **SHAPE}

    def with_reward(trainer):
        trainer.reward_funcs = [lambda prompts, completions, **kwargs: [float(len(p) % 2 == 0) for p in prompts]]
        return trainer

    theirs, _ = step_gradients(with_reward(make_plain(GRPOTrainer, **options)))
    ours, shapes = step_gradients(
        with_reward(make_plain(PaddingFreeTrainer, PaddingFreeConfig, skip_zero_advantages=True, **options))
    )
    assert_same_steps(ours, theirs)  # no group has rewards of two kinds
    assert [b for b, _, _ in shapes] == [1] * 4


def test_trimming_can_be_turned_off(make_plain):
    options = {"model_init_kwargs": {"dtype": torch.float64}, **SHAPE}
    _, padded = step_gradients(make_plain(GRPOTrainer, **options))
    _, ours = step_gradients(make_plain(PaddingFreeTrainer, PaddingFreeConfig, trim_padding=False, **options))
    assert ours == padded


def test_the_hook_says_which_rows_are_scored(make_plain, monkeypatch):
    class EveryOther(PaddingFreeTrainer):
        def _rows_to_score(self, rows):
            assert self._phase == "generation"
            return list(range(0, rows, 2))

    trainer = make_plain(EveryOther, PaddingFreeConfig, beta=0.1, **SHAPE)
    forward, scored = GRPOTrainer._get_per_token_logps_and_entropies, []

    def counting(self, model, input_ids, *args, **kwargs):
        scored.append((model is self.ref_model, len(input_ids)))
        return forward(self, model, input_ids, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    trainer.model.train()
    output = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(4)])
    for is_reference in (True, False):
        assert sum(n for reference, n in scored if reference == is_reference) == 8
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        assert (output[key][1::2] == 0).all()
        assert (output[key][::2] < 0).any(1).all()
    assert trainer._phase == "loss"


def test_an_error_in_a_generation_ends_its_phase(make_plain):
    def broken(**kwargs):
        raise RuntimeError("broken")

    trainer = make_plain(PaddingFreeTrainer, PaddingFreeConfig)
    trainer.reward_funcs = [broken]
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert trainer._phase == "loss"


@pytest.mark.parametrize("option", [{"beta": 0.1}, {"loss_type": "bnpo"}, {"trim_padding": False}])
def test_a_plain_config_refuses_to_skip_rows_that_others_use(tmp_path, option):
    [(name, _)] = option.items()
    with pytest.raises(ValueError, match=f"skip_zero_advantages=True cannot be combined with {name}="):
        PaddingFreeConfig(str(tmp_path), skip_zero_advantages=True, **(SMALL_RUN | option))


# Checkpoints


SAVING = {"rows": 16, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}


def test_plain_checkpoints_are_whole_and_a_run_goes_on_from_the_newest(make_plain, tmp_path):
    whole = make_plain(WholeCheckpointTrainer, max_steps=4, output_dir=str(tmp_path / "whole"), **SAVING)
    whole.train(resume_from_checkpoint="auto")
    make_plain(WholeCheckpointTrainer, max_steps=3, save_total_limit=2, **SAVING).train()
    out = tmp_path / "out"
    assert {path.name: damage(path) for path in checkpoints(out)} == {"checkpoint-3": None, "checkpoint-2": None}
    (out / "checkpoint-3" / "optimizer.pt").unlink()
    resumed = make_plain(WholeCheckpointTrainer, max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert [line["step"] for line in resumed.state.log_history if "loss" in line] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_subclass_keeps_is_in_the_checkpoint_or_nothing_is(make_plain, tmp_path):
    class Counting(WholeCheckpointTrainer):
        counted, fails = 0, False

        def _save_own_state(self, checkpoint):
            if self.fails:
                raise OSError("no space left")
            (checkpoint / "counted.json").write_text(json.dumps(self.state.global_step))

        def _load_own_state(self, checkpoint):
            self.counted = json.loads((checkpoint / "counted.json").read_text())

    make_plain(Counting, max_steps=2, **SAVING).train()
    resumed = make_plain(Counting, max_steps=3, **SAVING)
    resumed.fails = True
    with pytest.raises(OSError, match="no space left") as caught:
        resumed.train(resume_from_checkpoint="auto")
    assert resumed.counted == 2
    assert caught.value.__notes__ == ["Raised while checkpoint-3 was saved. Earlier checkpoints are as they were."]
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2", "checkpoint-1"]
    assert not (out / UNFINISHED_DIR).exists()
    assert resumed._get_output_dir(None) == str(out)


# The Hub


def test_a_plain_trainer_that_cannot_push_trains_and_says_what_is_missing(make_plain, tmp_path, caplog):
    trainer = make_plain(HubPushTrainer, HubPushConfig, push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.push_to_hub() is None
    assert "HF_HUB_OFFLINE is set" in caplog.text
    record = json.loads((tmp_path / "out" / "_hub.json").read_text())
    assert [push["source"] for push, _ in record["missing"]] == ["."]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GRPO" in card
    assert "LUFFY" not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [({"merge_and_push": True}, "merge_and_push=True does nothing"), ({"hub_retry_seconds": -1}, "a number of sec")],
)
def test_a_plain_config_refuses_what_does_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        HubPushConfig(str(tmp_path), **SMALL_RUN, **options)


@pytest.mark.slow
def test_a_plain_trainer_pushes_its_model_and_its_checkpoints(tiny_model_dir, tmp_path):
    with HubServer() as hub:
        result = subprocess.run(
            [sys.executable, "-m", "tests.run_plain_push", tiny_model_dir, tmp_path / "plain"],
            capture_output=True, text=True, timeout=HUNG, cwd=Path(__file__).parents[1], check=False,
            env=os.environ | hub.environment(),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"PUSHED {hub.url}/tester/plain True" in result.stdout
        repo = hub.model("plain")
        assert {"main", "step-1", "step-2"} <= repo.branches.keys()
        for branch in ("main", "step-1", "step-2"):
            assert {"model.safetensors", "config.json", "README.md"} <= repo.at(branch).keys()
            assert "optimizer.pt" not in repo.at(branch)
        assert [content for content in hub.contents() if TOKEN.encode() in content] == []


# Evaluation sets


def test_the_rewards_of_a_set_have_its_name(make_plain, prompts):
    trainer = make_plain(EvaluationSetsTrainer, per_device_eval_batch_size=8, num_generations_eval=2)
    trainer.model.eval()
    metrics = trainer.evaluate({"a": prompts.select(range(4)), "b_c": prompts.select(range(4, 8))})
    assert {"eval_a_loss", "eval_a_reward", "eval_b_c_loss", "eval_b_c_reward", "eval_b_c_entropy"} <= metrics.keys()
    assert all(key.startswith(("eval_a_", "eval_b_c_")) for key in metrics if key.startswith("eval"))
    assert "eval_reward" in trainer.evaluate(prompts.select(range(4)))
