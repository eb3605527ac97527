"""reasoning-gym's problems as a training and a test split in the data contract."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from ..rewards.pool import Pools, default_workers
from .gym import GymTask, parse_task


INSTRUCTION = "Put the final answer in \\boxed{}."
MADE_AT_ONCE = 200
# Problems that are looked at for one that is wanted: of few terms and digits most are there again and again
PATIENCE, LEAST_PATIENCE = 20, 1000
LIMITS = {"timeout": 30.0, "memory_limit": 8192}  # seconds for a problem or an answer, MiB of address space a worker

pools = Pools("luffy_trl.tasks.gym_worker")


def ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The workers' replies.

    Raises:
        ValueError: if reasoning-gym is not installed, or for what there is no problem of.
    """
    if find_spec("reasoning_gym") is None:
        raise ValueError("reasoning-gym is not installed: pip install 'luffy_trl[reasoning-gym]'.")
    with pools.borrowed() as pool:
        replies = pool.run([request | LIMITS for request in requests], default_workers())
    error = next((reply["error"] for reply in replies if "error" in reply), None)
    if error is not None:
        raise ValueError(error)
    return replies


def gym_splits(name: str) -> dict[str, Dataset]:
    """The splits of `reasoning_gym:TASK,option=value,...`: "train", and "test" unless `test_size` is 0.

    No problem is in both, nor twice in one, nor in other words. The test split does not depend on the training split's
    size.

    Raises:
        ValueError: for a task or an option that there is not, or that makes no problem, or too few.
    """
    task = parse_task(name)
    wanted = task.test_size + task.size
    rows, skipped = _distinct(task, wanted)
    if len(rows) < wanted:
        raise ValueError(
            f"{name} has hardly more than {len(rows)} different problems, but {wanted} are asked for: lower size "
            f"({task.size}) or test_size ({task.test_size}), or make the problems longer."
        )
    if skipped:
        PartialState().print(f"{name}: {skipped} problems could not be made, and were left out.")
    made = Dataset.from_list(rows)
    if not any(row["completion"] for row in rows):
        made = made.remove_columns("completion")
    splits = {"train": made.select(range(task.test_size, wanted)), "test": made.select(range(task.test_size))}
    return {split: dataset for split, dataset in splits.items() if len(dataset)}


def _distinct(task: GymTask, wanted: int) -> tuple[list[dict[str, Any]], int]:
    """The rows of so many problems, or of as many as there are, and how many could not be made on the way."""
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    skipped = 0
    with tqdm(total=wanted, desc=f"Making {task.name}", unit=" problems") as bar:
        for index, problem in _problems(task, PATIENCE * wanted + LEAST_PATIENCE):
            if "question" not in problem:  # its generator failed, or its worker ran out of time or memory
                skipped += 1
            elif seen.isdisjoint(problem["keys"]):
                seen.update(problem["keys"])
                rows.append(_row(problem, task.source, index))
                bar.update()
            if len(rows) == wanted:
                break
    return rows, skipped


def _problems(task: GymTask, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Raises:
        ValueError: if none of the first problems can be made.
    """
    for start in range(0, count, MADE_AT_ONCE):
        numbers = range(start, start + MADE_AT_ONCE)
        made = ask([{"source": task.source, "index": index} for index in numbers])
        if start == 0 and not any("question" in problem for problem in made):
            reason = made[0].get("failed") or made[0]["outcome"]
            raise ValueError(f"{task.source}: no problem can be made with these options ({reason}).")
        yield from zip(numbers, made, strict=True)


def _row(made: dict[str, Any], source: str, index: int) -> dict[str, Any]:
    working = made["working"]
    return {
        "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": made["question"]}],
        "completion": None if working is None else [{"role": "assistant", "content": working}],
        "solution": made["solution"],
        "task": source,
        "task_index": index,
    }
