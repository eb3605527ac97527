"""The update phase and whole steps of LuffyTrainer against TRL's GRPOTrainer, on the very same groups.

Both trainers are fed recorded completions instead of sampling, demonstrations included: TRL by a minimal subclass
that only injects them, LuffyTrainer by the same subclass under it. What is timed is everything after sampling:
scoring, advantages, forward and backward passes, optimizer. The two alternate in one process; medians are reported.

Completion lengths follow the paper's: rollouts with a mean of 2,832 tokens, demonstrations with a mean of 4,500, none
above 8,192. On a CPU all lengths are divided by 16, with a small model; on a GPU nothing is, in bf16, with a randomly
initialised model of Qwen2.5-1.5B's size.

With `--whole` both really sample as well, rows that end where the recorded rollouts do, and only then put the recorded
completions in place: whole steps, on the very same groups. TRL's trainer samples every row of a group.

    python benchmarks/update_phase.py                      # the table
    python benchmarks/update_phase.py --whole              # sampling and update phase together
    python benchmarks/update_phase.py --lengths equal      # all rows of one length: no padding to save
    python benchmarks/update_phase.py --curve              # cost against demonstrations, group size and length
"""

import argparse
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, logging
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import compute_flops_per_token, get_peak_flops

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.reporting.tables_and_curves import text_table


ROLLOUT_MEAN, DEMONSTRATION_MEAN, LONGEST = 2832, 4500, 8192
SPREAD = 0.6  # of the logarithm of a length
VOCABULARY = 1000


class Replay(GRPOTrainer):
    """GRPOTrainer that is given its completions: `recorded` maps a prompt to them, in order.

    With `sampled_lengths`, as many tokens are sampled for real before that.
    """

    recorded: dict[tuple[int, ...], list[list[int]]]
    sampled_lengths: dict[tuple[int, ...], list[int]] | None = None
    sampling_seconds = 0.0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        nth: dict[tuple[int, ...], int] = defaultdict(int)
        rows = []
        for ids in map(tuple, prompt_ids):
            rows.append((ids, nth[ids]))
            nth[ids] += 1
        if self.sampled_lengths is not None:
            synchronize(self)
            start = time.perf_counter()
            lengths = [self.sampled_lengths[ids][k] for ids, k in rows]
            end_at = EndAt(torch.tensor(lengths), longest_prompt=max(map(len, prompt_ids)))
            self.model.generate = partial(type(self.model).generate, self.model, logits_processor=[end_at])
            super()._generate_single_turn(prompt_ids, *args, **kwargs)
            synchronize(self)
            self.sampling_seconds += time.perf_counter() - start
        return [self.recorded[ids][k] for ids, k in rows], None


class EndAt(LogitsProcessor):
    """EOS exactly as the last of each row's `lengths` (B,) tokens."""

    def __init__(self, lengths: torch.Tensor, longest_prompt: int):
        self.lengths, self.longest_prompt = lengths, longest_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = (self.lengths.to(scores.device) <= input_ids.size(1) - self.longest_prompt + 1).unsqueeze(1)  # (B, 1)
        is_eos = torch.arange(scores.size(1), device=scores.device) == 0  # (V,)
        return scores.masked_fill(is_eos != ends, -torch.inf)


class LuffyReplay(LuffyTrainer, Replay):
    """LuffyTrainer whose sampling is `Replay`'s."""


def length(rng: random.Random, mean: float, longest: int) -> int:
    """A log-normal length whose mean, but for the cut at `longest`, is `mean`."""
    return max(2, min(longest, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))


def make_groups(args: argparse.Namespace) -> list[dict]:
    """Prompts with their rollouts and demonstrations, as token ids. EOS is 0; rewards are in the first token."""
    rng, rng_of_more = random.Random(args.seed), random.Random(args.seed + 1)
    longest = LONGEST // args.divide

    def completion(mean: float, rng: random.Random = rng) -> list[int]:
        n = longest // 2 if args.lengths == "equal" else length(rng, mean / args.divide, longest)
        return [rng.randrange(2, VOCABULARY) for _ in range(n - 1)] + [0]

    return [
        {
            "prompt": [2 + i] + [rng.randrange(2, VOCABULARY) for _ in range(length(rng, 160 / args.divide, 64) + 3)],
            "rollouts": [completion(ROLLOUT_MEAN) for _ in range(args.group_size - args.demonstrations)],
            "demonstrations": [completion(DEMONSTRATION_MEAN) for _ in range(args.demonstrations)],
            # of the rollouts that TRL samples where LUFFY has demonstrations
            "more_lengths": [len(completion(ROLLOUT_MEAN, rng_of_more)) for _ in range(args.demonstrations)],
        }
        for i in range(args.prompts)
    ]


def reward(completion_ids, **kwargs) -> list[float]:
    """Of no meaning, but with advantages of every sign."""
    return [float(ids[0] % 2) for ids in completion_ids]


