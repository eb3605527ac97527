"""The commands of a run, one after another, each in a process of its own: what has ended well is not run again."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..runs.fingerprints import data_fingerprint, file_or_model_fingerprint
from ..runs.stopping import STOPPED_STATUS
from . import ComparisonError
from .evaluations import with_model_args
from .plan import MERGED, MODEL, Plan, PlannedRun, Recipe, TestSet, is_true
from .steps import RECIPE, Step, Took


LOG, ATTEMPTS, PROCESS = "log.txt", "attempts.json", "process.json"
GREEDY, SAMPLED = "greedy", "sampled"
GRACE = 120.0  # seconds in which a run that is stopped may save a checkpoint
LAST_LINES = 3  # last lines of a failed command
USAGE_STATUS = 2
USAGE_ERROR = re.compile(r"luffy-trl [\w-]+: error: .*")
LAUNCHER = "accelerate.commands.launch"
# Fields of local files that a stage reads; the first one reads the base too, others what was made before
TRAINED_WITH = {
    "dataset_name": data_fingerprint,
    "chat_template_path": file_or_model_fingerprint,
    "deepspeed": file_or_model_fingerprint,
}
TRAINED_FROM = TRAINED_WITH | {"model_name_or_path": file_or_model_fingerprint}
LAUNCHED_WITH = {"deepspeed_config_file": data_fingerprint}


class StageError(ComparisonError):
    """A command that failed: `status` is its exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


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
    # Path -> fingerprint: files are read once a comparison
    _fingerprints: dict[str, str | None] = field(default_factory=dict, init=False, repr=False)

    def steps(self, run: PlannedRun) -> list[Step]:
        made: list[Step] = []
        for number in range(len(run.stages)):
            if number and self.plan.is_adapter(run, number - 1):
                made.append(self._merging(run, number - 1, made[-1]))
            made.append(self._training(run, number, made[-1] if made else None))
        after = made[-1] if made else None
        return made + [self._evaluation(run, test, way, after) for test in self.tests for way in self.ways]

    def _training(self, run: PlannedRun, number: int, after: Step | None) -> Step:
        recipe, directory = self.plan.stage_recipe(run, number), run.stage_directory(number)
        launcher = [sys.executable, "-m"]
        settings = recipe | self._contents(recipe, TRAINED_FROM if number == 0 else TRAINED_WITH)
        if self.accelerate_config is not None:
            launcher += [LAUNCHER, "--config_file", self.accelerate_config, "--module"]
            settings["accelerate_config"] = launch = _launch_settings(self.accelerate_config)
            settings |= self._contents(launch.get("deepspeed_config") or {}, LAUNCHED_WITH)
        command = [*launcher, "luffy_trl", run.stages[number].command, "--config", str(directory / RECIPE)]
        what = f"stage {number + 1}, {run.stages[number].command}"
        return Step(what, directory, command, settings, recipe, after)

    def _merging(self, run: PlannedRun, number: int, after: Step) -> Step:
        stage = run.stage_directory(number)
        into = ["--merge", "--to", str(stage / MERGED)]
        command = [sys.executable, "-m", "luffy_trl", "push", str(stage / MODEL), *into]
        what = f"stage {number + 1}, merging the adapter"
        return Step(what, stage / "merging", command, {}, after=after, makes=stage / MERGED)

    def _evaluation(self, run: PlannedRun, test: TestSet, way: str, after: Step | None) -> Step:
        recipe, last = self.plan.recipe, len(run.stages) - 1
        directory = evaluation_directory(run, test.name, way)
        model, adapter = run.model(self.plan.base), None
        if run.stages and self.plan.is_adapter(run, last):
            model, adapter = self.plan.start(run, last), model
        arguments = {
            "dataset_name": test.dataset,
            "dataset_config": recipe.get("dataset_config") if test.dataset == recipe.get("dataset_name") else None,
            "dataset_split": test.split,
            "temperature": 0 if way == GREEDY else recipe.get("temperature", 1.0),
            "n_samples": None if way == GREEDY else self.n_samples,
            "max_new_tokens": recipe.get("max_completion_length", 256),
            "device": "cpu" if is_true(recipe.get("use_cpu")) else None,
            "reward_funcs": recipe.get("reward_funcs") or None,
            "reward_weights": recipe.get("reward_weights"),
            "solved_reward": recipe.get("solved_reward"),
            "solved_threshold": recipe.get("solved_threshold"),
        }
        own = self.plan.written(run, last) if run.stages else recipe
        more = with_model_args(own, model == self.plan.base, self.evaluate)
        flags = _flags({"model": model, "adapter": adapter} | arguments) + more
        command = [sys.executable, "-m", "luffy_trl", "eval", *flags]
        command += ["--name", run.key, "--output_dir", str(directory / "results")]
        settings = arguments | {"evaluate": more, "base": self.plan.base}
        read = {"dataset_name": test.dataset, "model_name_or_path": self.plan.base}
        settings |= self._contents(read, TRAINED_FROM)
        return Step(f"{way} answers to {test.name}", directory, command, settings, after=after)

    def _contents(self, recipe: Recipe, fields: Mapping[str, Callable[[str], str | None]]) -> dict[str, str]:
        """Fingerprints of the local files that fields name: they may be others under the same name."""
        found = {}
        for name, fingerprint in fields.items():
            path = recipe.get(name)
            if not isinstance(path, str):
                continue
            if path not in self._fingerprints:
                self._fingerprints[path] = fingerprint(path)
            if (contents := self._fingerprints[path]) is not None:
                found[f"contents of {name}"] = contents
        return found


def _flags(arguments: Mapping[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _launch_settings(path: str) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ComparisonError(
            f"--accelerate_config {path} must be YAML, a field and its value a line: {' '.join(str(error).split())}"
        ) from error


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
        end_orphan(directory)
        step.begin()
        start = time.monotonic()
        with open(directory / LOG, "a", encoding="utf-8") as log:
            said_before = log.tell()
            status, cpu_seconds = self._wait(step, log)
        took = _took_before(directory) + Took(time.monotonic() - start, cpu_seconds)
        if status != 0:
            (directory / ATTEMPTS).write_text(json.dumps(asdict(took)), encoding="utf-8")
            with open(directory / LOG, "rb") as file:
                file.seek(said_before)
                status, says = _reason(file.read().decode(errors="replace"), status, LAUNCHER in step.command)
            says += f" (all of it: {directory / LOG})"
            raise StageError(f"{step.what} ended with status {status}: {says}", status)
        step.end(took)

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


def _reason(log: str, status: int, is_launched: bool) -> tuple[int, str]:
    """Exit status, and what a command said last, on one line. A launcher puts its own in place of a usage error's."""
    usage_errors = USAGE_ERROR.findall(log)
    if usage_errors and (is_launched or status == USAGE_STATUS):
        return USAGE_STATUS, usage_errors[-1].strip()
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return status, " ".join(lines[-LAST_LINES:])[-600:]
