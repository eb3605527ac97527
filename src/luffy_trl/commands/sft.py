"""`luffy-trl sft`: supervised fine-tuning on the same data, by TRL's SFTTrainer. The baseline, and the first half of
SFT, then RL."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl import ModelConfig, SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from ..demonstrations.encoding import as_completion, demonstration_text
from ..demonstrations.images import IMAGE_COLUMNS
from ..demonstrations.rendering import images_in
from ..demonstrations.trajectories import checked_messages, is_trajectory
from ..hub.card import CARD, PLACEHOLDER, CardFacts, recipe_section
from ..runs.best import check_metric
from ..runs.budget import TokenBudgetConfig, TokenBudgetMixin
from ..runs.fitting import read_state
from ..runs.mixin import WholeCheckpointMixin
from ..runs.redaction import NoTokenInPickles
from .inputs import (
    EMBEDDED_TASK,
    LuffyScriptArguments,
    after_training,
    before_training,
    check_dataset_arguments,
    check_model,
    check_output_dir,
    check_reading,
    finished_before,
    holding,
    load_dataset_splits,
    load_eval_split,
    load_split,
    model_options,
    resume_point,
    train_until_stopped,
    warn_of_checkpoints,
)
from .packages import check_packages
from .summary import about_data, dataset_on_hub, what_is_saved


# What an evaluation of TRL's SFTTrainer logs, behind "eval_"
LOGGED_BY_SFT = (
    "loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens", "entropy", "mean_token_accuracy",
    "aux_loss",
)  # fmt: skip


@dataclass
class LuffySFTConfig(NoTokenInPickles, TokenBudgetConfig, SFTConfig):
    """SFTConfig that cuts nothing unless it is told to."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of prompt and demonstration together, behind which rows are cut. Default None: they are "
            "not. (TRL's own default is 1024.)"
        },
    )


def check_sft_arguments(script_args: LuffyScriptArguments, model_args: ModelConfig) -> None:
    """Raises ValueError for arguments that do not go together, before anything is loaded."""
    check_dataset_arguments(script_args, model_args)
    if script_args.reward_funcs:
        raise ValueError("--reward_funcs: SFT looks at no reward.")


def check_sft_metric(args: SFTConfig) -> None:
    """Raises ValueError for a metric of the best model that no evaluation logs."""
    if args.eval_strategy != "no" and args.metric_for_best_model is not None:
        check_metric(args.metric_for_best_model, [f"eval_{name}" for name in LOGGED_BY_SFT], "eval_loss")


