"""Memory and time of a full replay buffer: 100,000 trajectories of 2,000 tokens of 25,000 prompts.

Memory is what the process has more of, resident, than before the buffer was filled; a fifth of the trajectories is
then replaced, to see what freed memory leaves behind. Time is that of one generation's calls: choose the groups,
record their results, keep the solved half of the rollouts. It is taken for a generation of the paper's size (128
prompts x 8) by itself, and for 2 prompts x 8 within the steps of a LuffyTrainer with this very buffer, on a small
model on the CPU.

    python benchmarks/replay.py
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from measuring import spread, watched_machine
from tqdm import tqdm, trange
from transformers import Qwen2Config, Qwen2ForCausalLM

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl import trainer as trainer_module
from luffy_trl.demonstrations.encoding import ROW_COLUMN
from luffy_trl.demonstrations.replay import ReplayBuffer, Trajectory
from luffy_trl.demonstrations.sources import ReplaySource
from luffy_trl.tasks.letter_walk import build_tokenizer


GROUP = 8


def resident() -> int:
    """Bytes of this process in memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def fill(buffer: ReplayBuffer, number: int, prompts: int, length: int, rng: np.random.Generator) -> None:
    for i in trange(number, desc="Filling the buffer", unit=" trajectories"):
        row = i % prompts
        buffer.record([row], [int(rng.integers(0, GROUP))], [GROUP])
        logps = -rng.exponential(0.5, length).astype(np.float32)
        buffer.add(Trajectory.of(row, rng.integers(0, 46, length), logps, float(rng.random())))


def half_solved(completions, **kwargs) -> list[float]:
    return [float(random.random() < 0.5) for _ in completions]


def paper_size_seconds(source: ReplaySource, length: int, rng: np.random.Generator) -> float:
    """One generation of 128 prompts x 8, half of the rollouts solved."""
    rows = [source.dataset[i] for i in range(128) for _ in range(GROUP)]
    ids, logps = rng.integers(0, 46, length), -np.ones(length, np.float32)
    start = time.perf_counter()
    placement = source.place(rows, GROUP, 1)
    numbers = [row[ROW_COLUMN] for row in placement.rows]
    source.record(numbers[::GROUP], [GROUP // 2] * 128, [GROUP] * 128)
    for number in numbers[::2]:
        source.remember(number, ids, logps, 1.0)
    return time.perf_counter() - start


class Timed(LuffyTrainer):
    """Adds up the seconds in the source, and notes them and the step's."""

    def training_step(self, *args, **kwargs):
        self.in_source, start = 0.0, time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.steps.append((time.perf_counter() - start, self.in_source))
        return loss

    def watch(self) -> None:
        self.steps = []
        for name in ("place", "record", "remember", "metrics"):
            setattr(self._source, name, self._timed(getattr(self._source, name)))
        trainer_module.remember_solved = self._timed(trainer_module.remember_solved, outer=True)

    def _timed(self, function, outer: bool = False):
        def timed(*args, **kwargs):
            before, start = self.in_source, time.perf_counter()
            result = function(*args, **kwargs)
            # what an outer call takes holds its inner ones
            self.in_source = (before if outer else self.in_source) + time.perf_counter() - start
            return result

        return timed


def make_trainer(output_dir: str, prompts: int, length: int) -> Timed:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    args = LuffyConfig(
        output_dir=output_dir, num_generations=GROUP, per_device_train_batch_size=16, max_completion_length=length,
        generation_kwargs={"min_new_tokens": length}, demonstration_source="replay", max_steps=2, use_cpu=True,
        bf16=False, gradient_checkpointing=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": [f"D{i % 9}+{i % 7}:" for i in range(prompts)]})
    model = Qwen2ForCausalLM(config)
    return Timed(model, half_solved, args, train_dataset=dataset, processing_class=tokenizer)


def count(bar: tqdm) -> None:
    """For a hook, which must return nothing."""
    bar.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=25_000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "replay_cpu.json")
    options = parser.parse_args()
    random.seed(0)
    rng = np.random.default_rng(0)

    with tempfile.TemporaryDirectory() as directory, watched_machine() as machine:
        trainer = make_trainer(directory, options.prompts, options.tokens)
        buffer = trainer._source.buffer
        buffer.capacity = options.trajectories
        before = resident()
        fill(buffer, options.trajectories, options.prompts, options.tokens, rng)
        filled = resident() - before
        fill(buffer, options.trajectories // 5, options.prompts, options.tokens, rng)
        replaced = resident() - before

        print("Saving and loading the buffer", file=sys.stderr)
        start = time.perf_counter()
        trainer._source.save(Path(directory), 0, 1)
        saving, peak = time.perf_counter() - start, resident() - before
        start = time.perf_counter()
        trainer._source.load(Path(directory), 0, 1)
        loading = time.perf_counter() - start
        buffer.started = True

        rounds = trange(5, desc="Generations of the paper's size", unit="generation")
        paper_size = spread([paper_size_seconds(trainer._source, options.tokens, rng) for _ in rounds])
        trainer.watch()
        # a step takes minutes, most of them one token after the other
        with tqdm(desc="Forward passes of two steps", unit="") as bar:
            trainer.model.register_forward_hook(lambda *_: count(bar))
            trainer.train()
        steps = [step for step, _ in trainer.steps]
        in_source = [source for _, source in trainer.steps]

    results = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "others": asdict(machine),
        "trajectories": options.trajectories,
        "tokens_each": options.tokens,
        "prompts": options.prompts,
        "resident_bytes_filled": filled,
        "resident_bytes_after_a_fifth_was_replaced": replaced,
        "resident_bytes_after_a_save": peak,
        "save_seconds": round(saving, 2),
        "load_seconds": round(loading, 2),
        "paper_size_generation_seconds": round(paper_size["median"], 4),
        "paper_size_generation_spread": paper_size,
        "step_seconds": [round(x, 2) for x in steps],
        "source_seconds_a_step": [round(x, 4) for x in in_source],
        "share_of_a_step": round(statistics.median(in_source) / statistics.median(steps), 5),
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
