"""Which files of an output directory are a model's, and go to the Hub."""

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..reporting.logs import COMPLETIONS
from ..runs.manifest import MANIFEST
from .errors import PushError


# Never pushed. A leading underscore marks what is the run's own, such as the pretrained base of the embedded task;
# completions are a dataset of their own; training_args.bin is a pickle, which runs code when it is loaded
LEFT_OUT = ("_*", "*/_*", ".*", "*/.*", "checkpoint-*", f"{COMPLETIONS}/*", "*training_args.bin", "*__pycache__/*")
# The state of a training run, which only a resume needs
STATES = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "*.pt", "*.pth", "global_step*", "latest", "zero_to_fp32.py",
    "pytorch_model_fsdp*", "trainer_state.json", "entropy_ctrl_state.json", "replay-*", "success_rate.json",
    MANIFEST,
)  # fmt: skip
# Weights of a model at the top of a repository: replaced together, or an adapter and a merged model would mix
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*")
REPLACED_TOGETHER = (*WEIGHTS, "model*.index.json", "pytorch_model*.index.json", "adapter_config.json")


def is_pushed(name: str, states: bool = False) -> bool:
    """Whether a model's file, named relative to its directory, goes to the Hub."""
    patterns = LEFT_OUT if states else (*LEFT_OUT, *STATES)
    return not any(fnmatch(name, pattern) for pattern in patterns)


def files_below(directory: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to the directory, path) of all files in it."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            yield path.relative_to(directory).as_posix(), path


def has_weights(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) is not None for pattern in WEIGHTS)


def check_weights(directory: Path) -> None:
    """Raises PushError unless a whole model, or an adapter, lies there."""
    if not has_weights(directory):
        sharded = next(directory.glob("global_step*"), None) or next(directory.glob("pytorch_model_fsdp*"), None)
        hint = (
            "only the shards of its processes: set zero3_save_16bit_model (ZeRO-3) or FULL_STATE_DICT (FSDP) to save "
            "whole models"
        )
        raise PushError(f"{directory} holds no model weights{f', {hint}' if sharded else ''}")
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="np") as tensors:
                shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise PushError(f"{path} is damaged: {error}") from error
        empty = [key for key, shape in shapes.items() if 0 in shape]
        if empty or not shapes:
            raise PushError(f"{path} holds empty weights ({', '.join(empty[:2]) or 'no tensor at all'})")


def local_base(directory: Path) -> str | None:
    """The directory of an adapter's base, if it is one of this machine."""
    config = directory / "adapter_config.json"
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return base if base and Path(base).is_dir() else None
