"""What a run says of itself before and after."""

import json
import logging

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from luffy_trl.commands.cli import main
from luffy_trl.commands.summary import (
    Parameters,
    StartSummary,
    batch_arithmetic,
    count_parameters,
    end_summary,
    memory,
    off_policy,
    start_summary,
    state_bytes,
)
from luffy_trl.runs.quiet import quiet_libraries


@pytest.fixture(autouse=True)
def bars_as_before():
    yield
    transformers_logging.enable_progress_bar()


def test_a_run_says_what_it_does_and_what_it_did(tiny_model_dir, tmp_path, capsys):
    out = tmp_path / "an out"
    arguments = {
        "model_name_or_path": tiny_model_dir, "dataset_name": "letter_walk", "output_dir": out, "use_cpu": True,
        "bf16": False, "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "max_completion_length": 16, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    main(["train", *[str(part) for k, v in arguments.items() for part in (f"--{k}", v)]])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert f"{tiny_model_dir}: " in lines[start]
    assert lines[start].endswith("parameters, all trained")
    assert lines[start + 1 : start + 6] == [
        "data        letter_walk: 2,048 prompts, 2,048 with a demonstration",
        "group       4 completions a prompt = 3 rollouts + 1 demonstration, up to 16 tokens",
        "step        1 process x 8 rows x 2 micro-batches = 16 rows, 4 prompts; a generation makes 16 rows, 4 prompts",
        "run         2 optimizer steps, at most 1 epoch",
        "off-policy  loss -A f(r), f regularized, gamma 0.1, behavior probability 1; baseline: whole group",
    ]
    state = json.loads((out / "trainer_state.json").read_text())
    rewards = [line["on_policy/reward"] for line in state["log_history"] if "on_policy/reward" in line]
    assert f"Reward of rollouts: {rewards[0]:.3f} when first logged, {rewards[-1]:.3f} at the end" in lines
    assert lines[-1] == f"Curves: luffy-trl report '{out}'"
    steps = [line for line in state["log_history"] if "step_time" in line]
    assert len(steps) == 2
    for line in steps:  # phases are parts of the step
        assert 0 < line["time/generation"] < line["step_time"]
        assert 0 < line["time/rewards"] < line["step_time"]


def test_arithmetic_of_several_processes_and_steps_a_generation(config):
    args = config(gradient_accumulation_steps=2, steps_per_generation=8, num_iterations=2)
    args.generation_batch_size = 3 * 8 * 8  # on three processes
    assert batch_arithmetic(args, 3) == (
        "3 processes x 8 rows x 2 micro-batches = 48 rows, 12 prompts; a generation makes 192 rows, 48 prompts, "
        "each trained 2 times"
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shaping": "power"}, "loss -A f(r), f power, exponent 0.5, behavior probability 1; baseline: whole group"),
        ({"demonstration_loss": "sft", "advantage_baseline": "on_policy"}, "loss -log pi; baseline: rollouts"),
        (
            {
                "demonstration_loss": "chord_phi",
                "advantage_baseline": "on_policy",
                "demonstration_weight": 0.1,
                "rollout_weight": "complement",
                "demonstration_average": "token",
            },
            "loss -p (1 - p) log pi; weight 0.1 constant; rollouts weigh 1 less that; averaged apart, by token; "
            "baseline: rollouts",
        ),
        (
            {"shaping": "identity", "success_gate": 0.25, "prefix_strategy": "uniform", "demonstration_weight": 2.0},
            "loss -A f(r), f identity, behavior probability 1; weight 2 constant; prefixes uniform, 0 to 1 of the "
            "tokens; where at most 25% of the rollouts are solved; baseline: whole group",
        ),
    ],
)
def test_what_is_off_policy(fields, expected, config):
    assert off_policy(config(**fields), has_behavior_logps=False) == expected


def test_a_stream_has_no_number_of_epochs(make_trainer, walks):
    trainer = make_trainer(walks.to_iterable_dataset(), max_steps=3)
    trainer.state.max_steps = 3
    [run] = [line for line in start_summary(trainer, "walks").splitlines() if line.startswith("run ")]
    assert run.split() == ["run", "3", "optimizer", "steps"]


def test_a_function_may_bring_log_probs_or_not(config):
    args = config(demonstration_source="tests.test_summary.none_of")
    assert "behavior probability 1 unless the function gives log-probs" in off_policy(args, has_behavior_logps=True)


def none_of(row: dict) -> list:
    return []


