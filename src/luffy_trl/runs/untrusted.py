"""What is read of a checkpoint that someone else has written: an allow-list, and no pickle that could run code.

Weights are safetensors, arrays are NumPy's without objects, and all else is JSON. The states of the optimizer, the
schedule and the random numbers exist in torch's format alone, which is a pickle in a zip file. They are read with
`weights_only=True`, as transformers does: that reader makes tensors, numbers, text and containers of them, and the
NumPy arrays of a random state, and refuses a file that names anything else. They are read here once, before a model is
loaded. Pickles that are read without it are not on the list: DeepSpeed's `global_step*`, FSDP's `.metadata`.
"""

import atexit
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from .manifest import MANIFEST, CannotResumeError, read_manifest


# Names relative to the checkpoint's directory; for `snapshot_download`, too, with any directory before them
TORCH_STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", r"rng_state(_\d+)?.pth")
AT_THE_TOP = (
    *TORCH_STATES, r"(trainer_state|manifest|config|generation_config|adapter_config)\.json",
    r"adapter_model\.safetensors", r"model(-\d+-of-\d+)?\.safetensors", r"model\.safetensors\.index\.json",
)  # fmt: skip
# Of other adapters, and of what a trainer keeps beside: see `WholeCheckpointMixin._save_own_state`
BELOW = (r"[\w-]+/adapter_model\.safetensors", r"[\w-]+/adapter_config\.json", r"[\w-]+/[\w-]+\.(npy|npz|json)")
ALLOWED = re.compile("|".join((*AT_THE_TOP, *BELOW)))
# Directories that are looked into by readers of pickles
FOREIGN = re.compile(r"pytorch_model_fsdp|optimizer|global_step")
DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.npy",
    "*.npz",
    "*optimizer.pt",
    "*scheduler.pt",
    "*scaler.pt",
    "*rng_state*.pth",
]


def is_allowed(name: str) -> bool:
    directory, _, _ = name.rpartition("/")
    return ALLOWED.fullmatch(name) is not None and FOREIGN.match(directory) is None


def allowed_part(checkpoint: Path, name: str) -> Path:
    """A directory with the files of the checkpoint that are on the list, and no others, until this process ends.

    Args:
        name: what the checkpoint was asked for as.

    Raises:
        CannotResumeError: if what is needed is not there, or not what it should be.
    """
    where = f"--resume_from_checkpoint {name}"
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if is_allowed(name)}
    if "trainer_state.json" not in files:
        raise CannotResumeError(f"{where} is no checkpoint: it has no trainer_state.json.")
    missing = [state for state in ("optimizer.pt", "scheduler.pt") if state not in files]
    if missing or not any(name.endswith(".safetensors") for name in files):
        raise CannotResumeError(
            f"{where} has no {missing[0] if missing else 'weights in safetensors'}: a checkpoint of DeepSpeed or FSDP "
            "holds pickles instead, which run code when they are loaded, and are never read from the Hub. If you "
            "trust it, download it and give its directory."
        )
    manifest = read_manifest(checkpoint)
    sizes = manifest.get("files")
    sizes = {file: size for file, size in sizes.items() if is_allowed(file)} if isinstance(sizes, dict) else {}
    for file, size in sizes.items():
        if file not in files or files[file].stat().st_size != size:
            raise CannotResumeError(f"{where} is damaged: {file} is not there, or has not the size in its {MANIFEST}.")
    for file, path in files.items():
        if path.suffix in (".pt", ".pth"):
            _check_state(path, f"{where}: {file}")
    view = _view({file: path for file, path in files.items() if file != MANIFEST}, name)
    if manifest:
        (view / MANIFEST).write_text(json.dumps(manifest | {"files": sizes}))
    return view


def _check_state(path: Path, what: str) -> None:
    try:
        with safe_globals():
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of a file that anyone may have written: whatever it is, the file is not used
        raise CannotResumeError(
            f"{what} holds something else than tensors and plain values, or is no file of torch's, and is not loaded."
        ) from error


def _view(files: dict[str, Path], name: str) -> Path:
    view = Path(tempfile.mkdtemp(prefix=f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-"))
    atexit.register(shutil.rmtree, view, ignore_errors=True)
    for file, path in files.items():
        link = view / file
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path.resolve())
    return view
