"""The problems of benchmarks, from files or the Hub, in the schemas that benchmarks come in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .filters import BenchmarkIndex
from .loading import first_rows, load_splits


# Where benchmarks keep the problem; `prompt` is LUFFY's own schema (messages), the others are texts
PROBLEM_COLUMNS = ("problem", "question", "Problem", "Question", "prompt")


def load_benchmarks(names: Sequence[str], ngram_size: int) -> BenchmarkIndex:
    """Index the problems of every split of every benchmark, and say how many there are.

    Args:
        names: files, directories or Hub ids.

    Raises:
        ValueError: if one cannot be read, or has no column with problems.
        OSError: if one cannot be found or reached.
    """
    index = BenchmarkIndex(ngram_size)
    for name in names:
        where = f"--benchmarks {name}"
        problems = 0
        for split in load_splits(name, where).values():
            columns = list(first_rows(split, 1, where)[0])
            column = next((column for column in PROBLEM_COLUMNS if column in columns), None)
            if column is None:
                raise ValueError(
                    f"{where} has the columns {', '.join(columns)}, none of which is a problem: expected "
                    f"{', '.join(PROBLEM_COLUMNS)}."
                )
            for row in split:
                problem = _problem(row[column])
                if problem:
                    index.add(_benchmark_name(row, name), problem)
                    problems += 1
        if problems == 0:
            raise ValueError(f"{where}: none of its rows has a problem that is a text.")
        print(f"{name}: {problems:,} benchmark problems to keep out", flush=True)
    return index


def _problem(value: Any) -> str | None:
    if isinstance(value, list):
        messages = [message for message in value if isinstance(message, dict)]
        texts = [message.get("content") for message in messages if message.get("role") == "user"]
        value = "\n".join(text for text in texts if isinstance(text, str))
    return value.strip() if isinstance(value, str) else None


def _benchmark_name(row: dict[str, Any], name: str) -> str:
    source = row.get("data_source")
    return source if isinstance(source, str) else Path(name).stem if Path(name).exists() else name
