"""Which model or data lies at a path: another of the same name is another."""

import hashlib
import re
from pathlib import Path


# Of each weight file, this much of its beginning and of its end goes into the fingerprint
SAMPLED_BYTES = 2**20
# What `datasets` leaves in a saved dataset that it has read
LEFT_BEHIND = re.compile(r"cache-.+\.arrow|tmp\w{8}")


def files_fingerprint(directory: str) -> str | None:
    """Changes with the weights, the tokenizer or the chat template of a local directory; None for a Hub id.

    Weight files are read at both ends only: training changes every part of them.
    """
    if not Path(directory).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.suffix in {".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"} and path.is_file():
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest.update(f"{path.name} {size}\n".encode() + file.read(SAMPLED_BYTES))
                file.seek(max(0, size - SAMPLED_BYTES))
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def data_fingerprint(name: str) -> str | None:
    """Of all that is in a local file or directory; None for a name that is neither, as of the Hub."""
    path = Path(name)
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root, files = path, [file for file in path.rglob("*") if not LEFT_BEHIND.fullmatch(file.name)]
    else:
        return None
    digest = hashlib.sha256()
    for each in sorted(file for file in files if file.is_file()):
        with open(each, "rb") as file:
            digest.update(f"{each.relative_to(root)}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def file_or_model_fingerprint(name: str) -> str | None:
    """Of a field that may name one file, or a model's directory."""
    return data_fingerprint(name) if Path(name).is_file() else files_fingerprint(name)
