"""What a run is going to do, said before its first step, and what it did, said at its end."""

import math
import shlex
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import LuffyConfig
from ..demonstrations.encoding import DROPPED_COLUMN, TRUNCATED_COLUMN, USABLE_COLUMN
from ..demonstrations.sources import SOURCES
from ..objective import IMITATIONS
from ..reporting.panels import evaluation_rewards
from ..trainer import LuffyTrainer
from .inputs import EMBEDDED_TASK


VLLM_BYTES = 2  # of a parameter


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, and bytes of their weights."""

    total: int
    trained: int
    trained_bytes: int
    frozen_bytes: int


def dataset_on_hub(name: str) -> str | None:
    """What a card can link to."""
    return None if name == EMBEDDED_TASK or Path(name).exists() else name


def about_data(name: str) -> str | None:
    """A sentence for the card on data that it cannot link to."""
    if name == EMBEDDED_TASK:
        return "The data is the embedded letter walk, which `luffy_trl` generates."
    return f"The data is `{Path(name).name}`, which is not on the Hub." if Path(name).exists() else None


class StartSummary(TrainerCallback):
    """Prints the start-up summary when training begins: then the number of steps is known."""

    def __init__(self, trainer: LuffyTrainer, dataset_name: str):
        self.trainer = trainer
        self.dataset_name = dataset_name

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.accelerator.print(start_summary(self.trainer, self.dataset_name))


def start_summary(trainer: LuffyTrainer, dataset_name: str) -> str:
    """Eight lines; uses `trainer.state.max_steps`, which is set when training begins."""
    args, state = trainer.args, trainer.state
    lines = {
        "model": _model(trainer),
        "data": _data(trainer, dataset_name),
        "group": _group(args),
        "step": batch_arithmetic(args, trainer.accelerator.num_processes),
        "run": _count(state.max_steps, "optimizer step") + _epochs(trainer),
        "off-policy": off_policy(args, trainer._source.gives_logps) if args.num_demonstrations else "nothing (GRPO)",
        "memory": memory(trainer),
        "output": args.output_dir,
    }
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def end_summary(trainer: LuffyTrainer) -> str:
    """Steps, time, first and last rewards, where the model is, and the command for the report."""
    history, directory = trainer.state.log_history, trainer.args.output_dir
    seconds = next((line["train_runtime"] for line in reversed(history) if "train_runtime" in line), 0)
    lines = [f"{_count(trainer.state.global_step, 'optimizer step')} done; this start took {_duration(seconds)}"]
    for metric, name in (("on_policy/reward", "rollouts"), ("off_policy/reward", "demonstrations")):
        values = _logged(history, metric)
        if values:
            lines.append(f"Reward of {name}: {values[0]:.3f} when first logged, {values[-1]:.3f} at the end")
    for metric, name in evaluation_rewards(history).items():
        values = _logged(history, metric)
        of_set = "" if metric == "eval_reward" else f" on {name}"
        if values:
            lines.append(f"Reward in evaluation{of_set}: {values[0]:.3f} at first, {values[-1]:.3f} at last")
    lines.append(f"Saved the model, its tokenizer and its card to {directory} ({what_is_saved(trainer)})")
    shown = "Curves and completions" if trainer.args.log_completions else "Curves"
    lines.append(f"{shown}: luffy-trl report {shlex.quote(str(directory))}")
    return "\n".join(lines)


def what_is_saved(trainer: Trainer) -> str:
    """Which checkpoint's model the output directory holds at the end of a run."""
    state, args = trainer.state, trainer.args
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return f"the last, of step {state.global_step}"
    name = Path(state.best_model_checkpoint).name
    metric = args.metric_for_best_model
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    step = name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    values = [line[metric] for line in state.log_history if metric in line and str(line["step"]) == step]
    return f"the best, of {name}{f', {metric} {values[-1]:.3f}' if values else ''}"


