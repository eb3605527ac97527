"""What the update phase takes in FLOPs, memory and gathered parameters, counted on the shapes of 7B and 4B models.

The real trainers run their whole update phase, micro-batch after micro-batch, with losses and backward passes, on
models that are counted instead of computed (`counted_model.py`): no GPU is needed, nothing is downloaded, and every
machine counts the same. Weights and gradients are in bfloat16 and layers are checkpointed, as with DeepSpeed and the
recipes.

    python benchmarks/update_flops.py                     # the table, a few minutes
    python benchmarks/update_flops.py --prompts 2         # a shorter step

Two models of one and two layers are counted, from which all layers follow: every layer takes as many FLOPs as the
next, and as much memory. `tests/test_update_flops.py` holds that, and these counts, against others.

The limit is what no trainer can go below: no padding, each prompt once, by a formula of its own (`limit_flops`).
Attention is counted as flash attention computes it: pairs of a query and a key that the causal mask admits. Peak
memory is that of one process without sharding: weights, gradients, activations and logits. Optimizer states, the same
in every configuration, come on top. `gathers` counts how often ZeRO-3 gathers every parameter: in each forward pass,
where it is recomputed, and in its backward pass.
"""

import argparse
import gc
import json
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from configurations import CONFIGURATIONS
from counted_kernels import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from counted_model import Counts, layouts_for_masks, make_counted_model
from recorded import Workload, forward_and_backward, make_trainer
from tqdm import tqdm
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    logging,
)

from luffy_trl.reporting.tables_and_curves import text_table


# As published, in config.json of each model
MODELS: dict[str, tuple[type[PreTrainedModel], type[PretrainedConfig], dict[str, Any]]] = {
    "Qwen2.5-Math-7B": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 16384,  # from 4096, by the paper
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-4B": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
}
LENGTHS = ("paper", "long_prompt")


def make_config(model: str, layers: int) -> PretrainedConfig:
    _, config_class, shape = MODELS[model]
    return config_class(**{**shape, "num_hidden_layers": layers}, eos_token_id=0, pad_token_id=1, bos_token_id=None)


@dataclass(frozen=True)
class Case:
    """One line of the results."""

    model: str
    lengths: str
    configuration: str
    flops: int
    limit_flops: int
    padding: float
    micro_batches: int
    gathers: int
    peak_memory_bytes: int


def count(
    config: PretrainedConfig,
    architecture: type[PreTrainedModel],
    work: Workload,
    name: str,
    attention: str | None = None,
) -> Counts:
    """Of one optimizer step's passes with this configuration.

    Args:
        attention: if not the configuration's.
    """
    configuration = CONFIGURATIONS[name]
    with tempfile.TemporaryDirectory() as directory, layouts_for_masks():
        model = make_counted_model(architecture, config, attention or configuration.attention)
        trainer = make_trainer(name, work, model, directory, gradient_checkpointing=True)
        if configuration.options is not None:
            trainer._check_packing()  # passes of its own, once a run
        model.counts = Counts()
        gc.disable()  # memory then depends on nothing but the passes
        try:
            forward_and_backward(trainer)
        finally:
            gc.enable()
    return model.counts


def count_case(model: str, work: Workload, name: str) -> Case:
    architecture, _, shape = MODELS[model]
    layers = shape["num_hidden_layers"]
    one, two = (count(make_config(model, n), architecture, work, name) for n in (1, 2))
    return Case(
        model=model,
        lengths=work.lengths,
        configuration=name,
        flops=of_all_layers(one.flops, two.flops, layers),
        limit_flops=limit_flops(make_config(model, layers), work),
        padding=one.padding / one.tokens,
        micro_batches=len(one.peaks),
        gathers=one.gathers,
        peak_memory_bytes=max(of_all_layers(*peaks, layers) for peaks in zip(one.peaks, two.peaks, strict=True)),
    )


def of_all_layers(with_one: int, with_two: int, layers: int) -> int:
    return with_one + (layers - 1) * (with_two - with_one)


