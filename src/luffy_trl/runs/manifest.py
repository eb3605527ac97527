"""The manifest: the last file of a checkpoint. Its files with their sizes, and which run wrote them, set up how."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


MANIFEST = "manifest.json"


class CannotResumeError(ValueError):
    """A checkpoint that is not there, is damaged, or does not fit the run."""


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What the manifest says; empty if there is none, or it cannot be read."""
    try:
        found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def run_of(manifest: Mapping[str, Any]) -> str | None:
    """The name of the run that wrote it; checkpoints of before there were names have none."""
    run = manifest.get("run")
    return run if isinstance(run, str) else None
