"""The update phase and whole steps of LuffyTrainer against TRL's GRPOTrainer, on the very same groups.

All are fed recorded completions instead of sampling, see `recorded.py`. What is timed is everything after sampling:
scoring, advantages, forward and backward passes, optimizer. Trainers of several configurations (`configurations.py`)
alternate in one process; medians are reported, with their spread, and a warning where the machine was not idle.

On a CPU all lengths are divided by 16, with a small model; on a GPU nothing is, in bf16, with a randomly initialised
model of Qwen2.5-1.5B's size. FLOPs are counted in a step that is not timed, by PyTorch's counter, with the kernels
that run; `update_flops.py` counts them for larger models.

With `--whole` all really sample as well, rows that end where the recorded rollouts do, and only then put the recorded
completions in place: whole steps, on the very same groups. TRL's trainer samples every row of a group.

    python benchmarks/update_phase.py                       # the table
    python benchmarks/update_phase.py --whole               # sampling and update phase together
    python benchmarks/update_phase.py --lengths equal       # all rows of one length: no padding to save
    python benchmarks/update_phase.py --lengths long_prompt # prompts of 4,096 tokens, completions of about 1,000
    python benchmarks/update_phase.py --curve               # cost against demonstrations, group size and length
"""

import argparse
import dataclasses
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import torch
from configurations import CONFIGURATIONS
from measuring import in_turn, spread, watched_machine, write_record
from recorded import LONGEST, MEANS, Workload, forward_and_backward, make_model, make_trainer, one_step
from torch.utils.flop_counter import FlopCounterMode, bmm_flop
from tqdm import tqdm
from transformers import logging
from trl import GRPOTrainer
from trl.trainer.utils import compute_flops_per_token, get_peak_flops

from luffy_trl.reporting.tables_and_curves import text_table


PACKAGES = ("torch", "trl", "transformers")


def cpu_attention_flops(query, key, value, products: int, is_causal: bool) -> int:
    """Of PyTorch's attention on a CPU, which skips the future, but computes all that a mask may hide."""
    batch, heads, queries, size = query
    keys = key[2]
    whole = products * bmm_flop((batch * heads, queries, size), (batch * heads, size, keys))
    return whole * (queries + 1) // (2 * keys) if is_causal else whole


def _forward_flops(query, key, value, dropout=0.0, is_causal=False, **_) -> int:
    return cpu_attention_flops(query, key, value, products=2, is_causal=is_causal)


def _backward_flops(gradient, query, key, value, out, log_sum_exp, dropout, is_causal, **_) -> int:
    return cpu_attention_flops(query, key, value, products=5, is_causal=is_causal)


CPU_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


def counted_flops(trainer: GRPOTrainer) -> int:
    """Of one step, with a CPU's kernels."""
    with FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS) as counter:
        forward_and_backward(trainer)
    return counter.get_total_flops()


class Passes:
    """What went through a model: passes, tokens, and how many of them were no padding."""

    def __init__(self, model: torch.nn.Module):
        self.passes = self.real = self.all = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, positional, inputs):
        self.passes += 1
        self.all += inputs["input_ids"].numel()
        mask = inputs.get("attention_mask")
        self.real += (
            int(mask.sum()) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else inputs["input_ids"].numel()
        )


def trainers_of(args: argparse.Namespace, work: Workload, directory: str) -> dict[str, GRPOTrainer]:
    return {
        name: make_trainer(name, work, make_model(args.device, attention_of(name, args)), directory, args.whole)
        for name in args.configurations
    }


def attention_of(name: str, args: argparse.Namespace) -> str:
    """On a CPU there is no flash attention, and `sdpa` does the same for packed rows."""
    if args.attention is not None:
        return args.attention
    attention = CONFIGURATIONS[name].attention
    return "sdpa" if args.device == "cpu" and attention == "flash_attention_2" else attention


def compare(args: argparse.Namespace, work: Workload, description: str = "Steps of all trainers") -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as directory:
        trainers = trainers_of(args, work, directory)
        counts: dict[str, Passes] = {}
        seconds, sampling = defaultdict(list), defaultdict(list)
        for run, name in tqdm(in_turn(list(trainers), args.runs + 1), desc=description, unit="step"):
            trainer = trainers[name]
            if run == 1:  # the first is a warm-up
                counts[name] = Passes(trainer.model)
            sampled_before = trainer.sampling_seconds
            took = one_step(trainer)
            if run > 0:
                seconds[name].append(took)
                sampling[name].append(trainer.sampling_seconds - sampled_before)
        results: dict[str, dict] = {name: {"seconds": spread(values)} for name, values in seconds.items()}
        for name in results:
            if args.whole:  # the count of tokens would be of sampling, too
                results[name]["sampling_seconds"] = statistics.median(sampling[name])
            else:
                results[name] |= of_passes(args, counts[name], trainers[name], results[name]["seconds"]["median"])
    return {name: results[name] for name in args.configurations}