def limit_flops(config: PretrainedConfig, work: Workload) -> int:
    """FLOPs of one step without padding and with each prompt once: every token, and every pair that attends.

    A product of a token with a matrix takes 2 FLOPs per entry: forward, and for the gradients of both. Layers run
    forward a second time, for their checkpoints; of that PyTorch leaves out the last product of each layer, whose
    result no gradient needs. The loss head runs forward a second time, for its chunks.
    """
    size, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or size // heads
    queries, keys = heads * head, config.num_key_value_heads * head
    down = config.intermediate_size * size
    layer = 2 * size * queries + 2 * size * keys + 3 * down
    tokens = scored = pairs = 0
    for group in work.groups():
        prompt, completions = len(group["prompt"]), [len(c) for c in group["rollouts"] + group["demonstrations"]]
        tokens += prompt + sum(completions)
        scored += sum(completions)
        pairs += prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in completions)
    per_token = 4 * layer - down
    per_pair = (2 * FORWARD_PRODUCTS + BACKWARD_PRODUCTS) * queries
    return 2 * (
        config.num_hidden_layers * (tokens * per_token + pairs * per_pair) + scored * 4 * size * config.vocab_size
    )


def print_table(cases: list[Case]) -> None:
    header = ["model", "lengths", "configuration", "PFLOPs", "of the limit", "padding", "passes", "gathers", "peak GB"]
    rows = [
        [
            case.model, case.lengths, case.configuration, f"{case.flops / 1e15:,.1f}",
            f"{case.flops / case.limit_flops:.3f}", f"{100 * case.padding:.1f}%", str(case.micro_batches),
            str(case.gathers), f"{case.peak_memory_bytes / 1e9:.1f}",
        ]
        for case in cases
    ]  # fmt: skip
    print(text_table(header, rows))


NAMES = {"paper": "the paper's lengths", "long_prompt": "long prompts"}


def docs_table(cases: list[Case]) -> str:
    """The results as docs/scaling.md has them."""
    lines = [
        "| *counted* | PFLOPs | of the limit | padding | micro-batches | gathers | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    seen: list[tuple[str, str]] = []
    for case in cases:
        if (case.model, case.lengths) not in seen:
            seen.append((case.model, case.lengths))
            lines.append(f"| **{case.model}, {NAMES[case.lengths]}** | {case.limit_flops / 1e15:.2f} | 1 | | | | |")
        lines.append(
            f"| {case.configuration} | {case.flops / 1e15:.2f} | {case.flops / case.limit_flops:.3f} "
            f"| {100 * case.padding:.1f}% | {case.micro_batches} | {case.gathers} "
            f"| {case.peak_memory_bytes / 1e9:.1f} |"
        )
    return "\n".join(lines)


def read(path: Path) -> list[Case]:
    return [Case(**case) for case in json.loads(path.read_text(encoding="utf-8"))["cases"]]


def write(path: Path, cases: list[Case], args: argparse.Namespace) -> None:
    record = {
        "cases": [asdict(case) for case in cases],
        "arguments": {"prompts": args.prompts, "divide": args.divide},
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "luffy_trl")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16, help="groups a step (default: 16)")
    parser.add_argument("--divide", type=int, default=1, help="of lengths (default: 1)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--markdown", type=Path, help="only print the table of docs/scaling.md, from these results")
    args = parser.parse_args(argv)
    if args.markdown:
        print(docs_table(read(args.markdown)))
        return
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    turns = [(m, lengths, name) for m in args.models for lengths in args.lengths for name in args.configurations]
    cases = []
    for model, lengths, name in (bar := tqdm(turns, unit="case")):
        bar.set_description(f"{model}, {lengths}, {name}")
        work = Workload(prompts=args.prompts, lengths=lengths, divide=args.divide)
        cases.append(count_case(model, work, name))
        if args.output:  # after each, so that what was counted is there if it is stopped
            write(args.output, cases, args)
    print_table(cases)


if __name__ == "__main__":
    main()
