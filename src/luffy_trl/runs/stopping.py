"""How a run ends before its time: at the next optimizer step after a signal, and never by waiting for ever.

SIGTERM and SIGINT end a run at its next optimizer step, with a checkpoint. A second one ends it at once.
"""

import os
import signal
import threading
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback


if TYPE_CHECKING:
    import requests


# "Temporary failure, try again" of sysexits.h: the run can be resumed
STOPPED_STATUS = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Launchers pass on the signal that they, and their processes, got: within this many seconds it is the same one
SAME_SIGNAL = 1.0


class RunStopped(Exception):  # noqa: N818 - it is none
    """A run that ended early, with a checkpoint, because it was asked to by a signal."""

    def __init__(self, received: signal.Signals, checkpoint: str):
        super().__init__(f"Stopped on {received.name}, saved {checkpoint}.")
        self.received = received


class StopAtStep(TrainerCallback):
    """While entered, takes SIGTERM and SIGINT as a request to save and stop after the optimizer step under way.

    On several processes one of them being asked is enough: all stop at the same step. Outside the main thread Python
    allows no handlers, so there signals keep their effect.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.stopped = False  # before its last step. A signal that comes later changes nothing any more
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopAtStep":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            # os.write: the signal may have come in the middle of a print
            os.write(2, f"\n{self.received.name}: saving after this step; once more ends at once.\n".encode())
        elif time.monotonic() - self._received_at > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        received = [self.received]
        if torch.distributed.is_initialized():
            received = gather_object(received)
        if any(received):
            self.received = next(filter(None, received))
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_save or self.stopped
            control.should_training_stop = True


def bound_waiting(session: "requests.Session", seconds: float) -> None:
    """Let every request of the session fail that gets no answer for so long, as collectives do. TRL's client waits."""
    session.request = partial(session.request, timeout=seconds)  # type: ignore[method-assign]
