"""reasoning-gym's problems as a training and a test split in the data contract."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

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

    No problem is in both, nor twice in one. The test split does not depend on the training split's size.

    Raises:
        ValueError: for a task or an option that there is not, or more problems than there are.
    """
    task = parse_task(name)
    wanted = task.test_size + task.size
    rows = []
    with tqdm(total=wanted, desc=f"Making {task.name}", unit=" problems") as bar:
        for row in _distinct(task, wanted):
            rows.append(row)
            bar.update()
    if len(rows) < wanted:
        raise ValueError(
            f"{name} has hardly more than {len(rows)} different problems, but {wanted} are asked for: lower size "
            f"({task.size}) or test_size ({task.test_size}), or make the problems longer."
        )
    made = Dataset.from_list(rows)
    if not any(row["completion"] for row in rows):
        made = made.remove_columns("completion")
    splits = {"train": made.select(range(task.test_size, wanted)), "test": made.select(range(task.test_size))}
    return {split: dataset for split, dataset in splits.items() if len(dataset)}


def _distinct(task: GymTask, wanted: int) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for start in range(0, PATIENCE * wanted + LEAST_PATIENCE, MADE_AT_ONCE):
        numbers = range(start, start + MADE_AT_ONCE)
        for index, made in zip(
            numbers, ask([{"source": task.source, "index": index} for index in numbers]), strict=True
        ):
            key = " ".join(made["question"].split()) if "question" in made else None
            if key is None or key in seen:  # no problem: its worker ran out of time or memory
                continue
            seen.add(key)
            yield _row(made, task.source, index)
            if len(seen) == wanted:
                return


def _row(made: dict[str, Any], source: str, index: int) -> dict[str, Any]:
    working = made["working"]
    return {
        "prompt": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": made["question"]}],
        "completion": None if working is None else [{"role": "assistant", "content": working}],
        "solution": made["solution"],
        "task": source,
        "task_index": index,
    }