def _logged(history: list[dict[str, Any]], metric: str) -> list[float]:
    """The metric's values, without those of means over nothing, which are null."""
    return [line[metric] for line in history if line.get(metric) is not None]


def finish(trainer: LuffyTrainer) -> None:
    """Save the logs beside the model, for the report, and print the summary of the end."""
    trainer.save_state()
    trainer.accelerator.print(end_summary(trainer))


def count_parameters(model: nn.Module) -> Parameters:
    """Of partitioned and 4-bit weights too."""
    total = trained = trained_bytes = frozen_bytes = 0
    for parameter in model.parameters():
        # ZeRO-3 leaves an empty tensor, and the number of elements in this attribute
        stored = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
        # bitsandbytes packs two 4-bit values into a byte
        count = stored * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else stored
        total += count
        if parameter.requires_grad:
            trained += count
            trained_bytes += stored * parameter.element_size()
        else:
            frozen_bytes += stored * parameter.element_size()
    return Parameters(total, trained, trained_bytes, frozen_bytes)


def state_bytes(parameters: Parameters, processes: int, stage: int, mixed: bool) -> float:
    """Weights, gradients and AdamW's states that one process holds (docs/scaling.md).

    Args:
        stage: ZeRO's: 1 divides the optimizer's states, 2 the gradients too, 3, as FSDP, the weights too.
        mixed: DeepSpeed's bf16, whose optimizer keeps float32 weights; else all are of the weights' own type.
    """
    size, count = parameters.trained_bytes, parameters.trained
    weights, gradients, states = (2 * count, 2 * count, 12 * count) if mixed else (size, size, 2 * size)
    parts = ((weights + parameters.frozen_bytes, 3), (gradients, 2), (states, 1))
    return sum(part / (processes if stage >= divided_at else 1) for part, divided_at in parts)


def batch_arithmetic(args: LuffyConfig, processes: int) -> str:
    """How many rows and prompts an optimizer step and a generation hold, and why."""
    rows = processes * args.per_device_train_batch_size * args.gradient_accumulation_steps
    factors = (
        _count(processes, "process", "processes"),
        _count(args.per_device_train_batch_size, "row"),
        _count(args.gradient_accumulation_steps, "micro-batch", "micro-batches"),
    )
    generated = args.generation_batch_size
    text = (
        f"{' x '.join(factors)} = {_count(rows, 'row')}, {rows / args.num_generations:g} prompts; "
        f"a generation makes {_count(generated, 'row')}, {generated / args.num_generations:g} prompts"
    )
    return text + (f", each trained {args.num_iterations} times" if args.num_iterations > 1 else "")


def off_policy(args: LuffyConfig, has_behavior_logps: bool) -> str:
    """The demonstrations' part of the objective, and what of it is not as in the paper."""
    if args.demonstration_loss in IMITATIONS:
        parts = ["loss -log pi" if args.demonstration_loss == "sft" else "loss -p (1 - p) log pi"]
    else:
        constant = {"regularized": f", gamma {args.shaping_gamma:g}", "power": f", exponent {args.shaping_exponent:g}"}
        behavior = "from the data's log-probs" if has_behavior_logps else "1"
        if args.demonstration_source not in SOURCES:
            behavior = "1 unless the function gives log-probs"
        parts = [f"loss -A f(r), f {args.shaping}{constant.get(args.shaping, '')}, behavior probability {behavior}"]
    if args.demonstration_source != "dataset":
        parts.append(f"from {args.demonstration_source}")
    if args.demonstration_weight != 1 or args.demonstration_weight_schedule != "constant":
        parts.append(f"weight {args.demonstration_weight:g} {args.demonstration_weight_schedule}")
    if args.rollout_weight == "complement":
        parts.append("rollouts weigh 1 less that")
    if args.demonstration_average != "joint":
        parts.append(f"averaged apart, by {args.demonstration_average}")
    if args.prefix_strategy != "fixed" or args.prefix_max < 1:
        parts.append(f"prefixes {args.prefix_strategy}, {args.prefix_min:g} to {args.prefix_max:g} of the tokens")
    if args.success_gate is not None:
        parts.append(f"where at most {args.success_gate:.0%} of the rollouts are solved")
    baseline = "whole group" if args.advantage_baseline == "group" else "rollouts"
    return "; ".join([*parts, f"baseline: {baseline}"])


