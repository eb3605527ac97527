"""Whether a run can go on from a checkpoint: said in a sentence, before anything is loaded from it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .manifest import CannotResumeError, read_manifest


ADAPTER = "adapter_config.json"
# What holds weights that are no safetensors of whole tensors
SHARDS = ("global_step*", "pytorch_model_fsdp*")


def read_state(directory: Path) -> TrainerState:
    """Raises CannotResumeError for a state that is none."""
    try:
        state = TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
        numbers = (state.global_step, state.max_steps, state.train_batch_size)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CannotResumeError(f"{directory / TRAINER_STATE_NAME} cannot be read: {error}") from error
    if not all(isinstance(number, int) for number in numbers) or not isinstance(state.log_history, list):
        raise CannotResumeError(f"{directory / TRAINER_STATE_NAME} is no state of a trainer.")
    return state


def check_kind(checkpoint: Path, config_name: str) -> None:
    """Raises CannotResumeError for a checkpoint of another trainer, such as SFT's for RL."""
    before = settings_in(checkpoint).get("config", config_name)
    if before != config_name:
        raise CannotResumeError(
            f"{checkpoint} is of a run with {before}, and this one has {config_name}: it cannot go on from there. "
            "Give the model that was saved at its end as --model_name_or_path, and another --output_dir."
        )


def settings_in(checkpoint: Path) -> Mapping[str, Any]:
    settings = read_manifest(checkpoint).get("settings")
    return settings if isinstance(settings, dict) else {}


def check_adapter(checkpoint: Path, adapter: Mapping[str, Any] | None) -> None:
    """
    Args:
        adapter: the config of the run's adapter, None without one.

    Raises:
        CannotResumeError: if the checkpoint has none and the run has, or the other way, or another one.
    """
    path = checkpoint / ADAPTER
    if adapter is None and path.is_file():
        raise CannotResumeError(
            f"{checkpoint} holds an adapter, and this run trains the whole model: it cannot go on from there. Add "
            "--use_peft with the adapter's options, or start anew in another --output_dir."
        )
    if adapter is not None and not path.is_file() and not any(checkpoint.glob(f"*/{ADAPTER}")):
        raise CannotResumeError(
            f"{checkpoint} holds a whole model, and this run trains an adapter: it cannot go on from there. Leave out "
            "--use_peft, or give the checkpoint as --model_name_or_path and start anew in another --output_dir."
        )
    if adapter is None or not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CannotResumeError(f"{path} cannot be read: {error}") from error
    for name, flag in (("r", "--lora_r"), ("target_modules", "--lora_target_modules")):
        theirs, ours = (_in_order(config.get(name)) for config in (before, adapter))
        if None not in (theirs, ours) and theirs != ours:
            raise CannotResumeError(
                f"{checkpoint} holds an adapter with {name} {theirs}, and this run has {ours}: it cannot go on from "
                f"there. Give {flag} as it was, or start anew in another --output_dir."
            )


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) else value


def check_shapes(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """
    Args:
        shapes: of the model's parameters, by the names under which they are saved.

    Raises:
        CannotResumeError: if a tensor has another shape.
    """
    if any(next(checkpoint.glob(pattern), None) is not None for pattern in SHARDS):
        return
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                theirs, ours = list(tensors.get_slice(name).get_shape()), list(shapes.get(name, ()))
                if ours and theirs != ours:
                    raise CannotResumeError(
                        f"{checkpoint} is of another model: its {name} has the shape {theirs}, this one's {ours}. "
                        "Give the model and the adapter's options as they were, or start anew in another --output_dir."
                    )


def check_processes(checkpoint: Path, is_deepspeed: bool, processes: int) -> None:
    """Raises CannotResumeError for what DeepSpeed cannot load."""
    if not is_deepspeed:
        return
    if not any(checkpoint.glob("global_step*")):
        raise CannotResumeError(
            f"{checkpoint} was not saved by DeepSpeed, which this run uses: it cannot go on from there. Start it as "
            "it was started, or give the checkpoint as --model_name_or_path and start anew in another --output_dir."
        )
    before = settings_in(checkpoint).get("processes", processes)
    if before != processes:
        raise CannotResumeError(
            f"{checkpoint} was saved by {before} processes of DeepSpeed, and this run has {processes}, for which it "
            "cannot be divided anew. Start it on as many as before."
        )