def test_dropped_demonstrations_are_said(make_trainer, capsys):
    trainer = make_trainer(max_completion_length=8, demonstration_overflow="truncate", max_steps=1)
    trainer.add_callback(StartSummary(trainer, "walks"))
    trainer.train()
    out = capsys.readouterr().out
    cut = sum(trainer.train_dataset["demonstrations_truncated"])
    assert 0 < cut <= 16
    assert f"16 prompts, 16 with a demonstration; 0 demonstrations dropped and {cut} truncated as too long" in out


def test_a_summary_survives_what_is_missing(make_trainer, walks):
    trainer = make_trainer(gradient_checkpointing=True)
    trainer.model.config = PretrainedConfig()  # no sizes
    delattr(trainer.model.config, "_name_or_path")
    trainer.train_dataset = walks.add_column("demonstrations_usable", [1] * len(walks))  # of an encoder of one's own
    text = start_summary(trainer, "walks")
    assert "unnamed: " in text
    assert "walks: 16 prompts, 16 with a demonstration\n" in text
    assert "activations" not in text
    trainer.state.log_history = [
        {"on_policy/reward": None, "off_policy/reward": None, "eval_reward": None},
        {"on_policy/reward": 0.25, "eval_loss": 1.0},
        {"train_runtime": 61.0},
    ]
    text = end_summary(trainer)
    assert "Reward of rollouts: 0.250 when first logged, 0.250 at the end" in text
    assert "demonstrations" not in text
    assert "evaluation" not in text
    evaluated = {"eval_easy_reward": 0.5, "eval_easy_runtime": 1.0, "eval_hard_reward": 0.1, "eval_hard_runtime": 1.0}
    trainer.state.log_history = [evaluated, evaluated | {"eval_hard_reward": 0.3}]
    text = end_summary(trainer)
    assert "Reward in evaluation on easy: 0.500 at first, 0.500 at last" in text
    assert "Reward in evaluation on hard: 0.100 at first, 0.300 at last" in text
    trainer.state.log_history = []
    assert "0 optimizer steps done; this start took 0 s" in end_summary(trainer)


def test_completions_of_any_length(make_trainer, walks):
    rows = walks.remove_columns("completion")
    trainer = make_trainer(rows, num_demonstrations=0, max_completion_length=None, gradient_checkpointing=True)
    assert "4 completions a prompt = 4 rollouts, of any length" in start_summary(trainer, "walks")


def test_parameters_are_counted_where_they_are_frozen_packed_or_elsewhere():
    model = nn.Linear(10, 5)  # 50 + 5
    model.bias.requires_grad = False
    assert count_parameters(model) == Parameters(55, 50, trained_bytes=200, frozen_bytes=20)
    model.weight.data = torch.empty(0)
    model.weight.ds_numel = 50  # as ZeRO-3 leaves it
    assert count_parameters(model) == Parameters(55, 50, trained_bytes=200, frozen_bytes=20)
    Params4bit = type("Params4bit", (nn.Parameter,), {})  # noqa: N806 - bitsandbytes' name
    model.weight = Params4bit(torch.zeros(25, 1, dtype=torch.uint8), requires_grad=False)
    assert count_parameters(model) == Parameters(55, 0, trained_bytes=0, frozen_bytes=45)


def test_what_the_processes_share_by_stage():
    """A trained parameter in float32 is 4 + 4 + 8 bytes, in DeepSpeed's bf16 2 + 2 + 12."""
    parameters = Parameters(total=2000, trained=1000, trained_bytes=4000, frozen_bytes=800)
    each = [state_bytes(parameters, 8, stage, mixed=False) for stage in range(4)]
    assert each == [16800, 4000 + 4000 + 1000 + 800, 4000 + 500 + 1000 + 800, 16800 / 8]
    assert state_bytes(parameters, 8, 2, mixed=True) == 2000 + 800 + 250 + 1500
    half = Parameters(1000, 1000, trained_bytes=2000, frozen_bytes=0)
    assert state_bytes(half, 1, 0, mixed=False) == 8000


def test_memory_follows_the_formulas(make_trainer):
    trainer = make_trainer(gradient_checkpointing=True, beta=0.1)
    size = sum(p.numel() for p in trainer.model.parameters())
    rows = 8 * 2 * 16 * 32 * 4  # rows, layers, tokens, hidden, bytes
    expected = f"{size * 16 / 1e6:.2g} MB weights, gradients, optimizer + {size * 4 / 1e6:.2g} MB "
    expected += f"reference model + {rows / 1e6:.2g} MB activations"
    assert memory(trainer) == f"computed, a process: {expected} without the prompts'"


def test_only_known_noise_is_quiet():
    quiet_libraries()
    quiet_libraries()
    for name, noise in (
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU"),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: none"),
    ):
        logger = logging.getLogger(name)
        assert len(logger.filters) == 1
        assert not logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, noise, (), None))
        assert logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, "Out of memory", (), None))
