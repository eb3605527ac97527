"""A user's own problems, in the trainer's columns: prompts as the trainer renders them, graded by its rewards."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL.Image import Image as Picture
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.image_utils import load_image

from ..data.contract import with_system
from ..data.files import ending
from ..demonstrations.encoding import without_demonstrations
from ..demonstrations.images import IMAGE_COLUMNS, images_of, with_images
from ..demonstrations.prompts import Reader, check_prompts
from ..demonstrations.rendering import images_in
from . import EvaluationError, tables
from .backends import Request
from .catalog import generation_arguments
from .comparison import PAPER, read_results
from .grading import Answer, Grader
from .lines import Sample
from .sampling import Sampler
from .templates import OWN, TEXT_TEMPLATES


GRADED_AT_ONCE = 512  # responses
# As for the benchmarks: off, whatever the model's own generation config says
GENERATION = {"until": [], "repetition_penalty": 1.0, "top_k": 0}


def set_name(dataset_name: str) -> str:
    """What the problems are called in tables and files: the last part of a path or Hub id, without an ending."""
    path = Path(dataset_name)
    name = path.resolve().name if path.exists() else path.name
    suffix = ending(name)
    return name[: name.lower().rindex(suffix)] if suffix else name


class OwnProblems:
    """
    Args:
        dataset: in the data contract, its prompts and gold answers checked.
        where: what to call it in messages.
        grader: gives the rewards.

    Raises:
        EvaluationError: for prompts that the model cannot be given, and for comparisons with other problems.

    Attributes:
        have_images: all prompts have some, or none has.
    """

    groups: Mapping[str, Sequence[str]] = {}

    def __init__(
        self, args: argparse.Namespace, model_args: Mapping[str, Any], dataset: Dataset, where: str, grader: Grader
    ):
        self.args, self.dataset, self.where, self.grader = args, dataset, where, grader
        self.name = set_name(args.dataset_name)
        self.labels = {self.name: self.name}
        self.repeats = {self.name: 1 if args.temperature == 0 else args.n_samples or 1}
        self.is_conversation = isinstance(dataset[0]["prompt"], list)
        self.image_columns = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
        shown = dataset.select_columns(["prompt", *self.image_columns])
        self.have_images = any(images_of(row) or images_in(row["prompt"]) for row in shown)
        if self.have_images:
            _check_images_go_with(args)
        self.notes = [] if args.limit is None else [f"Note: --limit {args.limit}: only the first problems were used."]
        if args.temperature == 0 and args.n_samples not in (None, 1):
            self.notes.append("Note: --temperature 0 is greedy: one sample a problem, whatever --n_samples says.")
        self.reader = self._reader(model_args)
        self.prompts = [self._rendered(i) for i in range(self.count(self.name))]
        self._fingerprint = self._fingerprinted()
        self.compared = self._compared(args.compare)

    def count(self, name: str) -> int:
        problems = len(self.dataset)
        return problems if self.args.limit is None else min(problems, self.args.limit)

    def fingerprints(self) -> dict[str, str]:
        return {self.name: self._fingerprint}

    # Prompts

    def _reader(self, model_args: Mapping[str, Any]) -> Reader:
        """The model's tokenizer or processor, which renders and counts the prompts as the trainer does."""
        options = {name: model_args[name] for name in ("revision", "trust_remote_code") if name in model_args}
        thinking = {name: model_args[name] for name in ("enable_thinking",) if name in model_args}
        # The processors of some models need packages that texts do not
        loader = AutoProcessor if self.have_images or self.image_columns else AutoTokenizer
        try:
            tokenizer = loader.from_pretrained(model_args.get("tokenizer", self.args.model), **options)
            reader = Reader(tokenizer, AutoConfig.from_pretrained(self.args.model, **options), thinking)
            if self.args.template == OWN:
                rows = [self._row(i) for i in range(self.count(self.name))]
                self.notes += [f"Note: {says}" for says in check_prompts(reader, rows, f" of {self.where}", None)]
        except (OSError, ValueError, ImportError) as error:
            raise EvaluationError(" ".join(str(error).split())) from error
        if not self.is_conversation and tokenizer.chat_template and self.args.template == OWN:
            self.notes.append(
                f"Note: the prompts of {self.name} are plain texts. They stand in front of the model as they are, as "
                "in training: its chat template is not used."
            )
        return reader

    def _row(self, number: int) -> dict[str, Any]:
        """A row of the dataset, with the system message that was asked for."""
        row, system = self.dataset[number], self.args.system_prompt
        if system is None:
            return row
        if not self.is_conversation:
            raise EvaluationError(f"--system_prompt needs messages, and the prompts of {self.where} are texts.")
        return row | {"prompt": with_system(row["prompt"], system)}

    def _rendered(self, number: int) -> str:
        row, template = self._row(number), self.args.template
        if template == OWN:
            try:
                rendered = self.reader.render(row, f"{self.where}, row {number}")
            except ValueError as error:
                raise EvaluationError(str(error)) from error
            if self.have_images and not images_in(with_images(row)):
                raise EvaluationError(
                    f"{self.where}, row {number}: the prompt has no image, and others have. Evaluate prompts with "
                    "images and prompts without one by one, each kind in a file of its own."
                )
            return rendered
        asked = [message for message in row["prompt"] if message["role"] != "system"] if self.is_conversation else []
        if self.is_conversation and [message["role"] for message in asked] != ["user"]:
            raise EvaluationError(
                f"{self.where}, row {number}: --template {template} takes one problem, and the prompt has the roles "
                f"{', '.join(message['role'] for message in asked)}. Take --template {OWN}."
            )
        return TEXT_TEMPLATES[template](asked[0]["content"] if asked else row["prompt"])

    def _images(self, number: int) -> list[Picture]:
        """Of a row's prompt, read from their files."""
        row = self.dataset[number]
        try:
            images = images_in(with_images(row)) if self.is_conversation else []
            return [load_image(image) if isinstance(image, str) else image for image in images]
        except (OSError, ValueError) as error:
            says = " ".join(str(error).split())
            raise EvaluationError(f"{self.where}, row {number}: an image cannot be read: {says:.300}") from error

    def _fingerprinted(self) -> str:
        """Changes with any prompt, its images, gold answer or their order."""
        digest = hashlib.sha256()
        read = [name for name in ("prompt", "solution", "tools") if name in self.dataset.column_names]
        for number, row in enumerate(self.dataset.select_columns(read)):
            digest.update(json.dumps(row, default=_told_apart).encode() + b"\n")
            for image in self._images(number) if self.have_images else []:
                digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        return digest.hexdigest()

    # Samples and scores

    def sample_and_score(self, sampler: Sampler) -> dict[str, Any]:
        """Every sample made, kept and graded."""
        args = self.args
        generation = generation_arguments(GENERATION, args.temperature, args.top_p, args.max_new_tokens)
        if sampler.backend is not None and self.is_conversation and args.template == OWN:
            sampler.backend.take_rendered_prompts()
        requests = [
            Request(self.name, number, repeat, prompt, generation, partial(self._images, number))
            for number, prompt in enumerate(self.prompts)
            for repeat in range(self.repeats[self.name])
        ]
        sampler.make(requests)
        samples = [sampler.store.samples[request.key] for request in requests]
        with tqdm(total=len(samples), desc="Grading", unit="") as bar:
            for start in range(0, len(samples), GRADED_AT_ONCE):
                self._grade(samples[start : start + GRADED_AT_ONCE])
                bar.update(len(samples[start : start + GRADED_AT_ONCE]))
        sampler.store.rewrite(self.name)
        return {"reward_funcs": list(self.grader.functions), "solved_reward": self.grader.deciding}

    def _grade(self, samples: Sequence[Sample]) -> None:
        responses = [self._response(sample) for sample in samples]
        for sample, response, grade in zip(samples, responses, self.grader.grade(responses), strict=True):
            gold = response.row.get("solution")
            sample.prompt, sample.gold = self.prompts[sample.doc_id], None if gold is None else str(gold)
            sample.rewards, sample.answer = grade.rewards, grade.answer
            sample.score = None if grade.solved is None else float(grade.solved)

    def _response(self, sample: Sample) -> Answer:
        row = self._row(sample.doc_id)
        completion = [{"role": "assistant", "content": sample.response}] if self.is_conversation else sample.response
        [token_ids] = self.reader.token_ids([sample.response])
        end = [] if sample.truncated else [self.reader.tokenizer.eos_token_id]
        [given] = without_demonstrations([row])
        del given["prompt"]
        prompt = with_images(row) if self.have_images else row["prompt"]  # TRL's form
        return Answer(sample.doc_id, given, prompt, completion, token_ids + end)

    # Tables

    def score_tables(self, row: tables.ModelRow, summaries: Mapping[str, tables.Summary]) -> list[tables.Table]:
        for other, summary in self.compared.items():
            if summary.problems != summaries[self.name].problems:
                self.notes.append(f"Note: {other} has {summary.problems} problems of {self.name}: another --limit.")
        side_by_side = {**self.compared, row.name: summaries[self.name]}
        return [tables.own_table(self.name, side_by_side), *tables.at_k_table(side_by_side)]

    def _compared(self, directories: Sequence[str]) -> dict[str, tables.Summary]:
        compared = {}
        for directory in directories:
            if directory == PAPER:
                raise EvaluationError("--compare paper: the paper has no results on your own problems.")
            other = read_results(directory)
            if self.name not in other.summaries:
                raise EvaluationError(
                    f"--compare {directory}: it has no results on {self.name}, only on {', '.join(other.summaries)}."
                )
            if other.data.get(self.name) != self._fingerprint:
                raise EvaluationError(
                    f"--compare {directory}: its {self.name} holds other problems or gold answers than {self.where}, "
                    "so the two cannot stand side by side. Evaluate both on the same."
                )
            compared[other.name] = other.summaries[self.name]
        return compared


def _check_images_go_with(args: argparse.Namespace) -> None:
    of = f"the prompts of --dataset_name {args.dataset_name} have images, which"
    if args.template != OWN:
        raise EvaluationError(f"--template {args.template}: {of} have no place in it. Take --template {OWN}.")
    if args.backend == "vllm":
        raise EvaluationError(f"--backend vllm: {of} are read with --backend hf alone. Take that.")
    if args.batch_size == "auto":
        raise EvaluationError(
            f"--batch_size auto: {of} lm-eval takes in batches of a given size alone. Give a number."
        )


def _told_apart(value: Any) -> str:
    """What JSON does not have. An image's pixels are for the fingerprint to add: its `str` is an address."""
    return type(value).__name__ if isinstance(value, Picture) else str(value)
