"""Results of an evaluation in the model's repository on the Hub: for the benchmarks' leaderboards, and in its card.

A benchmark of the Hub is a dataset with an `eval.yaml` that names its tasks. What a model reached there stands in a
file of the model's folder `.eval_results`, and appears on its page and on the dataset's leaderboard. Whatever else was
evaluated, local files and the first problems of a benchmark among them, is in the card's `model-index` alone.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, EvalResultEntry, HfApi, ModelCard, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..hub.card import CARD, EVALUATION, index_entries, read_results
from ..hub.errors import PushError, explain, with_retries
from ..runs.hub_client import bound_silence
from . import EvaluationError
from .catalog import Catalog


RETRY_SECONDS = 300.0
FOLDER = ".eval_results"
BENCHMARK = "eval.yaml"  # of a dataset; without `config` and `split` a task is of these
DEFAULT_CONFIG, DEFAULT_SPLIT = "default", "test"

Say = Callable[[str], None]


class Publisher:
    """Knows the repository from the start, so that what is wrong with it is said before any sample is made."""

    def __init__(self, args: argparse.Namespace, api: HfApi | None = None):
        """
        Raises:
            EvaluationError: if there is no such repository, or no token.
        """
        self.args, self.api, self.catalog = args, api or HfApi(), Catalog()
        self.repo_id = args.push_to_hub or args.model
        if not args.push_to_hub and Path(args.model).exists():
            raise EvaluationError(
                f"--push_to_hub needs the model's repository on the Hub, since --model {args.model} is a directory "
                "here: --push_to_hub OWNER/NAME."
            )
        try:
            validate_repo_id(self.repo_id)
            bound_silence()
            self.api.model_info(self.repo_id)
            self.api.whoami()
        except HFValidationError as error:
            raise EvaluationError(f"--push_to_hub {self.repo_id} is no repository's name: OWNER/NAME.") from error
        except Exception as error:  # of the Hub or the connection to it, in the words of a push
            raise EvaluationError(f"--push_to_hub {self.repo_id}: {explain(error)}.") from error

    def publish(self, say: Say = print) -> str:
        """Add the results that lie in the output directory, in one commit. Returns what was done, for the person.

        Raises:
            PushError: if they were not published.
        """
        results = read_results(Path(self.args.output_dir) / EVALUATION.name)
        if not results:
            return f"Nothing was published: there are no results in {self.args.output_dir} yet."

        def once() -> str:
            entries = {name: entry for name, result in results.items() if (entry := self._entry(name, result, say))}
            files = {f"{FOLDER}/{name}.yaml": as_yaml(entry) for name, entry in entries.items()}
            files[CARD] = with_results(self._card(), self.repo_id, results)
            self.api.create_commit(
                self.repo_id,
                [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message="Add results of luffy-trl eval",
            )
            listed = ", ".join(entries) or "none, since no benchmark of the Hub was evaluated as a whole"
            return (
                f"Published to {self.api.endpoint}/{self.repo_id}. In its card: {len(results)} result(s); in "
                f"{FOLDER}/, for leaderboards: {listed}."
            )

        return with_retries(once, RETRY_SECONDS, say, time.sleep)

    def _entry(self, name: str, result: Mapping[str, Any], say: Say) -> EvalResultEntry | None:
        """None for local problems, a part of a benchmark, and where the Hub has no leaderboard."""
        is_local = self.args.data_files is not None or self.args.dataset_name is not None
        if is_local or self.args.limit is not None or name not in self.catalog.benchmarks:
            return None
        dataset, config, split = self.catalog.on_hub(name)
        task_id = self._task_id(dataset, config or DEFAULT_CONFIG, split, say)
        if task_id is None:
            return None
        return EvalResultEntry(
            dataset_id=dataset,
            task_id=task_id,
            value=round(100 * result["score"], 2),
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            notes=self._notes(result),
        )

    def _task_id(self, dataset: str, config: str, split: str, say: Say) -> str | None:
        """What the dataset calls this task of its leaderboard; None if it has none for it."""
        if not self.api.file_exists(dataset, BENCHMARK, repo_type="dataset"):
            return None
        path = self.api.hf_hub_download(dataset, BENCHMARK, repo_type="dataset")
        try:
            tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["tasks"]
            for task in tasks:
                if (task.get("config", DEFAULT_CONFIG), task.get("split", DEFAULT_SPLIT)) == (config, split):
                    return str(task["id"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError):
            say(f"Note: the {BENCHMARK} of {dataset} cannot be read, so no result goes to its leaderboard.")
        return None

    def _notes(self, result: Mapping[str, Any]) -> str:
        args = self.args
        sampled = f"temperature {args.temperature}, at most {args.max_new_tokens} new tokens"
        made_by = ", ".join(f"{package} {version(package)}" for package in ("luffy_trl", "lm_eval"))
        return f"accuracy in percent, mean of {result['samples']} samples a problem; {sampled}; {made_by}"

    def _card(self) -> ModelCard:
        if not self.api.file_exists(self.repo_id, CARD):
            return ModelCard("---\n{}\n---\n")
        text = Path(self.api.hf_hub_download(self.repo_id, CARD)).read_text(encoding="utf-8")
        try:
            return ModelCard(text)
        except Exception as error:  # whatever stands there, it is not lost
            raise PushError(f"the {CARD} of {self.repo_id} cannot be read: {explain(error)}. Mend it first") from error


def as_yaml(entry: EvalResultEntry) -> bytes:
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True).encode()


def with_results(card: ModelCard, repo_id: str, results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The card with the results in its `model-index`, in place of older ones of the same tasks."""
    new = index_entries(results)
    replaced = {(entry.task_type, entry.dataset_type, entry.metric_type) for entry in new}
    kept = [
        entry
        for entry in card.data.get("eval_results") or []
        if (entry.task_type, entry.dataset_type, entry.metric_type) not in replaced
    ]
    card.data["model_name"] = card.data.get("model_name") or repo_id.split("/")[-1]
    card.data["eval_results"] = [*kept, *new]
    return str(card).encode()
