"""One evaluation from its arguments: data, samples, scores, tables."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from ..runs.fingerprints import files_fingerprint
from . import EvaluationError, tables
from .backends import ADAPTER_ARGUMENTS
from .comparison import RESULTS
from .lines import Sample
from .loading import kept_arguments, load_model
from .samples import SampleStore
from .sampling import Sampler


TABLES = "results.md"

# vLLM keeps some 256 responses under way, and the longest of a chunk leave it idle: there, chunks are larger
DEFAULT_CHUNK_SIZE = {"hf": 64, "vllm": 2048}


class ProblemSets(Protocol):
    """What a model is evaluated on: the paper's `Benchmarks`, or a user's `OwnProblems`."""

    notes: list[str]
    have_images: bool

    @property
    def labels(self) -> Mapping[str, str]: ...  # name of a set -> what tables call it

    @property
    def groups(self) -> Mapping[str, Sequence[str]]: ...  # of sets that have an average

    @property
    def repeats(self) -> Mapping[str, int]: ...  # name of a set -> samples a problem

    def count(self, name: str) -> int: ...

    def fingerprints(self) -> dict[str, str]: ...

    def sample_and_score(self, sampler: Sampler) -> dict[str, Any]: ...

    def score_tables(self, row: tables.ModelRow, summaries: Mapping[str, tables.Summary]) -> list[tables.Table]: ...


class Evaluation:
    """
    Args:
        model_args: of `model_arguments`, which has checked that there is such a model.
        problems: what it is evaluated on.
        processes: how many were launched together, to share the samples.

    Raises:
        EvaluationError: if the output directory cannot be used.
    """

    def __init__(
        self, args: argparse.Namespace, model_args: dict[str, Any], problems: ProblemSets, processes: int = 1
    ):
        self.args, self.model_args, self.problems = args, model_args, problems
        if args.k and max(args.k) > max(problems.repeats.values()):
            raise EvaluationError(
                f"--k {max(args.k)}: there are at most {max(problems.repeats.values())} samples a problem. Raise "
                "--n_samples (and --temperature, if it is 0)."
            )
        self.name = args.name or Path(args.adapter or args.model).name
        for name in (RESULTS, TABLES):
            if (Path(args.output_dir) / name).is_dir():
                raise EvaluationError(f"--output_dir {args.output_dir}: {name} is a directory there. Move it away.")
        # A chunk for each, where there are few samples
        share = -(-self._wanted() // processes)
        self.chunk_size = args.chunk_size or min(DEFAULT_CHUNK_SIZE[args.backend], share)
        self.store = SampleStore(args.output_dir, self._settings())

    def run(self) -> str:
        """Make the missing samples, score all, write the results. Returns the tables as text.

        Raises:
            LeftToOthersError: if other processes are still at work in the directory: the last of them scores.
        """
        print(self.kept(), flush=True)
        kept, wanted = self._progress()
        sampler = Sampler(
            # To score anew, no model is needed
            None if kept == wanted else load_model(self.args, self.model_args, self.problems.have_images),
            self.store,
            self.args.seed,
            self.chunk_size,
        )
        return self._report(self.problems.sample_and_score(sampler))

    def close(self) -> None:
        self.store.close()

    def kept(self) -> str:
        kept, wanted = self._progress()
        return f"{kept} of {wanted} samples are kept in {self.args.output_dir}."

    def _progress(self) -> tuple[int, int]:
        """Samples of this evaluation that are kept, and all that it takes."""
        return sum(self._is_wanted(sample) for sample in self.store.samples.values()), self._wanted()

    def _wanted(self) -> int:
        return sum(self.problems.count(name) * repeats for name, repeats in self.problems.repeats.items())

    def _is_wanted(self, sample: Sample) -> bool:
        """Whether a kept sample is of this evaluation: another may have been longer."""
        repeats = self.problems.repeats.get(sample.task, 0)
        return sample.repeat < repeats and sample.doc_id < self.problems.count(sample.task)

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
            "data": self.problems.fingerprints(),
        }

    # Results

    def _report(self, own_results: Mapping[str, Any]) -> str:
        samples: dict[str, list[Sample]] = {name: [] for name in self.problems.repeats}
        for sample in filter(self._is_wanted, self.store.samples.values()):
            samples[sample.task].append(sample)
        summaries = {name: tables.summarize(of_set, self.args.k) for name, of_set in samples.items()}
        row = tables.row(self.name, summaries, self.problems.groups)
        made = [
            *self.problems.score_tables(row, summaries),
            tables.response_table(summaries, self.problems.labels),
        ]
        notes = [*self.problems.notes, tables.LEGEND, *tables.ungraded_notes(summaries)]
        if self.store.half_written:
            notes.append(f"Note: {self.store.half_written} half-written samples of a killed run were made again.")
        self._write(summaries, row, own_results, notes, tables.render(made, notes, markdown=True))
        where = f"Tables: {self.args.output_dir}/results.md   Numbers: results.json   Samples: samples/ there"
        return tables.render(made, [*notes, where], markdown=False)

    def _write(
        self,
        summaries: Mapping[str, tables.Summary],
        row: tables.ModelRow,
        own_results: Mapping[str, Any],
        notes: Sequence[str],
        markdown: str,
    ) -> None:
        results = {
            "name": self.name,
            "tasks": {name: asdict(summary) for name, summary in summaries.items()},
            "percent": {"scores": row.scores, "stderrs": row.stderrs},
            "limit": self.args.limit,
            "notes": notes,
            "settings": self.store.settings,
            **own_results,
            "versions": {package: version(package) for package in ("luffy_trl", "lm_eval", "math-verify", "torch")},
        }
        directory = Path(self.args.output_dir)
        try:
            (directory / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            (directory / TABLES).write_text(f"# {self.name}\n\n{markdown}\n", encoding="utf-8")
        except OSError as error:
            raise EvaluationError(
                f"--output_dir {directory}: all samples are kept, but the results cannot be written: {error}. The "
                "same command writes them once they can."
            ) from error
