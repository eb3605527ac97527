"""Generation of LuffyTrainer against TRL's GRPOTrainer at the same group size, with real sampling.

A demonstrated row is not sampled, so one of eight saves an eighth of the rollouts. Every rollout has the same length
here (EOS is forbidden until then), so that both do the same work per row. The two alternate; medians are reported.

    python benchmarks/generation.py
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import datasets
import torch
from measuring import in_turn, spread, watched_machine, write_record
from recorded import Workload, make_model, make_tokenizer, reward, to_text
from tqdm import tqdm
from transformers import logging
from trl import GRPOConfig, GRPOTrainer

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.reporting.tables_and_curves import text_table


def make_trainer(trainer_class: type, config_class: type, groups: list[dict], args, directory: str, **more):
    rows = [
        {
            "prompt": to_text(group["prompt"]),
            "demonstrations": [to_text(ids[:length]) for ids in group["demonstrations"]],
        }
        for group in groups
        for length in [args.tokens - 1]
    ]
    config = config_class(
        output_dir=directory,
        num_generations=args.group_size,
        per_device_train_batch_size=args.prompts * args.group_size,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        shuffle_dataset=False,
        report_to="none",
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda",
        **more,
    )
    trainer = trainer_class(
        make_model(args.device, "sdpa"),
        reward,
        config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    trainer.model.train()
    return trainer


def one_generation(trainer: GRPOTrainer) -> float:
    """Seconds from a batch's prompts to its scored completions."""
    rows = [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    start = time.perf_counter()
    trainer._generate_and_score_completions(rows)
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--demonstrations", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024 if on_gpu else 96, help="of every rollout")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    args = parser.parse_args()
    args.device = "cuda" if on_gpu else "cpu"
    logging.set_verbosity_error()
    datasets.disable_progress_bars()

    groups = Workload(args.prompts, args.group_size, args.demonstrations).groups()
    seconds = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory, watched_machine() as machine:
        luffy_options = {"num_demonstrations": args.demonstrations}
        trainers = {
            "TRL": make_trainer(GRPOTrainer, GRPOConfig, groups, args, directory),
            "LUFFY": make_trainer(LuffyTrainer, LuffyConfig, groups, args, directory, **luffy_options),
        }
        turns = in_turn(list(trainers), args.runs + 1)
        for run, name in tqdm(turns, desc="Generations of both trainers", unit="generation"):
            took = one_generation(trainers[name])
            if run > 0:  # the first is a warm-up
                seconds[name].append(took)
    results = {name: spread(seconds[name]) for name in trainers}
    rows = [[name, f"{r['median']:.2f}", f"{r['min']:.2f}-{r['max']:.2f}"] for name, r in results.items()]
    print(text_table(["generation", "s", "min-max"], rows))
    print(f"ratio {results['LUFFY']['median'] / results['TRL']['median']:.2f}")
    if args.output:
        write_record(args.output, args, machine, results, ("torch", "trl", "transformers"))


if __name__ == "__main__":
    main()
