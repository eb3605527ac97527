"""The benchmarks that are defined in `tasks/`, and lm-eval's task objects made of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from . import EvaluationError
from .scoring import RESULTS_BY_KIND


TASKS = files("luffy_trl") / "evaluation" / "tasks"


@dataclass(frozen=True)
class Benchmark:
    name: str
    label: str  # column of the tables
    kind: str  # "math" or "choice"
    data_sources: tuple[str, ...]  # its names in the original code's files
    problems: int  # to expect
    repeats: int  # samples a problem


@dataclass(frozen=True)
class TaskGroup:
    name: str
    title: str
    benchmarks: tuple[str, ...]


class Catalog:
    """`benchmarks` and `groups` by name, in the paper's order."""

    def __init__(self) -> None:
        self._manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        configs = {name: entry.cfg or {} for name, entry in self._manager.task_index.items()}
        self.groups = {
            name: TaskGroup(name, config["group_alias"], tuple(config["task"]))
            for name, config in configs.items()
            if "group" in config
        }
        ordered = [name for group in self.groups.values() for name in group.benchmarks]
        self.benchmarks = {name: _make_benchmark(name, configs[name]) for name in ordered}

    def expand(self, names: Sequence[str]) -> list[str]:
        """Benchmarks behind names of benchmarks and groups, each once.

        Raises:
            EvaluationError: for a name that is neither.
        """
        found: dict[str, None] = {}
        for name in names:
            if name not in self.groups and name not in self.benchmarks:
                known = ", ".join([*self.groups, *self.benchmarks])
                raise EvaluationError(f"--tasks {name}: there is no such task or group. There are {known}.")
            found |= dict.fromkeys(self.groups[name].benchmarks if name in self.groups else [name])
        return list(found)

    def with_sources(self, sources: Mapping[str, Any]) -> list[str]:
        """Benchmarks that are among the data sources of local files."""
        return [name for name, b in self.benchmarks.items() if set(b.data_sources) & set(sources)]

    def on_hub(self, name: str) -> tuple[str, str | None, str]:
        """The dataset, its configuration and the split that a benchmark is read from."""
        config = self._manager.task_index[name].cfg or {}
        return config["dataset_path"], config.get("dataset_name"), config["test_split"]

    def task_from_hub(self, name: str) -> ConfigurableTask:
        """
        Raises:
            EvaluationError: if the dataset is not there, is gated, or has changed.
        """
        config = self._manager.task_index[name].cfg or {}
        try:
            return self._load(name)
        except (OSError, ValueError) as error:  # missing, gated, offline, another schema
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise EvaluationError(
                f"{name}: {config['dataset_path']} could not be loaded from the Hub: {reason.rstrip('.')}. "
                "--data_files reads problems from local files."
            ) from error

    def task_from_documents(self, name: str, local: Mapping[str, Dataset]) -> ConfigurableTask:
        """
        Args:
            local: documents by data source, as `documents.read_local` returns them.

        Raises:
            EvaluationError: if none of them is the benchmark's.
        """
        found = [local[source] for source in self.benchmarks[name].data_sources if source in local]
        if not found:
            raise EvaluationError(
                f"--data_files has no problems for {name} (data_source {self.benchmarks[name].data_sources[0]}), only "
                f"for {', '.join(local)}."
            )
        dataset = DatasetDict({"test": found[0]})

        def load(**_: Any) -> DatasetDict:
            return dataset

        local_config = {"custom_dataset": load, "dataset_path": None, "dataset_name": None, "test_split": "test"}
        config = self._manager.task_index[name].cfg or {}
        results = RESULTS_BY_KIND[self.benchmarks[name].kind]
        return self._load(config | local_config | {"process_docs": None, "process_results": results})

    def _load(self, spec: str | dict[str, Any]) -> ConfigurableTask:
        # It advises on command line options that are not ours, for each custom dataset
        logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
        [task] = self._manager.load([spec])["tasks"].values()
        return task


def configure(
    task: ConfigurableTask,
    repeats: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    process_results: Callable[[Mapping[str, Any], list], dict[str, float]],
) -> None:
    """Set what the command line decides."""
    generation = generation_arguments(dict(task.config.generation_kwargs or {}), temperature, top_p, max_new_tokens)
    task.set_config("repeats", repeats)
    task.set_config("generation_kwargs", generation)
    task.set_config("process_results", process_results)


def generation_arguments(
    given: Mapping[str, Any], temperature: float, top_p: float, max_new_tokens: int
) -> dict[str, Any]:
    """lm-eval's generation arguments with what the command line decides. A temperature of 0 is greedy."""
    generation = {**given, "temperature": temperature, "max_gen_toks": max_new_tokens}
    if temperature > 0:
        return generation | {"do_sample": True, "top_p": top_p}
    return {name: value for name, value in generation.items() if name not in ("top_p", "top_k")} | {"do_sample": False}


def _make_benchmark(name: str, config: Mapping[str, Any]) -> Benchmark:
    about = config["metadata"]
    sources = tuple(about["data_source"])
    return Benchmark(name, about["label"], about["kind"], sources, about["problems"], config["repeats"])
