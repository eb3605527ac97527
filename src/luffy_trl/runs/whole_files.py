"""Small files that are written in one piece."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """A reader, and a run after a kill, find the old file or the new one."""
    unfinished = path.with_name(f".{path.name.lstrip('.')}.unfinished")  # out of pushes
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
