"""Launched by test_replay.py on two processes: train with replay, load the checkpoint; print what was kept."""

import json
import sys
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from run_two_processes import leave, letters_reward
from transformers import AutoTokenizer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.tasks.letter_walk import split_walks, to_dataset


def often_solved(completions: list, **kwargs) -> list[float]:
    """1 or above for about half of all completions."""
    return [
        reward + (ord(text[0]) % 2 if text else 0)
        for reward, text in zip(letters_reward(completions), completions, strict=True)
    ]


def make_trainer(model_dir: str, output_dir: str, max_steps: int) -> LuffyTrainer:
    args = LuffyConfig(
        output_dir=output_dir, num_generations=4, per_device_train_batch_size=8, max_completion_length=16,
        max_steps=max_steps, learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, use_cpu=True,
        bf16=False, report_to="none", save_steps=8, disable_tqdm=True, demonstration_source="replay",
        replay_start=0.0,
    )  # fmt: skip
    walks = to_dataset(split_walks(train_size=24, test_size=1, length=4)["train"])
    return LuffyTrainer(
        model_dir,
        often_solved,
        args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in walks]),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )


def kept(trainer: LuffyTrainer) -> list:
    """(row and tokens of the trajectories, retired prompts) of each process."""
    buffer = trainer._source.buffer
    rows = [(t.row, t.token_ids.hex()) for t in buffer._trajectories.values()]
    return gather_object([(rows, sorted(buffer.retired))])


def main(model_dir: str, output_dir: str) -> None:
    trainer = make_trainer(model_dir, output_dir, max_steps=8)
    trainer.train()
    other = make_trainer(model_dir, output_dir, max_steps=8)
    other._source.load(
        Path(output_dir) / "checkpoint-8", other.accelerator.process_index, other.accelerator.num_processes
    )
    trained, loaded = kept(trainer), kept(other)
    if trainer.is_world_process_zero():
        log = [line for line in trainer.state.log_history if "loss" in line]
        print("RESULT " + json.dumps({"trained": trained, "loaded": loaded, "log": log}))
    leave(trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