def memory(trainer: LuffyTrainer) -> str:
    """Of one process, by the formulas of docs/scaling.md, not measured."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    parameters, stage = count_parameters(trainer.model), _zero_stage(trainer)
    mixed = args.bf16 and trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    parts = [f"{_gb(state_bytes(parameters, processes, stage, mixed))} weights, gradients, optimizer"]
    if trainer.ref_model is not None:
        reference = count_parameters(trainer.ref_model)
        size = (reference.trained_bytes + reference.frozen_bytes) / (processes if stage == 3 else 1)
        parts.append(f"{_gb(size)} reference model")
    config = trainer.model.config.get_text_config()
    # Not every configuration has these, and without demonstrations completions may have no limit
    shape = [
        getattr(config, "num_hidden_layers", None),
        getattr(config, "hidden_size", None),
        args.max_completion_length,
    ]
    if args.gradient_checkpointing and all(isinstance(size, int) for size in shape):
        row = math.prod(shape) * (2 if args.bf16 else 4)
        parts.append(f"{_gb(row * args.per_device_train_batch_size)} activations without the prompts'")
    if args.use_vllm and args.vllm_mode == "colocate":
        parts.append(
            f"{_gb(parameters.total * VLLM_BYTES / args.vllm_tensor_parallel_size)} vLLM's weights, and its cache"
        )
    return "computed, a process: " + " + ".join(parts)


def _model(trainer: LuffyTrainer) -> str:
    counted = count_parameters(trainer.model)
    share = "all" if counted.trained == counted.total else f"{counted.trained / max(counted.total, 1):.2%}"
    name = getattr(trainer.model.config, "_name_or_path", None) or "unnamed"
    return f"{name}: {_big(counted.total)} parameters, {share} trained"


def _epochs(trainer: LuffyTrainer) -> str:
    if not isinstance(trainer.train_dataset, Dataset):  # a stream: nobody knows
        return ""
    return f", at most {_count(trainer.state.num_train_epochs, 'epoch')}"


def _data(trainer: LuffyTrainer, name: str) -> str:
    dataset = trainer.train_dataset
    if not isinstance(dataset, Dataset):
        return f"{name}: streamed, counted as it is read"
    text = f"{name}: {_count(len(dataset), 'prompt')}"
    if USABLE_COLUMN not in dataset.column_names:
        return f"{text}, no demonstrations from the data"
    text += f", {sum(usable > 0 for usable in dataset[USABLE_COLUMN]):,} with a demonstration"
    if not {DROPPED_COLUMN, TRUNCATED_COLUMN} <= set(dataset.column_names):
        return text
    dropped, truncated = sum(dataset[DROPPED_COLUMN]), sum(dataset[TRUNCATED_COLUMN])
    if dropped or truncated:
        text += f"; {_count(dropped, 'demonstration')} dropped and {truncated:,} truncated as too long"
    return text


def _group(args: LuffyConfig) -> str:
    rollouts = _count(args.num_generations - args.num_demonstrations, "rollout")
    given = f" + {_count(args.num_demonstrations, 'demonstration')}" if args.num_demonstrations else ""
    limit = "of any length" if args.max_completion_length is None else f"up to {args.max_completion_length} tokens"
    return f"{args.num_generations} completions a prompt = {rollouts}{given}, {limit}"


def _zero_stage(trainer: LuffyTrainer) -> int:
    """How much the processes share, in ZeRO's numbers; FSDP is 3."""
    accelerator = trainer.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage
    return 3 if accelerator.distributed_type == DistributedType.FSDP else 0


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _big(count: int) -> str:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2g} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
