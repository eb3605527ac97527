"""Kept samples: one JSON line each, appended while they are generated, so that a killed run can go on.

    OUTPUT_DIR/run.json               what the samples depend on; another run's samples are never mixed in
    OUTPUT_DIR/samples/TASK.jsonl     task, doc_id, repeat, prompt_hash, response, tokens, truncated; once scored, also
                                      problem, gold, answer and score

lm-eval's own response cache does not serve here: it does not keep sampled responses, and pickles the others.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from . import EvaluationError


RUN_FILE = "run.json"


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
    """

    def __init__(self, output_dir: str | Path, settings: dict[str, Any]):
        self.directory = Path(output_dir)
        self.samples: dict[tuple[str, int, int], Sample] = {}
        self.half_written = 0
        (self.directory / "samples").mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise EvaluationError(f"--output_dir {output_dir} is in use by another run.") from error
        for path in sorted((self.directory / "samples").glob("*.jsonl")):
            self._read(path)
        self.settings = self._check_manifest(settings)

    def close(self) -> None:
        self._lock.release()

    def append(self, samples: Iterable[Sample]) -> None:
        """Keep samples of which none is there yet, safe from a kill once this returns."""
        by_task: dict[str, list[Sample]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample)
            self.samples[sample.key] = sample
        for task, of_task in by_task.items():
            with open(self._path(task), "a", encoding="utf-8") as file:
                file.write("".join(map(_line, of_task)))
                file.flush()
                os.fsync(file.fileno())

    def rewrite(self, task: str) -> None:
        """Write a task's samples anew, in order, with what is known of them now."""
        of_task = sorted((s for s in self.samples.values() if s.task == task), key=lambda sample: sample.key)
        temporary = self._path(task).with_suffix(".tmp")
        temporary.write_text("".join(map(_line, of_task)), encoding="utf-8")
        os.replace(temporary, self._path(task))

    def _path(self, task: str) -> Path:
        return self.directory / "samples" / f"{task}.jsonl"

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        *lines, rest = content.split(b"\n")
        if rest:  # a kill in the middle of a write: generated again
            self.half_written += 1
            with open(path, "r+b") as file:
                file.truncate(len(content) - len(rest))
        for number, line in enumerate(lines, 1):
            try:
                sample = Sample(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise EvaluationError(
                    f"{path}, line {number} is no sample ({error}). Remove the line, and it is generated again."
                ) from error
            self.samples[sample.key] = sample

    def _check_manifest(self, settings: dict[str, Any]) -> dict[str, Any]:
        path = self.directory / RUN_FILE
        if self.samples:
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise EvaluationError(
                    f"--output_dir {self.directory} has samples, but {RUN_FILE}, which says how they were made, "
                    f"cannot be read ({error}). Choose another --output_dir."
                ) from error
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


def _differences(kept: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    different = [
        f"{name} {kept.get(name)!r} instead of {value!r}"
        for name, value in settings.items()
        if name != "data" and kept.get(name) != value
    ]
    changed = [task for task, value in settings["data"].items() if kept["data"].get(task, value) != value]
    return different + [f"other problems for {task}" for task in changed]


def _line(sample: Sample) -> str:
    # ensure_ascii: no response can hold a line break of its own, nor a lone surrogate that cannot be written
    return json.dumps({name: value for name, value in asdict(sample).items() if value is not None}) + "\n"
