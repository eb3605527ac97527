"""The methods that are compared with each other: one trainer, one set of flags each, on tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import LuffyConfig
from ..tasks.letter_walk import letter_walk_reward
from ..trainer import LuffyTrainer


PROMPTS_PER_STEP, GROUP_SIZE = 8, 8

# Method -> the fields of LuffyConfig in which it differs from LUFFY. SFT is TRL's SFTTrainer.
METHODS: dict[str, dict[str, Any]] = {
    "GRPO": {"num_demonstrations": 0},  # TRL's, bit for bit
    "mixed policy": {"shaping": "identity"},
    "LUFFY": {},
    "RL + SFT loss": {"demonstration_loss": "sft", "advantage_baseline": "on_policy"},
    "prefixes": {"prefix_strategy": "uniform"},
    "success gate": {"success_gate": 0.0},
}


def make_trainer(
    method: str,
    base: str | Path,
    train_dataset: Dataset,
    output_dir: str | Path,
    seed: int,
    steps: int,
    learning_rate: float,
    callbacks: list[TrainerCallback],
    max_completion_length: int,
    reward: Callable = letter_walk_reward,
    **flags: Any,
) -> LuffyTrainer | SFTTrainer:
    """A trainer of the method on the CPU, quiet, with a constant learning rate; `flags` are more of its fields.

    SFT takes one demonstration a prompt, and as many prompts a step as the others; prompts without one are left out.

    Raises:
        KeyError: if there is no such method.
    """
    common: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer: LuffyTrainer | SFTTrainer
    if method == "SFT":
        trainer = SFTTrainer(
            str(base),
            args=SFTConfig(per_device_train_batch_size=PROMPTS_PER_STEP, **common, **flags),
            train_dataset=train_dataset.filter(lambda row: row["completion"] is not None),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    else:
        fields = {
            "num_generations": GROUP_SIZE,
            "per_device_train_batch_size": PROMPTS_PER_STEP * GROUP_SIZE,
            "max_completion_length": max_completion_length,
        }
        trainer = LuffyTrainer(
            str(base),
            reward,
            LuffyConfig(**(common | fields | METHODS[method] | flags)),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer
