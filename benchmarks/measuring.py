"""What every benchmark of seconds does: say whether the machine was idle, keep the spread, write the record."""

import json
import os
import platform
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch


# Of all processors' time: from this share on, seconds are not an idle machine's
TOO_MUCH = 0.05


@dataclass
class Machine:
    """How much else the machine did.

    Attributes:
        load_before: processes that ran or waited for a processor in the minute before, a mean; None where the system
            does not say.
        others_before: share of all processors' time that others took in the second before.
        others: the same while the benchmark ran; None until it has.
    """

    load_before: float | None
    others_before: float
    others: float | None = None

    def warning(self) -> str | None:
        if max(self.others_before, self.others or 0.0) <= TOO_MUCH:
            return None
        load = "" if self.load_before is None else f" (load average {self.load_before:.1f})"
        during = "" if self.others is None else f", and {self.others:.0%} while this ran"
        return (
            f"Warning: the machine was not idle. Other processes took {self.others_before:.0%} of its processors' "
            f"time before{load}{during}: seconds are not an idle machine's."
        )


@contextmanager
def watched_machine(seconds_before: float = 1.0) -> Iterator[Machine]:
    """Looks at the machine before and during what is measured in here, and warns on stderr, before and after."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before = _Others()
    psutil.cpu_percent(interval=seconds_before)  # waits
    machine = Machine(load, before.share())
    if warning := machine.warning():
        print(warning, file=sys.stderr)
    during = _Others()
    yield machine
    machine.others = during.share()
    if warning := machine.warning():
        print(warning, file=sys.stderr)


class _Others:
    """Processor time of everything but this process and what it started, since this was made."""

    def __init__(self) -> None:
        self._all, self._busy, self._own = *_machine_seconds(), _own_seconds()

    def share(self) -> float:
        everything, busy = _machine_seconds()
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / max(everything - self._all, 1e-9))


def _machine_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()._asdict()
    counted = {name: value for name, value in times.items() if name not in ("guest", "guest_nice")}  # in user's
    idle = counted["idle"] + counted.get("iowait", 0.0)
    return sum(counted.values()), sum(counted.values()) - idle


def _own_seconds() -> float:
    own = psutil.Process()
    ended = own.cpu_times()
    seconds = ended.user + ended.system + ended.children_user + ended.children_system
    for child in own.children(recursive=True):
        try:
            seconds += sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue  # ended since: among the ended ones next time
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median of the runs, and how far they lie apart."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "median": statistics.median(seconds),
        "quartiles": [quartiles[0], quartiles[2]],
        "min": min(seconds),
        "max": max(seconds),
        "runs": len(seconds),
    }


def in_turn(names: Sequence[str], runs: int) -> list[tuple[int, str]]:
    """The runs of all names, alternating, each other round backwards: none profits from being second."""
    return [(run, name) for run in range(runs) for name in (names if run % 2 == 0 else reversed(names))]


def write_record(
    path: Path, args: Namespace, machine: Machine, results: Any, packages: Sequence[str], **more: Any
) -> None:
    """The results with all that they depend on."""
    on_gpu = torch.cuda.is_available()
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {os.cpu_count()} processors"
    record = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(0) if on_gpu else cpu,
        "machine": asdict(machine),
        "versions": {name: version(name) for name in (*packages, "luffy_trl")},
        "arguments": {key: value for key, value in vars(args).items() if key not in ("output", "only", "data")},
        **more,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
