"""One run at a time in an output directory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


logger = get_logger(__name__)

LOCK = ".lock"


@contextmanager
def alone_in(output_dir: str | Path) -> Iterator[None]:
    """Hold the directory. The processes of one launch share it: the main one asks, for all.

    The system lets go of it when the process ends, however it ends: what a killed run leaves is a file, and no lock.

    Raises:
        ValueError: on all processes, if another run holds it.
    """
    lock = FileLock(Path(output_dir) / LOCK, fallback_to_soft=False)
    state = PartialState()
    problem = _take(lock, output_dir) if state.is_main_process else None
    if state.num_processes > 1:
        [problem] = broadcast_object_list([problem])
    if problem is not None:
        raise ValueError(problem)
    try:
        yield
    finally:
        lock.release()


def _take(lock: FileLock, output_dir: str | Path) -> str | None:
    """Take the lock; a sentence if another run has it."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return (
            f"--output_dir {output_dir} is in use: another run is writing to it. Wait for its end, stop it, or give "
            "this one another --output_dir."
        )
    except (NotImplementedError, OSError) as error:  # a file system without locks
        logger.warning(f"{output_dir} cannot be locked ({error}): nothing keeps a second run out of it.")
    return None
