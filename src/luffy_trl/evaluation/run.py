"""One evaluation from its arguments: data, samples, scores, tables."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from . import EvaluationError, tables
from .backends import ADAPTER_ARGUMENTS, adapter_arguments
from .catalog import Catalog, configure
from .documents import fingerprint, read_local
from .generation import KeepingLM
from .loading import kept_arguments, load_model, parse_model_args
from .model_files import check_model, files_fingerprint
from .samples import Sample, SampleStore
from .scoring import Scorer
from .templates import FROM_DATA


TABLES = "results.md"

# vLLM keeps some 256 responses under way, and the longest of a chunk leave it idle: there, chunks are larger
DEFAULT_CHUNK_SIZE = {"hf": 64, "vllm": 2048}


class Evaluation:
    """Everything a user can get wrong is checked when it is made, but for what needs the loaded model."""

    def __init__(self, args: argparse.Namespace):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise EvaluationError(
                "it runs in one process: for several GPUs use --backend vllm with --tensor_parallel_size."
            )
        self.args = args
        self.name = args.name or Path(args.adapter or args.model).name
        self.notes: list[str] = []
        self.catalog = Catalog()
        self.model_args = parse_model_args(args)
        groups = {name: group.benchmarks for name, group in self.catalog.groups.items()}
        self.compared = tables.compared_rows(args.compare, groups)
        self.labels = {name: benchmark.label for name, benchmark in self.catalog.benchmarks.items()}
        for name in (tables.RESULTS, TABLES):
            if (Path(args.output_dir) / name).is_dir():
                raise EvaluationError(f"--output_dir {args.output_dir}: {name} is a directory there. Move it away.")
        check_model(args.model, self.model_args)
        if args.adapter:
            self.model_args |= adapter_arguments(args.backend, args.adapter)
        self.tasks = self._load_tasks()
        self.repeats = {name: self._repeats(name) for name in self.tasks}
        self.store = SampleStore(args.output_dir, self._settings())
        kinds = {name: benchmark.kind for name, benchmark in self.catalog.benchmarks.items()}
        self.scorer = Scorer(self.store, kinds, args.thought)

    def run(self) -> str:
        """Make the missing samples, score all, write the results. Returns the tables as text."""
        self._configure_tasks()
        print(self.kept(), flush=True)
        kept, wanted = self._progress()
        lm = KeepingLM(
            None if kept == wanted else load_model(self.args, self.model_args),  # to score anew, no model is needed
            self.store,
            self.args.template,
            self.args.seed,
            self.args.chunk_size or DEFAULT_CHUNK_SIZE[self.args.backend],
            self._score,
        )
        results = evaluator.evaluate(
            lm,
            {"tasks": self.tasks},
            limit=self.args.limit,
            bootstrap_iters=1,  # the error of a mean has a formula: nothing is drawn
            log_samples=False,
            system_instruction=None if self.args.system_prompt == FROM_DATA else self.args.system_prompt,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
        return self._report(results["results"])

    def close(self) -> None:
        self.store.close()

    def kept(self) -> str:
        kept, wanted = self._progress()
        return f"{kept} of {wanted} samples are kept in {self.args.output_dir}."

    def _progress(self) -> tuple[int, int]:
        """Samples of this evaluation that are kept, and all that it takes."""
        wanted = sum(self._documents(name) * self.repeats[name] for name in self.tasks)
        return sum(self._is_wanted(sample) for sample in self.store.samples.values()), wanted

    # Data

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

    def _documents(self, name: str) -> int:
        # Not `eval_docs`, which converts the dataset anew each time
        documents = len(self.tasks[name].task_docs)
        return documents if self.args.limit is None else min(documents, self.args.limit)

    def _is_wanted(self, sample: Sample) -> bool:
        """Whether a kept sample is of this evaluation: another may have been longer."""
        if sample.task not in self.tasks:
            return False
        return sample.doc_id < self._documents(sample.task) and sample.repeat < self.repeats[sample.task]

    def _settings(self) -> dict[str, Any]:
        """What samples depend on."""
        args = self.args
        adapter = self.model_args.get(ADAPTER_ARGUMENTS[args.backend])
        return {
            "model": args.model,
            "model_files": files_fingerprint(args.model),
            "adapter": adapter,
            "adapter_files": files_fingerprint(adapter) if adapter else None,
            "backend": args.backend,
            "dtype": args.dtype,
            "model_args": kept_arguments(self.model_args),
            "template": args.template,
            "system_prompt": args.system_prompt,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
            "data": {name: fingerprint(task.task_docs) for name, task in self.tasks.items()},
        }

    # Samples

    def _configure_tasks(self) -> None:
        args = self.args
        for name, task in self.tasks.items():
            results = self._results_of(name)
            configure(task, self.repeats[name], args.temperature, args.top_p, args.max_new_tokens, results)
            if args.system_prompt == FROM_DATA:
                task.set_config("description", "system")

    def _score(self, requests: Sequence[Instance]) -> None:
        documents: dict[str, dict[int, Mapping[str, Any]]] = {name: {} for name in self.tasks}
        for request in requests:
            documents[str(request.task_name)][int(request.doc_id or 0)] = request.doc
        for name, of_task in documents.items():
            self.scorer.score(name, of_task)

    def _results_of(self, name: str) -> Callable[[Mapping[str, Any], list], dict[str, float]]:
        """What tells lm-eval a problem's score. A function, not a method: lm-eval copies its configuration deeply."""

        def results(document: Mapping[str, Any], _: list) -> dict[str, float]:
            keys = [(name, document["index"], repeat) for repeat in range(self.repeats[name])]
            return {"score": sum(float(self.store.samples[key].score or 0) for key in keys) / len(keys)}

        return results

    # Results

    def _report(self, lm_eval_results: Mapping[str, Any]) -> str:
        samples: dict[str, list[Sample]] = {name: [] for name in self.tasks}
        for sample in filter(self._is_wanted, self.store.samples.values()):
            samples[sample.task].append(sample)
        summaries = {name: tables.summarize(of_task) for name, of_task in samples.items()}
        groups = {name: group.benchmarks for name, group in self.catalog.groups.items()}
        rows = [*self.compared, tables.row(self.name, summaries, groups)]
        made = [
            tables.score_table(group.title, rows, group.benchmarks, group.name, self.labels)
            for group in self.catalog.groups.values()
            if set(group.benchmarks) & set(summaries)
        ]
        made.append(tables.response_table(summaries, self.labels))
        notes = [*self.notes, *self._notes(summaries)]
        self._write(summaries, rows[-1], lm_eval_results, notes, tables.render(made, notes, markdown=True))
        where = f"Tables: {self.args.output_dir}/results.md   Numbers: results.json   Samples: samples/ there"
        return tables.render(made, [*notes, where], markdown=False)

    def _notes(self, summaries: Mapping[str, tables.Summary]) -> list[str]:
        notes = ["Scores in percent, ± one standard error over problems."]
        for name, problems in self.scorer.unreadable.items():
            if problems:
                notes.append(
                    f"Note: Math-Verify cannot read the right answer of {self.labels[name]}'s problems "
                    f"{', '.join(map(str, sorted(problems)))}: no response to them counts as right."
                )
        if self.store.half_written:
            notes.append(f"Note: {self.store.half_written} half-written samples of a killed run were made again.")
        return notes

    def _write(
        self,
        summaries: Mapping[str, tables.Summary],
        row: tables.ModelRow,
        lm_eval_results: Mapping[str, Any],
        notes: Sequence[str],
        markdown: str,
    ) -> None:
        results = {
            "name": self.name,
            "tasks": {name: asdict(summary) for name, summary in summaries.items()},
            "percent": {"scores": row.scores, "stderrs": row.stderrs},
            "limit": self.args.limit,
            "thought": self.args.thought,
            "notes": notes,
            "settings": self.store.settings,
            "lm_eval": lm_eval_results,
            "versions": {package: version(package) for package in ("luffy_trl", "lm_eval", "math-verify", "torch")},
        }
        directory = Path(self.args.output_dir)
        try:
            (directory / tables.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            (directory / TABLES).write_text(f"# {self.name}\n\n{markdown}\n", encoding="utf-8")
        except OSError as error:
            raise EvaluationError(
                f"--output_dir {directory}: all samples are kept, but the results cannot be written: {error}. The "
                "same command writes them once they can."
            ) from error
