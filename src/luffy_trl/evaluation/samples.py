"""Kept samples: one JSON line each, appended while they are generated, so that a killed run can go on.

    OUTPUT_DIR/run.json                        what the samples depend on; another run's are never mixed in
    OUTPUT_DIR/samples/TASK.jsonl              task, doc_id, repeat, prompt_hash, response, tokens, truncated; once
                                               scored, also problem or prompt, gold, answer, rewards and score
    OUTPUT_DIR/samples/TASK.process-2.jsonl    those of a second process, until the last one scores all

lm-eval's own response cache does not serve here: it does not keep sampled responses, and pickles the others.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runs.kept_lines import LONGEST_LINE, is_half_written, line_of
from . import EvaluationError, LeftToOthersError, ScoringError
from .claims import Claims
from .lines import LINE_START, Key, Sample, sample_of
from .manifest import agree


PART = re.compile(r"\.process-(\d+)$")  # of a file's name, before .jsonl
# What processes claim: to look at all and change what is there, to be one of them, and each sample while it is made
GATE, FIRST_SAMPLE = 0, 1024
PROCESSES = range(1, FIRST_SAMPLE)
# Seconds in which others get through the gate, unless one of them grades
GATE_PATIENCE = 30.0


class SampleStore:
    """The samples of one output directory, which several processes may share: each has files of its own there.

    Args:
        settings: what the samples depend on, JSON-serialisable. `data`, by task, may grow; all else must stay.
        patience: seconds to wait for a process that scores.

    Raises:
        EvaluationError: if the directory holds samples made with other settings, or one that scores, or a file is
            damaged. Nothing there is changed then.
    """

    def __init__(self, output_dir: str | Path, settings: dict[str, Any], patience: float | None = None):
        self.directory = Path(output_dir)
        self.patience = GATE_PATIENCE if patience is None else patience
        self.samples: dict[Key, Sample] = {}
        self.half_written = 0
        self._read_bytes: dict[Path, int] = {}
        self._ends: list[tuple[Path, bytes]] = []  # files of nobody, and what is missing behind what was read of them
        with self._writing():
            (self.directory / "samples").mkdir(parents=True, exist_ok=True)
            self._claims = Claims(self.directory / ".lock")
            try:
                self._take_gate()
                self.process = next((number for number in PROCESSES if self._claims.take(number)), 0)
                if not self.process:
                    raise EvaluationError(f"--output_dir {output_dir} is in use by {len(PROCESSES)} processes.")
                self._read_all()
                self.settings = agree(self.directory, settings, bool(self.samples), self._others())
                self._mend_ends()
            except BaseException:
                self._claims.close()
                raise
            self._claims.release(GATE)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, a directory where a file belongs: one sentence, and what was kept before stays."""
        try:
            yield
        except OSError as error:
            raise EvaluationError(f"--output_dir {self.directory} cannot be read or written: {error}.") from error

    def close(self) -> None:
        self._claims.close()

    # Among several processes

    def _take_gate(self) -> None:
        end = time.monotonic() + self.patience
        while not self._claims.take(GATE):
            if time.monotonic() > end:
                raise ScoringError(
                    f"--output_dir {self.directory} is in use by another run, which scores its samples. Start again "
                    "when it has ended."
                )
            time.sleep(0.05)

    def _is_alive(self, process: int) -> bool:
        if process == self.process or not self._claims.take(process):
            return process != self.process
        self._claims.release(process)
        return False

    def _others(self) -> bool:
        return any(map(self._is_alive, PROCESSES))

    @contextmanager
    def claimed(self, keys: Collection[Key]) -> Iterator[set[Key]]:
        """Within, this process alone makes these samples. Yields the missing ones; none, if another makes any."""
        numbers = [_number(key) for key in keys]
        taken = 0
        try:
            while taken < len(numbers) and self._claims.take(numbers[taken]):
                taken += 1
            if taken == len(numbers):
                self.refresh()  # one may have been kept before it was claimed
            yield {key for key in keys if key not in self.samples} if taken == len(numbers) else set()
        finally:
            for number in numbers[:taken]:
                self._claims.release(number)

    def refresh(self) -> None:
        """Read what other processes have kept by now."""
        with self._writing():
            self._read_all(at_work=True)

    def be_last(self) -> None:
        """To score, and let nobody in until `close`.

        Raises:
            LeftToOthersError: if another process is at work; this one is not any more.
        """
        with self._writing():
            self._take_gate()
            if self._others():
                self._claims.release(self.process)  # before the gate: one of two that end together must see it
                self._claims.release(GATE)
                raise LeftToOthersError
            self._read_all()

    # Files

    def append(self, samples: Iterable[Sample]) -> None:
        """Keep samples of which none is there yet, safe from a kill once this returns."""
        by_task: dict[str, list[Sample]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample)
            self.samples[sample.key] = sample
        for task, of_task in by_task.items():
            with self._writing(), open(self._path(task, self.process), "a", encoding="utf-8") as file:
                file.write("".join(map(line_of, of_task)))
                file.flush()
                os.fsync(file.fileno())

    def rewrite(self, task: str) -> None:
        """Write a task's samples anew, in order and one file, with what is known of them now. For the last process."""
        of_task = sorted((s for s in self.samples.values() if s.task == task), key=lambda sample: sample.key)
        path = self._path(task)
        temporary = path.with_suffix(".tmp")
        with self._writing():
            temporary.write_text("".join(map(line_of, of_task)), encoding="utf-8")
            os.replace(temporary, path)
            for part in self._files():
                if part != path and _task_and_process(part)[0] == task:
                    part.unlink()

    def _path(self, task: str, process: int = 1) -> Path:
        return self.directory / "samples" / (f"{task}.jsonl" if process == 1 else f"{task}.process-{process}.jsonl")

    def _files(self) -> list[Path]:
        return sorted((self.directory / "samples").glob("*.jsonl"))

    def _read_all(self, at_work: bool = False) -> None:
        """What other files hold beyond what was read before. `at_work`: ends are taken for others' to finish."""
        for path in self._files():
            process = _task_and_process(path)[1]
            if not at_work or process != self.process:
                self._read(path, at_work or self._is_alive(process))

    def _read(self, path: Path, at_work: bool) -> None:
        if not path.is_file():  # a directory; a pipe, which nobody may ever write to
            raise EvaluationError(f"{path} is no file of samples. Move it out of there.")
        task, whole = _task_and_process(path)[0], self._read_bytes.get(path, 0)
        with open(path, "rb") as file:
            file.seek(whole)
            # No more than a line at a time: a file of another program may be one line without an end
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if at_work and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    break  # in the middle of a write
                try:
                    sample = sample_of(line, task)
                except (ValueError, RecursionError) as error:
                    if isinstance(error, json.JSONDecodeError) and is_half_written(line, LINE_START):
                        # a kill in the middle of a write: generated again
                        self.half_written += 1
                        self._ends.append((path, b""))
                        break
                    behind = f" behind its first {self._read_bytes[path]} bytes" if path in self._read_bytes else ""
                    raise EvaluationError(
                        f"{path}, line {number}{behind} is no sample ({error}). Remove the line, and it is generated "
                        "again."
                    ) from error
                whole += len(line)
                self.samples[sample.key] = sample
                if not line.endswith(b"\n"):
                    self._ends.append((path, b"\n"))
        self._read_bytes[path] = whole

    def _mend_ends(self) -> None:
        """Have each file end with a whole line, for others to be appended."""
        for path, missing in self._ends:
            with open(path, "r+b") as file:
                file.truncate(self._read_bytes[path])
                file.seek(self._read_bytes[path])
                file.write(missing)
            self._read_bytes[path] += len(missing)


def _task_and_process(path: Path) -> tuple[str, int]:
    part = PART.search(path.stem)
    return (path.stem, 1) if part is None else (path.stem[: part.start()], int(part[1]))


def _number(key: Key) -> int:
    """What stands for a sample among the claims: the same in every process."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return FIRST_SAMPLE + (int.from_bytes(digest[:8], "big") >> 2)
