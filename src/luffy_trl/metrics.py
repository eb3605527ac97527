"""Where an optimizer step's time goes: TRL times its phases too, but for trackers alone, not for the log."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any


def timed(phase: str) -> Callable[[Callable], Callable]:
    """For a trainer's method: adds its seconds, during training, to `_phase_seconds[phase]`."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(self, *args, **kwargs)
            if self.model.training:
                self._phase_seconds[phase] += time.perf_counter() - start
            return result

        return wrapper

    return decorate
