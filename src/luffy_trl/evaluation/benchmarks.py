"""The paper's benchmarks as problem sets: their problems, how often each is sampled, their scores and their tables."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from . import EvaluationError, tables
from .catalog import Catalog, configure
from .comparison import compared_rows
from .documents import fingerprint, read_local
from .generation import KeepingLM
from .sampling import Sampler
from .scoring import Scorer
from .templates import FROM_DATA


class Benchmarks:
    """Those of `--tasks` and `--data_files`, run by lm-eval's evaluator.

    Raises:
        EvaluationError: for tasks, files and comparisons that are not there, or cannot be read.
    """

    have_images = False

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.notes: list[str] = []
        self.catalog = Catalog()
        self.groups = {name: group.benchmarks for name, group in self.catalog.groups.items()}
        self.compared = compared_rows(args.compare, self.groups)
        self.labels = {name: benchmark.label for name, benchmark in self.catalog.benchmarks.items()}
        self.tasks = self._load_tasks()
        self.repeats = {name: self._repeats(name) for name in self.tasks}

    def _load_tasks(self) -> dict[str, ConfigurableTask]:
        args = self.args
        if args.data_files is None:
            names = self.catalog.expand(args.tasks or list(self.catalog.groups))
            tasks = {name: self.catalog.task_from_hub(name) for name in names}
        else:
            names = self.catalog.expand(args.tasks or [])
            local, repeated = read_local(args.data_files)
            for source, count in repeated.items():
                self.notes.append(
                    f"Note: {count} repeated rows of {source} were left out; --n_samples sets the repeats."
                )
            names = names or self.catalog.with_sources(local)
            if not names:
                raise EvaluationError(f"--data_files holds no known data_source, only {', '.join(local)}.")
            tasks = {name: self.catalog.task_from_documents(name, local) for name in names}
        for name, task in tasks.items():
            found, expected = len(task.task_docs), self.catalog.benchmarks[name].problems
            if found != expected:
                self.notes.append(f"Note: {self.labels[name]} has {found} problems here; the paper's has {expected}.")
        if args.limit is not None:
            self.notes.append(f"Note: --limit {args.limit}: only the first problems of each benchmark were used.")
        return tasks

    def _repeats(self, name: str) -> int:
        repeats = self.catalog.benchmarks[name].repeats
        if repeats == 1 or self.args.temperature == 0:  # greedy samples would all be the same
            return 1
        return self.args.n_samples or repeats

    def count(self, name: str) -> int:
        # Not `eval_docs`, which converts the dataset anew each time
        documents = len(self.tasks[name].task_docs)
        return documents if self.args.limit is None else min(documents, self.args.limit)

    def fingerprints(self) -> dict[str, str]:
        return {name: fingerprint(task.task_docs) for name, task in self.tasks.items()}

    def sample_and_score(self, sampler: Sampler) -> dict[str, Any]:
        """Every sample made, kept and scored. Returns lm-eval's own results."""
        scorer = Scorer(sampler.store, {b.name: b.kind for b in self.catalog.benchmarks.values()}, self.args.thought)

        def score(requests: Sequence[Instance]) -> None:
            documents: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in self.tasks}
            for request in requests:
                documents[str(request.task_name)][int(request.doc_id or 0)] = request.doc
            for name, of_task in documents.items():
                scorer.score(name, of_task)

        self._configure_tasks(sampler)
        results = evaluator.evaluate(
            KeepingLM(sampler, self.args.template, score),
            {"tasks": self.tasks},
            limit=self.args.limit,
            bootstrap_iters=1,  # the error of a mean has a formula: nothing is drawn
            log_samples=False,
            system_instruction=None if self.args.system_prompt == FROM_DATA else self.args.system_prompt,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
        self.notes += [
            f"Note: Math-Verify cannot read the right answer of {self.labels[name]}'s problems "
            f"{', '.join(map(str, sorted(problems)))}: no response to them counts as right."
            for name, problems in scorer.unreadable.items()
            if problems
        ]
        return {"lm_eval": results["results"], "thought": self.args.thought}

    def _configure_tasks(self, sampler: Sampler) -> None:
        args = self.args
        for name, task in self.tasks.items():
            results = self._results_of(name, sampler)
            configure(task, self.repeats[name], args.temperature, args.top_p, args.max_new_tokens, results)
            if args.system_prompt == FROM_DATA:
                task.set_config("description", "system")

    def _results_of(self, name: str, sampler: Sampler) -> Callable[[Mapping[str, Any], list], dict[str, float]]:
        """What tells lm-eval a problem's score. A function, not a method: lm-eval copies its configuration deeply."""

        def results(document: Mapping[str, Any], _: list) -> dict[str, float]:
            keys = [(name, document["index"], repeat) for repeat in range(self.repeats[name])]
            return {"score": sum(float(sampler.store.samples[key].score or 0) for key in keys) / len(keys)}

        return results

    def score_tables(self, row: tables.ModelRow, summaries: Mapping[str, tables.Summary]) -> list[tables.Table]:
        rows = [*self.compared, row]
        scores = [
            tables.score_table(group.title, rows, group.benchmarks, group.name, self.labels)
            for group in self.catalog.groups.values()
            if set(group.benchmarks) & set(summaries)
        ]
        return scores + tables.at_k_table({self.labels[name]: summary for name, summary in summaries.items()})
