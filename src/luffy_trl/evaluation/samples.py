"""Kept samples: one JSON line each, appended while they are generated, so that a killed run can go on.

    OUTPUT_DIR/run.json               what the samples depend on; another run's samples are never mixed in
    OUTPUT_DIR/samples/TASK.jsonl     task, doc_id, repeat, prompt_hash, response, tokens, truncated; once scored, also
                                      problem, gold, answer and score

lm-eval's own response cache does not serve here: it does not keep sampled responses, and pickles the others.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..runs.kept_lines import LONGEST_LINE, End, append_lines, line_of, read_lines, record_from, shown
from . import EvaluationError


RUN_FILE = "run.json"
# What each line begins with
LINE_START = b'{"task": "'


@dataclass
class Sample:
    """One response. `tokens` counts its end-of-sequence token; `truncated`: it reached max_new_tokens instead."""

    task: str
    doc_id: int
    repeat: int
    prompt_hash: str
    response: str
    tokens: int
    truncated: bool
    # Known once scored
    problem: str | None = None
    gold: str | None = None
    answer: str | None = None  # what was taken for it; stays None where there is none
    score: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.doc_id, self.repeat


def prompt_hash(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


class SampleStore:
    """The samples of one output directory, which it locks against a second run.

    Args:
        settings: what the samples depend on, JSON-serialisable. `data`, by task, may grow; all else must stay.

    Raises:
        EvaluationError: if the directory holds samples made with other settings, or is in use, or a file is damaged.
            Nothing there is changed then.
    """

    def __init__(self, output_dir: str | Path, settings: dict[str, Any]):
        self.directory = Path(output_dir)
        self.samples: dict[tuple[str, int, int], Sample] = {}
        self.half_written = 0
        self._ends: list[End] = []
        self._lock = FileLock(self.directory / ".lock", timeout=0)
        with self._writing():
            (self.directory / "samples").mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise EvaluationError(f"--output_dir {output_dir} is in use by another run.") from error
            try:
                for path in sorted((self.directory / "samples").glob("*.jsonl")):
                    self._read(path)
                self.settings = self._check_manifest(settings)
                self._mend_ends()
            except BaseException:
                self._lock.release()
                raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, a directory where a file belongs: one sentence, and what was kept before stays."""
        try:
            yield
        except OSError as error:
            raise EvaluationError(f"--output_dir {self.directory} cannot be read or written: {error}.") from error

    def close(self) -> None:
        self._lock.release()

    def append(self, samples: Iterable[Sample]) -> None:
        """Keep samples of which none is there yet, safe from a kill once this returns."""
        by_task: dict[str, list[Sample]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample)
            self.samples[sample.key] = sample
        for task, of_task in by_task.items():
            with self._writing():
                append_lines(self._path(task), of_task)

    def rewrite(self, task: str) -> None:
        """Write a task's samples anew, in order, with what is known of them now."""
        of_task = sorted((s for s in self.samples.values() if s.task == task), key=lambda sample: sample.key)
        temporary = self._path(task).with_suffix(".tmp")
        with self._writing():
            temporary.write_text("".join(map(line_of, of_task)), encoding="utf-8")
            os.replace(temporary, self._path(task))

    def _path(self, task: str) -> Path:
        return self.directory / "samples" / f"{task}.jsonl"

    def _read(self, path: Path) -> None:
        if not path.is_file():  # a directory; a pipe, which nobody may ever write to
            raise EvaluationError(f"{path} is no file of samples. Move it out of there.")
        try:
            samples, end = read_lines(path, lambda line, _: _sample(line, path.stem), LINE_START, "sample")
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        self.samples |= {sample.key: sample for sample in samples}
        if end is not None:
            self.half_written += end.half_written  # a kill in the middle of a write: generated again
            self._ends.append(end)

    def _mend_ends(self) -> None:
        for end in self._ends:
            end.mend()

    def _check_manifest(self, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.directory / RUN_FILE
        if self.samples or os.path.lexists(path):
            try:
                kept = _manifest(path)
            except (OSError, ValueError, RecursionError) as error:
                holds = f"holds a {RUN_FILE} that is damaged, or not of luffy-trl eval ({error})"
                if self.samples:
                    holds = f"has samples, but {RUN_FILE}, which says how they were made, cannot be read ({error})"
                raise EvaluationError(
                    f"--output_dir {self.directory} {holds}. Choose another --output_dir."
                ) from error
        if self.samples:
            differences = _differences(kept, settings)
            if differences:
                raise EvaluationError(
                    f"--output_dir {self.directory} holds samples made with {' and '.join(differences)}. Choose "
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


def _sample(line: bytes, task: str) -> Sample:
    """The sample that a line of a task's file holds. Raises ValueError or RecursionError if it is none."""
    sample = record_from(line, Sample, "sample")
    if sample.task != task:
        raise ValueError(f"`task` is {shown(sample.task)}, in the file of {task!r}")
    return sample


def _differences(kept: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    different = [
        f"{name} {shown(kept.get(name))} instead of {value!r}"
        for name, value in settings.items()
        if name != "data" and kept.get(name) != value
    ]
    changed = [task for task, value in settings["data"].items() if kept["data"].get(task, value) != value]
    return different + [f"other problems for {task}" for task in changed]
