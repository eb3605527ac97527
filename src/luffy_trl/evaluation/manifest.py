"""run.json: what the samples of a directory depend on, so that those of another run are never mixed in."""

import json
import os
from pathlib import Path
from typing import Any

from ..runs.kept_lines import LONGEST_LINE, shown
from . import EvaluationError


RUN_FILE = "run.json"


def agree(directory: Path, settings: dict[str, Any], has_samples: bool, has_others: bool) -> dict[str, Any]:
    """Write down what the samples are made with, and return it: `data`, by task, may grow; all else must stay.

    Args:
        has_samples, has_others: whether the directory holds samples, or other processes are at work in it.

    Raises:
        EvaluationError: if it holds samples made with other settings, or none that can be read.
        OSError: if it cannot be written to.
    """
    path = directory / RUN_FILE
    if has_samples or has_others or os.path.lexists(path):
        try:
            kept = _manifest(path)
        except (OSError, ValueError, RecursionError) as error:
            holds = f"holds a {RUN_FILE} that is damaged, or not of luffy-trl eval ({error})"
            if has_samples:
                holds = f"has samples, but {RUN_FILE}, which says how they were made, cannot be read ({error})"
            raise EvaluationError(f"--output_dir {directory} {holds}. Choose another --output_dir.") from error
    if has_samples or has_others:
        differences = _differences(kept, settings)
        if differences:
            raise EvaluationError(
                f"--output_dir {directory} holds samples made with {' and '.join(differences)}. Choose "
                "another --output_dir, or the same settings to go on."
            )
        settings = settings | {"data": kept["data"] | settings["data"]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return settings


def _manifest(path: Path) -> dict[str, Any]:
    """What run.json holds. Raises OSError, ValueError or RecursionError if that is not what an evaluation writes."""
    if not path.exists():
        raise ValueError("it is not there")
    if not path.is_file():
        raise ValueError("it is no file")
    with open(path, "rb") as file:
        content = file.read(LONGEST_LINE)
    kept = json.loads(content.decode())
    if not isinstance(kept, dict) or not isinstance(kept.get("data"), dict):
        raise ValueError("it is not as luffy-trl eval writes it: an object with `model`, `data` and more")
    return kept


def _differences(kept: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    different = [
        f"{name} {shown(kept.get(name))} instead of {value!r}"
        for name, value in settings.items()
        if name != "data" and kept.get(name) != value
    ]
    changed = [task for task, value in settings["data"].items() if kept["data"].get(task, value) != value]
    return different + [f"other problems for {task}" for task in changed]
