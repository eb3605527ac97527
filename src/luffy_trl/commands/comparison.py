"""A method's stage in this process, on a tiny model: the demo's and the learning benchmark's runs.

`luffy-trl compare` runs the same stages as commands of their own. Here a run takes less time than a command's imports.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..comparing.methods import Stage
from ..config import LuffyConfig
from ..tasks.letter_walk import letter_walk_reward
from ..trainer import LuffyTrainer


PROMPTS_PER_STEP, GROUP_SIZE = 8, 8


def make_trainer(
    stage: Stage,
    base: str | Path,
    train_dataset: Dataset,
    output_dir: str | Path,
    seed: int,
    steps: int,
    learning_rate: float,
    callbacks: list[TrainerCallback],
    max_completion_length: int,
    reward: Callable = letter_walk_reward,
    environment_factory: Callable | None = None,
    **flags: Any,
) -> LuffyTrainer | SFTTrainer:
    """A trainer of the stage on the CPU, quiet, with a constant learning rate; `flags` are more of its fields.

    SFT takes one demonstration a prompt, and as many prompts a step as the others; prompts without one are left out.
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
    if stage.command == "sft":
        trainer = SFTTrainer(
            str(base),
            args=SFTConfig(per_device_train_batch_size=PROMPTS_PER_STEP, **(common | dict(stage.fields) | flags)),
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
            LuffyConfig(**(common | fields | dict(stage.fields) | flags)),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            environment_factory=environment_factory,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer
