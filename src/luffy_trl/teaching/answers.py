"""What teachers have answered: one JSON line each, kept as it arrives, so that no question is asked twice.

    OUTPUT_DIR/_answers/run.json         what the answers depend on, by teacher
    OUTPUT_DIR/_answers/TEACHER.jsonl    an answer a line

An answer belongs to a question, not to a dataset's row: the dataset may grow, shrink or change its order.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ..runs.kept_lines import LONGEST_LINE, append_lines, line_at, read_lines, record_from, shown
from ..runs.whole_files import write_whole


# Neither `datasets` nor our own reader looks into a directory whose name begins so
ANSWERS_DIR = "_answers"
SETTINGS_FILE = "run.json"
START_OF_ANSWERS = b'{"teacher": "'

# Of a local model's settings: a fingerprint, which says nothing to a person
MODEL_FILES = "files"
OTHER_FILES = "other files in the model's directory than now"

Key: TypeAlias = tuple[str, str, int]


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer of a teacher, as it came.

    Attributes:
        problem: the key of what was asked.
        finish: "stop", "length" where it was cut off, "error" where the question was refused for good, or whatever
            else the server says ("content_filter").
        text: the answer, `thought` what came apart from it.
        token_ids: what was sampled, its end included, where the teacher says; or `tokens`, as a server spells them.
        logps: of these.
    """

    teacher: str
    problem: str
    repeat: int
    finish: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    thought: str | None = None
    error: str | None = None
    token_ids: list[int] | None = None
    tokens: list[str] | None = None
    logps: list[float] | None = None

    @property
    def key(self) -> Key:
        return self.teacher, self.problem, self.repeat


class AnswerStore:
    """The answers of one output directory, which the caller holds.

    Args:
        settings: by teacher, what its answers depend on, JSON-serialisable.

    Raises:
        ValueError: if answers of a teacher were made with other settings, or a file is damaged. Nothing is changed
            then.
    """

    def __init__(self, output_dir: Path, settings: Mapping[str, Mapping[str, Any]]):
        self.directory = output_dir / ANSWERS_DIR
        self.answers: dict[Key, TeacherAnswer] = {}  # without their tokens, which may be large
        self.half_written = 0
        self._places: dict[Key, tuple[Path, int]] = {}
        ends = []
        for path in sorted(self.directory.glob("*.jsonl")):
            found, end = read_lines(path, _answer_and_start, START_OF_ANSWERS, "answer")
            for answer, start in found:
                self._remember(answer, path, start)
            ends += [end] if end else []
        made_with = self._checked(output_dir, settings)
        self.directory.mkdir(parents=True, exist_ok=True)
        for end in ends:
            end.mend()
            self.half_written += end.half_written
        write_whole(self.directory / SETTINGS_FILE, json.dumps(made_with, indent=2) + "\n")

    def append(self, answers: Iterable[TeacherAnswer]) -> None:
        """Keep answers of one teacher, safe from a kill once this returns."""
        answers = list(answers)
        path = self.directory / f"{file_stem(answers[0].teacher)}.jsonl"
        for answer, start in zip(answers, append_lines(path, answers), strict=True):
            self._remember(answer, path, start)

    def whole(self, key: Key) -> TeacherAnswer:
        """An answer with its tokens and log-probs."""
        return record_from(line_at(*self._places[key]), TeacherAnswer, "answer")

    def _remember(self, answer: TeacherAnswer, path: Path, start: int) -> None:
        self.answers[answer.key] = replace(answer, token_ids=None, tokens=None, logps=None)
        self._places[answer.key] = path, start

    def _checked(self, output_dir: Path, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """All settings, of before and now, once those of teachers whose answers are kept agree."""
        answered = {teacher for teacher, _, _ in self.answers}
        before = self._read_settings(output_dir) if answered else {}
        kept = {teacher: made for teacher, made in before.items() if teacher in answered}
        for teacher, now in settings.items():
            if teacher in kept and (different := _differences(kept[teacher], now)):
                raise ValueError(
                    f"--output_dir {output_dir} holds answers of {teacher} made with {' and '.join(different)}. "
                    "Choose another --output_dir, or the same settings to go on."
                )
        return {**settings, **kept}

    def _read_settings(self, output_dir: Path) -> dict[str, Any]:
        path = self.directory / SETTINGS_FILE
        try:
            with open(path, "rb") as file:
                before = json.loads(file.read(LONGEST_LINE).decode())
            if not isinstance(before, dict) or not all(isinstance(made, dict) for made in before.values()):
                raise ValueError("it is not as make-demonstrations writes it")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"--output_dir {output_dir} has answers, but {path.relative_to(output_dir)}, which says how they were "
                f"made, cannot be read ({error}). Choose another --output_dir."
            ) from error
        return before


def _answer_and_start(line: bytes, start: int) -> tuple[TeacherAnswer, int]:
    return record_from(line, TeacherAnswer, "answer"), start


def file_stem(teacher: str) -> str:
    """The name of a teacher's file."""
    return re.sub(r"[^\w.-]+", "-", teacher).lstrip(".-") or "teacher"


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        OTHER_FILES if name == MODEL_FILES else f"--{name} {shown(kept.get(name))} instead of {value!r}"
        for name, value in now.items()
        if kept.get(name) != value and not (name == "logprobs" and kept.get(name))  # more than is asked for now
    ]