def make_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    if args.device == "cuda":  # Qwen2.5-1.5B's shape
        shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 16384}
    else:
        shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = Qwen2Config(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1, bos_token_id=None, **shape)
    config._attn_implementation = args.attention
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    return Qwen2ForCausalLM(config).to(args.device, dtype)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the i-th character of a private alphabet, so that ids survive the way through text."""
    vocabulary = {"<eos>": 0, "<pad>": 1, **{to_text([i]): i for i in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def to_text(ids: list[int]) -> str:
    return "".join(chr(0x4E00 + i) for i in ids if i > 1)


def make_trainer(name: str, groups: list[dict], args: argparse.Namespace, directory: str) -> GRPOTrainer:
    options = {
        "output_dir": directory,
        "num_generations": args.group_size,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.prompts * args.group_size // args.micro_batch,
        "max_completion_length": LONGEST // args.divide,
        "learning_rate": 1e-6,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "report_to": "none",
        "use_cpu": args.device == "cpu",
        "bf16": args.device == "cuda",
        "gradient_checkpointing": args.device == "cuda",
        "shuffle_dataset": False,
    }
    rows = [
        {"prompt": to_text(group["prompt"]), "demonstrations": [to_text(ids) for ids in group["demonstrations"]]}
        for group in groups
    ]
    dataset = datasets.Dataset.from_list(rows)
    model, tokenizer = make_model(args), make_tokenizer()
    if name == "TRL":
        trainer = Replay(model, reward, GRPOConfig(**options), train_dataset=dataset, processing_class=tokenizer)
        recorded = [g["rollouts"] + g["demonstrations"] for g in groups]
    else:
        packed = {"packed": True, "padded": False}.get(args.forward)
        config = LuffyConfig(num_demonstrations=args.demonstrations, packed_forward=packed, **options)
        config.trim_padding = True  # the default with demonstrations; asked for where the curve has none
        trainer = LuffyReplay(model, reward, config, train_dataset=dataset, processing_class=tokenizer)
        recorded = [g["rollouts"] for g in groups]
    trainer.recorded = {tuple(g["prompt"]): r for g, r in zip(groups, recorded, strict=True)}
    if args.whole:
        trainer.sampled_lengths = {tuple(g["prompt"]): [*map(len, g["rollouts"]), *g["more_lengths"]] for g in groups}
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.create_optimizer()
    trainer.model.train()
    return trainer


class TokenCount:
    """Tokens that went through a model, real and in all."""

    def __init__(self, model: torch.nn.Module):
        self.real = self.all = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, positional, inputs):
        self.all += inputs["input_ids"].numel()
        mask = inputs.get("attention_mask")
        self.real += inputs["input_ids"].numel() if mask is None else int(mask.sum())


def one_step(trainer: GRPOTrainer) -> float:
    """Seconds of one optimizer step, from the prompts to the updated weights."""
    rows = [row for row in trainer.train_dataset for _ in range(trainer.num_generations)]
    synchronize(trainer)
    start = time.perf_counter()
    for _ in range(trainer.args.gradient_accumulation_steps):
        trainer.training_step(trainer.model, rows, None)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1
    synchronize(trainer)
    return time.perf_counter() - start


def synchronize(trainer: GRPOTrainer) -> None:
    if trainer.model.device.type == "cuda":
        torch.cuda.synchronize()


def compare(args: argparse.Namespace, description: str = "Steps of both trainers") -> dict[str, dict[str, float]]:
    groups = make_groups(args)
    with tempfile.TemporaryDirectory() as directory:
        trainers = {name: make_trainer(name, groups, args, directory) for name in ("TRL", "LUFFY")}
        counts = {}
        seconds, sampling = defaultdict(list), defaultdict(list)
        turns = [(run, name) for run in range(args.runs + 1) for name in trainers]
        for run, name in tqdm(turns, desc=description, unit="step"):
            trainer = trainers[name]
            if run == 1:  # the first is a warm-up
                counts[name] = TokenCount(trainer.model)
            sampled_before = trainer.sampling_seconds
            took = one_step(trainer)
            if run > 0:
                seconds[name].append(took)
                sampling[name].append(trainer.sampling_seconds - sampled_before)
    results = {}
    for name, trainer in trainers.items():
        median = statistics.median(seconds[name])
        results[name] = {"seconds": median, "seconds_min": min(seconds[name]), "seconds_max": max(seconds[name])}
        if args.whole:  # the count of tokens would be of sampling, too
            results[name]["sampling_seconds"] = statistics.median(sampling[name])
            continue
        real, everything = counts[name].real / args.runs, counts[name].all / args.runs
        results[name] |= {
            "real_tokens": real,
            "tokens": everything,
            "padding": 1 - real / everything,
            "tokens_per_second": real / median,
        }
        if args.device == "cuda":
            per_token = compute_flops_per_token(trainer.model.config, LONGEST // 2)
            peak = get_peak_flops(torch.cuda.get_device_name(0), "bf16")
            results[name]["mfu"] = real * per_token / median / peak if peak else math.nan
    return results


def peak_memory(name: str) -> float:
    """Peak memory of two steps of one trainer in a process of its own, in MiB."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def run_only(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(args.only, make_groups(args), args, directory)
        for _ in range(2):
            one_step(trainer)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def print_whole_steps(results: dict[str, dict[str, float]]) -> None:
    rows = [
        [name, f"{r['seconds']:.2f}", f"{r['seconds_min']:.2f}-{r['seconds_max']:.2f}", f"{r['sampling_seconds']:.2f}"]
        for name, r in results.items()
    ]
    print(text_table(["whole step", "s/step", "min-max", "of which sampling"], rows))
    ratio = results["LUFFY"]["sampling_seconds"] / results["TRL"]["sampling_seconds"]
    print(f"speed-up {results['TRL']['seconds'] / results['LUFFY']['seconds']:.2f}x; sampling takes {ratio:.2f}")