def of_passes(args: argparse.Namespace, counts: Passes, trainer: GRPOTrainer, median: float) -> dict[str, Any]:
    passes, real, everything = (count / args.runs for count in (counts.passes, counts.real, counts.all))
    found = {
        "micro_batches": passes,
        "real_tokens": real,
        "tokens": everything,
        "padding": 1 - real / everything,
        "tokens_per_second": real / median,
    }
    if args.device == "cuda":
        per_token = compute_flops_per_token(trainer.model.config, LONGEST // 2)
        peak = get_peak_flops(torch.cuda.get_device_name(0), "bf16")
        found["mfu"] = real * per_token / median / peak if peak else math.nan
    elif trainer.model.config._attn_implementation != "flex_attention":  # PyTorch takes its blocks for dense
        found["flops"] = counted_flops(trainer)
    return found


def peak_memory(name: str) -> float:
    """Peak memory of two steps of one trainer in a process of its own, in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def run_only(args: argparse.Namespace, work: Workload) -> None:
    args.configurations = [args.only]
    with tempfile.TemporaryDirectory() as directory:
        [trainer] = trainers_of(args, work, directory).values()
        for _ in range(2):
            one_step(trainer)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def in_words(seconds: dict[str, Any]) -> list[str]:
    return [f"{seconds['median']:.2f}", f"{seconds['min']:.2f}-{seconds['max']:.2f}"]


def print_whole_steps(results: dict[str, dict]) -> None:
    rows = [[name, *in_words(r["seconds"]), f"{r['sampling_seconds']:.2f}"] for name, r in results.items()]
    print(text_table(["whole step", "s/step", "min-max", "of which sampling"], rows))
    print_speed_ups(results)


def print_table(results: dict[str, dict]) -> None:
    rows = [
        [
            name, *in_words(r["seconds"]), f"{r['micro_batches']:.0f}", f"{r['tokens']:,.0f}",
            f"{100 * r['padding']:.1f}%", f"{r['tokens_per_second']:,.0f}", f"{r['memory_mib']:,.0f}",
            f"{r['flops'] / 1e12:.2f}" if "flops" in r else "-", f"{100 * r['mfu']:.1f}%" if "mfu" in r else "-",
        ]
        for name, r in results.items()
    ]  # fmt: skip
    header = [
        "update phase",
        "s/step",
        "min-max",
        "passes",
        "tokens",
        "padding",
        "real tok/s",
        "peak MiB",
        "TFLOPs",
        "MFU",
    ]
    print(text_table(header, rows))
    print_speed_ups(results)


def print_speed_ups(results: dict[str, dict]) -> None:
    first, *others = results
    for name in others:
        line = f"speed-up of {name} over {first}: {ratio(results, first, name):.2f}x"
        if "flops" in results[first] and "flops" in results[name]:
            line += f", of {results[first]['flops'] / results[name]['flops']:.2f} times fewer FLOPs"
        print(line)


def ratio(results: dict[str, dict], first: str, name: str) -> float:
    return results[first]["seconds"]["median"] / results[name]["seconds"]["median"]


def curve(args: argparse.Namespace, work: Workload) -> list[dict]:
    """Speed-up and padding against demonstrations per group, group size, and length."""
    points = []
    for name, values in (("demonstrations", (0, 1, 2, 4)), ("group_size", (4, 8, 16)), ("divide", (64, 32, 16))):
        for value in values:
            varied = dataclasses.replace(work, **{name: value})
            if name == "group_size":  # as many rows
                varied = dataclasses.replace(varied, prompts=work.prompts * work.group_size // value)
            results = compare(args, varied, description=f"{name}={value}")
            points.append({"varied": name, "value": value, "results": results})
            told = [
                f"{c} {r['seconds']['median']:.2f} s, padding {100 * r['padding']:.1f}%" for c, r in results.items()
            ]
            print(f"{name}={value}: {'; '.join(told)}", flush=True)
    return points


def parse(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="groups a step (default: 16)")
    parser.add_argument("--group_size", type=int, default=8, help="rows a group (default: 8)")
    parser.add_argument("--demonstrations", type=int, default=1, help="of a group's rows (default: 1)")
    parser.add_argument("--micro_batch", type=int, default=4, help="rows a micro-batch (default: 4)")
    parser.add_argument("--runs", type=int, default=5, help="counted steps of each trainer (default: 5)")
    parser.add_argument("--lengths", choices=list(MEANS), default="paper", help="default: paper")
    parser.add_argument("--divide", type=int, default=1 if on_gpu else 16, help="of lengths (default: 16 on a CPU)")
    parser.add_argument("--attention", help="default: the configuration's")
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=list(CONFIGURATIONS),
        default=["TRL", "trimmed", "budget", "shared prompts"],
        help="of configurations.py; the first is what the others are compared with",
    )
    parser.add_argument("--whole", action="store_true", help="whole steps: sample as well")
    parser.add_argument("--curve", action="store_true", help="vary demonstrations, group size and length")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(CONFIGURATIONS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = "cuda" if on_gpu else "cpu"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    work = Workload(
        args.prompts, args.group_size, args.demonstrations, args.micro_batch, args.lengths, args.divide, args.seed
    )
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if args.only:
        run_only(args, work)
        return
    with watched_machine() as machine:
        if args.curve:
            results: Any = curve(args, work)
        elif args.whole:
            results = compare(args, work)
            print_whole_steps(results)
        else:
            # First, while this process is small: a new process's peak begins with its parent's
            names = tqdm(args.configurations, desc="Peak memory of two steps", unit="trainer")
            memory = {name: peak_memory(name) for name in names}
            results = compare(args, work)
            for name in results:
                results[name]["memory_mib"] = memory[name]
            print_table(results)
    if args.output:
        write_record(args.output, args, machine, results, PACKAGES)


if __name__ == "__main__":
    main()
