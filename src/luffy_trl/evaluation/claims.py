"""Who does what, among processes that share a directory: locks on numbers, which the system undoes when one ends."""

import fcntl
import os
from pathlib import Path


class Claims:
    """Each number is held by one process at most. However a process ends, what it held is free.

    Record locks, and no others: a child of this process does not inherit them, so that an engine that outlives a
    killed evaluation holds nothing. In turn they mean nothing between two holders within one process.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, number: int) -> bool:
        """Whether it is this process's now. Never waits."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):  # either, by POSIX
            return False
        return True

    def release(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Release all."""
        os.close(self._file)