def print_table(results: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            name, f"{r['seconds']:.2f}", f"{r['seconds_min']:.2f}-{r['seconds_max']:.2f}", f"{r['real_tokens']:,.0f}",
            f"{r['tokens']:,.0f}", f"{100 * r['padding']:.1f}%", f"{r['tokens_per_second']:,.0f}",
            f"{r['memory_mib']:,.0f}" if "memory_mib" in r else "-",
            f"{100 * r['mfu']:.1f}%" if "mfu" in r else "-",
        ]
        for name, r in results.items()
    ]  # fmt: skip
    header = ["update phase", "s/step", "min-max", "real tokens", "tokens", "padding", "real tok/s", "peak MiB", "MFU"]
    print(text_table(header, rows))
    print(f"speed-up {results['TRL']['seconds'] / results['LUFFY']['seconds']:.2f}x")


def curve(args: argparse.Namespace) -> list[dict]:
    """Speed-up and padding against demonstrations per group, group size, and length."""
    points = []
    for name, values in (("demonstrations", (0, 1, 2, 4)), ("group_size", (4, 8, 16)), ("divide", (64, 32, 16))):
        for value in values:
            varied = argparse.Namespace(**{**vars(args), name: value})
            if name == "group_size":
                varied.prompts = args.prompts * args.group_size // value  # as many rows
            results = compare(varied, description=f"{name}={value}")
            points.append({"varied": name, "value": value, "results": results})
            print(
                f"{name}={value:<3} TRL {results['TRL']['seconds']:.2f} s, LUFFY {results['LUFFY']['seconds']:.2f} s, "
                f"padding {100 * results['TRL']['padding']:.0f}% and {100 * results['LUFFY']['padding']:.1f}%",
                flush=True,
            )
    return points


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="groups a step (default: 16)")
    parser.add_argument("--group_size", type=int, default=8, help="rows a group (default: 8)")
    parser.add_argument("--demonstrations", type=int, default=1, help="of a group's rows (default: 1)")
    parser.add_argument("--micro_batch", type=int, default=4, help="rows a micro-batch (default: 4)")
    parser.add_argument("--runs", type=int, default=5, help="counted steps of each trainer (default: 5)")
    parser.add_argument("--lengths", choices=["paper", "equal"], default="paper", help="default: paper")
    parser.add_argument("--divide", type=int, default=1 if on_gpu else 16, help="of lengths (default: 16 on a CPU)")
    parser.add_argument("--attention", default="flash_attention_2" if on_gpu else "sdpa")
    parser.add_argument("--forward", choices=["auto", "packed", "padded"], default="auto", help="LUFFY's")
    parser.add_argument("--whole", action="store_true", help="whole steps: sample as well")
    parser.add_argument("--curve", action="store_true", help="vary demonstrations, group size and length")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["TRL", "LUFFY"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cuda" if on_gpu else "cpu"
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if args.only:
        run_only(args)
        return

    if args.curve:
        results = curve(args)
    elif args.whole:
        results = compare(args)
        print_whole_steps(results)
    else:
        # First, while this process is small: a new process's peak begins with its parent's
        names = tqdm(("TRL", "LUFFY"), desc="Peak memory of two steps", unit="trainer")
        memory = {name: peak_memory(name) for name in names}
        results = compare(args)
        for name in results:
            results[name]["memory_mib"] = memory[name]
        print_table(results)
    if args.output:
        device = (
            torch.cuda.get_device_name(0) if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        )
        record = {
            "date": date.today().isoformat(),
            "device": device,
            "versions": {name: version(name) for name in ("torch", "trl", "transformers", "luffy_trl")},
            "arguments": {key: value for key, value in vars(args).items() if key not in ("output", "only")},
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
