"""The commands of a run, one after another, each in a process of its own: what has ended well is not run again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..runs.stopping import STOPPED_STATUS
from . import ComparisonError
from .plan import MERGED, MODEL, Plan, PlannedRun, TestSet, is_true


RECIPE, LOG, DONE, ATTEMPTS, PROCESS = "recipe.yaml", "log.txt", "done.json", "attempts.json", "process.json"
GREEDY, SAMPLED = "greedy", "sampled"
GRACE = 120.0  # seconds in which a run that is stopped may save a checkpoint
LAST_LINES = 3  # last lines of a failed command
USAGE_STATUS = 2


class StageError(ComparisonError):
    """A command that failed: `status` is its exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Took:
    """Seconds of the clock, and of processors: those do not grow where other work shares the machine."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: "Took") -> "Took":
        return Took(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


@dataclass(frozen=True)
class Step:
    """One command of a run. `settings` are what it depends on: another value needs another directory."""

    what: str
    directory: Path
    command: list[str]
    settings: dict[str, Any]

    def took(self) -> "Took | None":
        """Over all attempts that were seen to end; None if it has not ended well.

        Raises:
            ComparisonError: if it was done with other settings.
        """
        path = self.directory / DONE
        if not path.is_file():
            return None
        try:
            done = json.loads(path.read_text(encoding="utf-8"))
            kept, took = done["settings"], Took(float(done["seconds"]), float(done["cpu_seconds"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ComparisonError(f"{path} is damaged: remove {self.directory}, and it is done anew.") from error
        if kept != self.settings:
            names = sorted(n for n in {*kept, *self.settings} if kept.get(n) != self.settings.get(n))
            raise ComparisonError(
                f"{self.directory} was made with other settings ({', '.join(names)}). Choose another --output_dir, "
                "or remove it."
            )
        return took


@dataclass(frozen=True)
class Commands:
    """How commands are launched.

    Attributes:
        accelerate_config: for `accelerate launch`; None: one process.
        evaluate: more arguments of `luffy-trl eval`, such as its back end.
        n_samples: sampled answers a problem.
    """

    plan: Plan
    tests: Sequence[TestSet]
    ways: Sequence[str]
    accelerate_config: str | None
    evaluate: Sequence[str]
    n_samples: int

    def steps(self, run: PlannedRun) -> list[Step]:
        training = []
        for number in range(len(run.stages)):
            if number and self.plan.handed_on == MERGED:
                training.append(self._merging(run, number - 1))
            training.append(self._training(run, number))
        return training + [self._evaluation(run, test, way) for test in self.tests for way in self.ways]

    def _training(self, run: PlannedRun, number: int) -> Step:
        recipe, directory = self.plan.stage_recipe(run, number), run.stage_directory(number)
        launcher = [sys.executable, "-m"]
        if self.accelerate_config is not None:
            launcher += ["accelerate.commands.launch", "--config_file", self.accelerate_config, "--module"]
        command = [*launcher, "luffy_trl", run.stages[number].command, "--config", str(directory / RECIPE)]
        return Step(f"stage {number + 1}, {run.stages[number].command}", directory, command, recipe)

    def _merging(self, run: PlannedRun, number: int) -> Step:
        stage = run.stage_directory(number)
        into = ["--merge", "--to", str(stage / MERGED)]
        command = [sys.executable, "-m", "luffy_trl", "push", str(stage / MODEL), *into]
        return Step(f"stage {number + 1}, merging the adapter", stage / "merging", command, {})

    def _evaluation(self, run: PlannedRun, test: TestSet, way: str) -> Step:
        recipe = self.plan.recipe
        directory = evaluation_directory(run, test.name, way)
        is_adapter = bool(run.stages) and self.plan.handed_on == MERGED
        arguments = {
            "model": self.plan.base if is_adapter else run.model(self.plan.base),
            "adapter": run.model(self.plan.base) if is_adapter else None,
            "dataset_name": test.dataset,
            "dataset_split": test.split,
            "temperature": 0 if way == GREEDY else recipe.get("temperature", 1.0),
            "n_samples": None if way == GREEDY else self.n_samples,
            "max_new_tokens": recipe.get("max_completion_length", 256),
            "device": "cpu" if is_true(recipe.get("use_cpu")) else None,
            "solved_reward": recipe.get("solved_reward"),
            "solved_threshold": recipe.get("solved_threshold"),
        }
        flags = [part for name, value in arguments.items() if value is not None for part in (f"--{name}", str(value))]
        rewards = recipe.get("reward_funcs")
        if rewards:
            flags += ["--reward_funcs", *([rewards] if isinstance(rewards, str) else rewards)]
        command = [sys.executable, "-m", "luffy_trl", "eval", *flags, *self.evaluate]
        command += ["--name", run.key, "--output_dir", str(directory / "results")]
        settings = {name: value for name, value in arguments.items() if name not in ("model", "adapter")}
        more = {"reward_funcs": rewards, "evaluate": list(self.evaluate)}
        return Step(f"{way} answers to {test.name}", directory, command, settings | more)


def evaluation_directory(run: PlannedRun, test: str, way: str) -> Path:
    return run.directory / "evaluations" / f"{test}-{way}"


class Processes:
    """The commands under way, so that all of them can be stopped; then no other is started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._is_stopped = False

    def run(self, step: Step) -> None:
        """Run the command, its output into a file beside it.

        Raises:
            StageError: if it fails, with its last lines; or was stopped, with status 75.
        """
        directory = step.directory
        directory.mkdir(parents=True, exist_ok=True)
        if str(directory / RECIPE) in step.command:
            (directory / RECIPE).write_text(yaml.safe_dump(step.settings, sort_keys=False), encoding="utf-8")
        end_orphan(directory)
        start = time.monotonic()
        with open(directory / LOG, "a", encoding="utf-8") as log:
            status, cpu_seconds = self._wait(step, log)
        took = _took_before(directory) + Took(time.monotonic() - start, cpu_seconds)
        if status != 0:
            (directory / ATTEMPTS).write_text(json.dumps(asdict(took)), encoding="utf-8")
            raise StageError(f"{step.what} ended with status {status}: {_last_lines(directory / LOG)}", status)
        _write_done(directory, asdict(took) | {"settings": step.settings})

    def _wait(self, step: Step, log: Any) -> tuple[int, float]:
        """Exit status, and seconds of processors, those of processes that it waited for among them."""
        with self._lock:
            if self._is_stopped:
                return STOPPED_STATUS, 0.0
            # A session of its own: Ctrl-C is for this process, which stops its commands
            process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            self._running.add(process)
        record = step.directory / PROCESS
        record.write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}), encoding="utf-8")
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_utime + usage.ru_stime
        finally:
            record.unlink()
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Ask all to save and stop, and end those that do not."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        _end([process.pid for process in running])


def end_orphan(directory: Path) -> None:
    """Stop the command that a killed comparison has left at work there: two would write the same files."""
    try:
        record = json.loads((directory / PROCESS).read_text(encoding="utf-8"))
        pid, started = int(record["pid"]), float(record["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if _started(pid) == started:
        _end([pid])


def _started(pid: int) -> float:
    """When the process began, which tells it from a later one of the same number; 0 if there is none."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).create_time()
    return 0.0


def _end(pids: Sequence[int]) -> None:
    """Ask commands, and whatever they started, to save and stop; kill them where they do not in time."""
    for pid in pids:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while any(map(_is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in pids:
        _signal(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _took_before(directory: Path) -> Took:
    """Of attempts that were seen to end; one that was killed together with the comparison is not counted."""
    try:
        return Took(**json.loads((directory / ATTEMPTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Took()


def _write_done(directory: Path, done: dict[str, Any]) -> None:
    unfinished = directory / f".{DONE}"
    unfinished.write_text(json.dumps(done, indent=1), encoding="utf-8")
    unfinished.replace(directory / DONE)


def _last_lines(log: Path) -> str:
    """What a command said last, on one line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return f"{' '.join(lines[-LAST_LINES:])[-600:]} (all of it: {log})"
