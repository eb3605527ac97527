"""Which run an output directory, and a checkpoint in it, belongs to.

A run has a name of its own, made up when it starts anew. It stands in the output directory and in the manifest of each
checkpoint. Directories and checkpoints of before there were such names have none.
"""

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from .whole_files import write_whole


# With a dot in front, so that it stays out of pushes
IDENTITY = ".run.json"


@dataclass(frozen=True)
class Identity:
    """
    Attributes:
        run: the run's name.
        continues_unnamed: whether it goes on from checkpoints without a name, which are its own then.
    """

    run: str
    continues_unnamed: bool = False

    def owns(self, run: str | None) -> bool:
        """Whether a checkpoint with this name is of this run."""
        return self.continues_unnamed if run is None else run == self.run


def new_name() -> str:
    return uuid.uuid4().hex


def read_identity(output_dir: str | Path) -> Identity | None:
    """The run that the directory holds, None if it has no name, or none that can be read."""
    path = Path(output_dir) / IDENTITY
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Identity(str(found["run"]), found["continues_unnamed"] is True)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def write_identity(output_dir: str | Path, identity: Identity) -> None:
    """In one piece: a reader, and a run after a kill, find the old one or the new one."""
    path = Path(output_dir) / IDENTITY
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(identity)) + "\n")