def to_prompt_completion(dataset: Dataset, takes_trajectories: bool = False) -> Dataset:
    """One row for each demonstration, in the columns that SFTTrainer reads. Prompts without one are left out.

    Args:
        takes_trajectories: only assistants' messages are trained.
    """
    kept = ["tools"] if "tools" in dataset.column_names else []

    def explode(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        _refuse_images(batch, rows)
        name = "demonstrations" if "demonstrations" in batch else "completion"
        values = batch[name] if name == "demonstrations" else [[completion] for completion in batch[name]]
        found = [
            (row, prompt, completion)
            for row, prompt, completions in zip(rows, batch["prompt"], values, strict=True)
            for completion in completions or []
            if completion is not None
        ]
        # Says what is wrong with a demonstration that is none
        completions = [
            _in_form_of(prompt, completion, f"Row {row}: `{name}`", takes_trajectories)
            for row, prompt, completion in found
        ]
        numbers = {row: i for i, row in enumerate(rows)}
        others = {column: [batch[column][numbers[row]] for row, _, _ in found] for column in kept}
        return {"prompt": [prompt for _, prompt, _ in found], "completion": completions, **others}

    removed = [column for column in dataset.column_names if column not in kept]
    return dataset.map(
        explode, batched=True, with_indices=True, remove_columns=removed, desc="One row a demonstration"
    )


def _refuse_images(batch: dict[str, list], rows: list[int]) -> None:
    for i, row in enumerate(rows):
        holding_any = [column for column in IMAGE_COLUMNS if column in batch and batch[column][i]]
        if images_in(batch["prompt"][i]):
            holding_any.append("prompt")
        if holding_any:
            raise ValueError(
                f"Row {row}: `{holding_any[0]}` has an image, and luffy-trl sft trains on texts alone: take TRL's "
                "SFTTrainer for prompts with images."
            )


def _in_form_of(prompt: str | list, completion: Any, where: str, takes_trajectories: bool) -> str | list:
    """The demonstration in the prompt's form: one for both is all that SFTTrainer takes."""
    if is_trajectory(completion):
        if not takes_trajectories:
            raise ValueError(
                f"{where} is a trajectory: set --assistant_only_loss true, or SFT would train what tools and users "
                "have written in it."
            )
        return checked_messages(completion, where)
    text = demonstration_text(completion, where)
    return completion if isinstance(prompt, list) is isinstance(completion, list) else as_completion(prompt, text)


# What TRL's card says of a base that is a directory, and of a model that is not on the Hub
NO_BASE, NO_REPOSITORY = "[None](https://huggingface.co/None)", 'model="None"'
AFTER_TRAINING = "### Framework versions"
TOKENS_FILE = "num_tokens.json"


class WholeSFTTrainer(WholeCheckpointMixin, TokenBudgetMixin, SFTTrainer):
    """SFTTrainer with checkpoints that are whole or not there.

    Differs in:

    - `_save_own_state`, `_load_own_state`: TRL's count of tokens goes on after a resumption;
    - `create_model_card`: names the base and the dataset, and says `card_facts`.
    """

    _takes_unlisted = True  # as SFTTrainer itself writes them
    card_facts = CardFacts()
    dataset_on_hub: str | None = None

    def check_before_training(self) -> None:
        check_sft_metric(self.args)

    def _save_own_state(self, checkpoint: Path) -> None:
        if self.is_world_process_zero():
            (checkpoint / TOKENS_FILE).write_text(json.dumps({"num_tokens": self._total_train_tokens}))

    def _load_own_state(self, checkpoint: Path) -> None:
        if (checkpoint / TOKENS_FILE).is_file():
            self._total_train_tokens = json.loads((checkpoint / TOKENS_FILE).read_text())["num_tokens"]
        else:  # another trainer's checkpoint: its last log is the closest to its count
            logged = [log["num_tokens"] for log in read_state(checkpoint).log_history if "num_tokens" in log]
            self._total_train_tokens = int(max(logged, default=0))

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(
            model_name or Path(self.args.output_dir).name, dataset_name or self.dataset_on_hub, tags
        )
        if not self.is_world_process_zero():
            return
        base = Path(get_config_model_id(self.model.config) or "a model").name
        path = Path(self.args.output_dir) / CARD
        text = path.read_text(encoding="utf-8").replace(NO_BASE, f"`{base}`, which is not on the Hub")
        text = text.replace(NO_REPOSITORY, f'model="{PLACEHOLDER}"')
        training = [part for part in (self.card_facts.data, recipe_section(self.card_facts)) if part]
        path.write_text(text.replace(AFTER_TRAINING, "\n\n".join([*training, AFTER_TRAINING])), encoding="utf-8")


def run_sft(
    script_args: LuffyScriptArguments,
    training_args: LuffySFTConfig,
    model_args: ModelConfig,
    command: str | None = None,
) -> SFTTrainer:
    """Fine-tune on the demonstrations, and save the model, its tokenizer and TRL's card to `output_dir`.

    Args:
        command: the command line for the card, without secrets.

    Raises:
        UsageError: a ValueError, for arguments or data that do not go together, before any training step.
        RunStopped: after a signal, when the checkpoint is saved.
    """
    with before_training():
        check_sft_arguments(script_args, model_args)
        check_packages(training_args, model_args)
        check_output_dir(training_args.output_dir)
    with holding(training_args.output_dir):
        return _run_sft(script_args, training_args, model_args, command)


def _run_sft(
    script_args: LuffyScriptArguments, training_args: LuffySFTConfig, model_args: ModelConfig, command: str | None
) -> SFTTrainer:
    with before_training():
        checkpoint = resume_point(training_args, model_args)
        splits = load_dataset_splits(script_args.dataset_name or EMBEDDED_TASK, script_args, seed=training_args.seed)
        rows, eval_rows, prompts = load_rows(splits, script_args, training_args, model_args)
        warn_of_checkpoints(training_args)
        trainer = WholeSFTTrainer(
            args=training_args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            **model_options(model_args, training_args),
        )
        is_finished = finished_before(trainer, checkpoint)
    if is_finished:
        return trainer
    dataset_name = script_args.dataset_name or EMBEDDED_TASK
    trainer.card_facts = CardFacts(about_data(dataset_name), command=command)
    trainer.dataset_on_hub = dataset_on_hub(dataset_name)
    trainer.accelerator.print(f"SFT on {len(rows)} demonstrations of {prompts} prompts")
    train_until_stopped(trainer, checkpoint)
    with after_training():
        trainer.save_model(training_args.output_dir)
        trainer.create_model_card()
        trainer.save_state()  # for `luffy-trl report`; the last, so that it tells a finished run
        saved = what_is_saved(trainer)
        trainer.accelerator.print(f"Saved the model and its tokenizer to {training_args.output_dir} ({saved})")
    return trainer


def load_rows(
    splits: Mapping[str, Dataset | IterableDataset],
    script_args: LuffyScriptArguments,
    training_args: LuffySFTConfig,
    model_args: ModelConfig,
) -> tuple[Dataset, Dataset | None, int]:
    """Rows to train on and to evaluate on, one a demonstration, and from how many prompts the former are.

    Raises:
        ValueError: for a dataset that has no demonstrations, is streamed, or that the model cannot read.
    """
    dataset_name = script_args.dataset_name or EMBEDDED_TASK
    dataset = load_split(splits, script_args.dataset_train_split, dataset_name)
    if not isinstance(dataset, Dataset):
        raise ValueError("--dataset_streaming is for train.py; SFT reads the whole dataset.")
    columns = [column for column in ("completion", "demonstrations") if column in dataset.column_names]
    if len(columns) != 1:
        raise ValueError(
            f"--dataset_name {dataset_name} needs one of the columns `completion` and `demonstrations`, and has "
            f"{', '.join(dataset.column_names)}."
        )
    trajectories = bool(training_args.assistant_only_loss)
    rows = to_prompt_completion(dataset, trajectories)
    if len(rows) == 0:
        raise ValueError(f"--dataset_name {dataset_name}: none of its {len(dataset)} rows has a demonstration.")
    eval_dataset = load_eval_split(splits, script_args, training_args, dataset_name)
    check_model(model_args)
    check_reading(model_args, training_args, {"train_dataset": dataset, "eval_dataset": eval_dataset})
    eval_rows = None if eval_dataset is None else to_prompt_completion(eval_dataset, trajectories)
    return rows, eval_rows, len(dataset)
