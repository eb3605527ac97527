"""The completions that TRL keeps with `log_completions`, within limits: anyone's text, of any length."""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from ..demonstrations.rendering import without_nones
from .logs import COMPLETIONS, Run


# Characters of a text that are shown, from its beginning and its end
MOST_CHARACTERS = 4000
# Columns of TRL's table that are no reward function's; "demonstration" is LuffyTrainer's
OTHER_COLUMNS = ("step", "prompt", "completion", "advantage", "demonstration")


@dataclass
class Completion:
    text: str
    rewards: dict[str, float | None]
    advantage: float | None
    demonstration: bool
    tokens: list[tuple[str, float | None]] = field(default_factory=list)  # text, probability: see token_probs.py
    is_trajectory: bool = False  # of several turns, or with calls of tools: the text names who says what


@dataclass
class Group:
    prompt: Any  # str, or list of messages
    completions: list[Completion]


@dataclass
class KeptStep:
    step: int
    groups: list[Group]
    left_out: int  # rows of this step beyond the report's limit


def read_completions(run: Run, most: int) -> list[KeptStep]:
    """The kept steps of a run, evenly spread so that they hold at most `most` completions, the last one included.

    What was left out is said in the run's notes. None where the directory's completions are another run's.
    """
    if not run.has_completions:
        return []
    files = sorted(run.directory.glob(f"{COMPLETIONS}/{COMPLETIONS}_*.parquet"), key=_step_of)
    chosen = _spread(files, _rows_of_last(files), most)
    steps: list[KeptStep] = []
    unreadable = 0
    for path in chosen:
        try:
            left = most - sum(len(group.completions) for step in steps for group in step.groups)
            step = _read_step(path, left)
        except (ArrowException, OSError, KeyError, ValueError, TypeError):
            unreadable += 1
            continue
        if step.groups:
            steps.append(step)
    steps.sort(key=lambda step: step.step)
    if unreadable:
        run.notes.append(f"{unreadable} files of completions cannot be read (the newest may be being written).")
    if len(steps) < len(files):
        run.notes.append(f"completions of {len(steps)} of the {len(files)} logged steps are shown.")
    left_out = sum(step.left_out for step in steps)
    if left_out:
        run.notes.append(f"{left_out} more completions of the shown steps are left out.")
    return steps


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """The beginning and the end of a long text, and how much is missing between."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def prompt_text(prompt: Any) -> str:
    """A prompt for a reader: messages with their roles. What is no message is shown as it is."""
    if isinstance(prompt, list):
        return "\n".join(_turn(message) for message in prompt)
    return str(prompt)


def _turn(message: Any) -> str:
    """Who says what, and a line for each call of a tool."""
    if not isinstance(message, dict):
        return message_text(message)
    name = f" {message['name']}" if message.get("role") == "tool" and message.get("name") else ""
    calls, said = list(map(_call, _calls(message))), f"{message.get('role')}{name}: {message_text(message)}"
    return "\n".join([said.rstrip(), *calls]) if calls else said


def _calls(message: Any) -> list[Any]:
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    return calls if isinstance(calls, list) else []


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        return f"  calls {function}"
    arguments = without_nones(function.get("arguments") or {})  # a table fills in what other calls have
    return f"  calls {function.get('name')}({json.dumps(arguments, ensure_ascii=False, default=str)})"


def message_text(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else message
    if isinstance(content, list):
        return "".join(
            str(part.get("text") or f"[{part.get('type')}]") if isinstance(part, dict) else str(part)
            for part in content
        )
    return "" if content is None else str(content)


def _step_of(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _rows_of_last(files: list[Path]) -> int:
    """Rows of a file; all of a run's generations are of one size. 1 if none can be read."""
    for path in reversed(files[-3:]):
        try:
            return max(pq.read_metadata(path).num_rows, 1)
        except (ArrowException, OSError):
            continue
    return 1


def _spread(files: list[Path], rows: int, most: int) -> list[Path]:
    """As many files as hold `most` rows, evenly spread, the last one first: it is never the one without room."""
    count = min(len(files), max(most // rows, 1))
    if count <= 1:
        return files[-1:]
    picked = {round(i * (len(files) - 1) / (count - 1)) for i in range(count)}
    return [files[i] for i in sorted(picked, reverse=True)]


def _read_step(path: Path, most: int) -> KeptStep:
    with pq.ParquetFile(path) as file:
        total = file.metadata.num_rows
        rows: list[dict[str, Any]] = next(
            (batch.to_pylist() for batch in file.iter_batches(batch_size=max(most, 1))), []
        )[: max(most, 0)]
    groups = []
    # the rows of a group follow one another
    for _, members in groupby(rows, key=lambda row: repr(row["prompt"])):
        group = list(members)
        groups.append(Group(group[0]["prompt"], [_completion(row) for row in group]))
    return KeptStep(_step_of(path), groups, total - len(rows))


def _completion(row: dict[str, Any]) -> Completion:
    value = row["completion"]
    rewards = {
        name: _number(reward)
        for name, reward in row.items()
        if name not in OTHER_COLUMNS and (reward is None or isinstance(reward, int | float))
    }
    messages = [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []
    is_trajectory = len(messages) > 1 or any(map(_calls, messages))
    text = "".join(map(message_text, value)) if isinstance(value, list) and not is_trajectory else prompt_text(value)
    advantage, demonstration = _number(row.get("advantage")), bool(row.get("demonstration"))
    return Completion(text, rewards, advantage, demonstration, is_trajectory=is_trajectory)


def _number(value: Any) -> float | None:
    """None for NaN and infinities too, which JSON does not have."""
    if not isinstance(value, int | float) or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{float(value):.4g}")
