"""What a run was set up with, kept with each checkpoint, and what of it has changed when the run goes on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig, TrainingArguments

from .recipe import plain, without_directory
from .redaction import known_secrets, redact_values


# Fields that change nothing of what is learned (where things go, what is said, how evaluation and machines work), and
# one that TRL derives from others
OF_NO_EFFECT = (
    "auto_find_batch_size", "bf16_full_eval", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_", "debug", "deepspeed", "disable_", "do_eval",
    "do_predict", "do_train", "eval_", "fp16_full_eval", "fsdp", "full_determinism", "generation_batch_size",
    "gradient_checkpointing", "greater_is_better", "hub_", "include_", "load_best_model_at_end", "local_rank", "log_",
    "logging_", "merge_and_push", "metric_for_best_model", "model_init_kwargs", "num_completions_to_print",
    "output_dir", "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub", "remove_unused_",
    "report_to", "restore_callback_states", "resume_from_checkpoint", "run_name", "save_", "skip_memory_metrics",
    "torch_empty_cache_steps", "trackio_", "use_cpu", "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_server_",
    "wandb_",
)  # fmt: skip
# Kept in the optimizer's state and set by it again (torch's `load_state_dict`)
OF_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
OF_THE_SCHEDULE = (
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs",
)  # fmt: skip
# Of an adapter's config
OF_THE_ADAPTER = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
MARKED_ROWS = 16


@dataclass(frozen=True)
class Change:
    """One thing that differs from when the checkpoint was saved.

    Attributes:
        is_overruled: whether what is asked for now has no effect.
    """

    name: str
    before: Any
    now: Any
    is_overruled: bool

    def __str__(self) -> str:
        before, now = (json.dumps(value, ensure_ascii=False) for value in (self.before, self.now))
        if self.is_overruled:
            return f"{self.name}: {before} of the checkpoint stays in force; {now}, asked for now, has no effect"
        return f"{self.name}: {now} is in force from here; it was {before}"


def settings_of(
    args: TrainingArguments,
    model_config: PreTrainedConfig | None,
    adapter: Mapping[str, Any],
    dataset: Any,
    processes: int,
) -> dict[str, Any]:
    """Plain values, without secrets and directories.

    Args:
        adapter: the adapter's config, empty without one.
        dataset: what is trained on.
    """
    fields = {name: value for name, value in args.to_dict().items() if not name.startswith(OF_NO_EFFECT)}
    fields = plain(redact_values(fields, known_secrets(args.hub_token)))
    fields |= {name: _in_order(adapter[name]) for name in OF_THE_ADAPTER if name in adapter}
    if model_config is not None:
        fields["model"] = without_directory(model_config._name_or_path)
    fields["processes"] = processes
    if isinstance(dataset, Dataset):
        fields["dataset"] = mark(dataset)
    return fields


def mark(dataset: Dataset) -> str:
    """What a dataset is told by: its size, its columns, and a few rows. Not what is no text, number or list."""
    rows = len(dataset)
    seen = sorted({i * (rows - 1) // max(MARKED_ROWS - 1, 1) for i in range(MARKED_ROWS)}) if rows else []
    digest = hashlib.sha256()
    for row in (dataset[i] for i in seen):
        digest.update(json.dumps(row, sort_keys=True, default=_shown).encode())
    return f"{rows} rows, {digest.hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else type(value).__name__


def _in_order(value: Any) -> Any:
    """Peft keeps module names as a set."""
    return sorted(value) if isinstance(value, set | frozenset) else plain(value)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> list[Change]:
    """What differs, of what both know."""
    has_optimizer = (checkpoint / "optimizer.pt").is_file() or any(checkpoint.glob("global_step*"))
    is_whole_model = not (checkpoint / "adapter_config.json").is_file()
    overruled = (OF_THE_OPTIMIZER if has_optimizer else ()) + (("model",) if is_whole_model else ())
    return [
        Change(name, before[name], now[name], name in overruled)
        for name in now
        if name in before and before[name] != now[name]
    ]
