"""One training run from arguments: what `train.py`, `luffy-trl train` and notebooks share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from trl import ModelConfig

from ..advantages import deciding_reward
from ..checks import check_options, check_reward_inputs, reward_name
from ..config import LuffyConfig
from ..hub.card import CardFacts
from ..hub.queue import what_is_missing
from ..reporting.trackers import TrackerPictures
from ..runs.best import settle_metric
from ..runs.recipe import as_yaml, given_fields
from ..runs.redaction import known_secrets
from ..runs.stopping import RunStopped
from ..trainer import LuffyTrainer
from .inputs import (
    EMBEDDED_TASK,
    LuffyScriptArguments,
    after_training,
    before_training,
    check_arguments,
    check_model,
    check_output_dir,
    check_reading,
    finished_before,
    holding,
    load_dataset_splits,
    load_eval_split,
    load_reward_funcs,
    load_split,
    model_options,
    resume_point,
    train_until_stopped,
    warn_of_checkpoints,
)
from .packages import check_packages
from .summary import StartSummary, about_data, dataset_on_hub, finish


def run(
    script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig, command: str | None = None
) -> LuffyTrainer:
    """Train, save the model, its tokenizer and its card to `output_dir`, and push them if asked to.

    SIGTERM and SIGINT save a checkpoint at the end of the optimizer step and stop.

    Args:
        command: the command line for the card, without secrets.

    Raises:
        UsageError: a ValueError, for arguments or data that do not go together, before any training step.
        RunStopped: after a signal, when the checkpoint is saved.
    """
    with before_training():
        check_arguments(script_args, model_args)
        check_packages(training_args, model_args)
        check_output_dir(training_args.output_dir)
    with holding(training_args.output_dir):
        return _run(script_args, training_args, model_args, command)


def _run(
    script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig, command: str | None
) -> LuffyTrainer:
    with before_training():
        facts = card_facts(script_args, training_args, model_args, command)
        checkpoint = resume_point(training_args, model_args)
        trainer = make_trainer(script_args, training_args, model_args)
        is_finished = finished_before(trainer, checkpoint)
    if is_finished:
        say_what_is_missing(trainer)
        return trainer
    dataset_name = script_args.dataset_name or EMBEDDED_TASK
    trainer.card_facts = facts
    trainer.add_callback(StartSummary(trainer, dataset_name))
    trainer.add_callback(TrackerPictures(trainer))
    try:
        train_until_stopped(trainer, checkpoint)
    except RunStopped:
        say_what_is_missing(trainer)
        raise
    with after_training():
        save_or_push(trainer, dataset_name)
    return trainer


def say_what_is_missing(trainer: LuffyTrainer) -> None:
    """On the Hub, if the run pushes."""
    if trainer.args.push_to_hub and (missing := what_is_missing(Path(trainer.args.output_dir))):
        trainer.accelerator.print(missing)


def make_trainer(
    script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig
) -> LuffyTrainer:
    """The trainer of a run. Raises ValueError or OSError for what does not go together, or is not there."""
    splits = load_dataset_splits(script_args.dataset_name or EMBEDDED_TASK, script_args, seed=training_args.seed)
    reward_funcs, data = load_data(splits, script_args, training_args, model_args)
    warn_of_checkpoints(training_args)
    return LuffyTrainer(
        args=training_args,
        reward_funcs=reward_funcs,
        **data,
        **model_options(model_args, training_args),
    )


def load_data(
    splits: Mapping[str, Dataset | IterableDataset],
    script_args: LuffyScriptArguments,
    training_args: LuffyConfig,
    model_args: ModelConfig,
) -> tuple[list[Callable], dict[str, Any]]:
    """The rewards, and the datasets by the trainer's names for them.

    Raises:
        ValueError, OSError: for what does not go together, before the model is loaded.
    """
    dataset_name = script_args.dataset_name or EMBEDDED_TASK
    reward_funcs = load_reward_funcs(script_args.reward_funcs, dataset_name)
    deciding_reward([reward_name(function) for function in reward_funcs], training_args.solved_reward)
    data = {"train_dataset": load_split(splits, script_args.dataset_train_split, dataset_name)}
    if (eval_dataset := load_eval_split(splits, script_args, training_args, dataset_name)) is not None:
        data["eval_dataset"] = eval_dataset
    check_options(data, training_args)
    for name, dataset in data.items():
        check_reward_inputs(reward_funcs, dataset, "--reward_funcs", f"the {name} of --dataset_name {dataset_name}")
    settle_metric(training_args, (), (), [function.__name__ for function in reward_funcs], reward_funcs)
    check_model(model_args)
    check_reading(model_args, training_args, data)
    return reward_funcs, data


def save_or_push(trainer: LuffyTrainer, dataset_name: str) -> None:
    """Model, tokenizer and card into the output directory, and to the Hub if asked to; then the summary."""
    args = trainer.args
    card: dict[str, Any] = {
        "model_name": Path(args.output_dir).name,
        "dataset_name": dataset_on_hub(dataset_name),
    }
    commit = None
    if args.push_to_hub:
        commit = trainer.push_to_hub(**card)  # saves as below, before
    else:
        trainer.save_model(args.output_dir)
        trainer.create_model_card(**card)
        trainer.accelerator.wait_for_everyone()  # others stay until the main process has saved
    finish(trainer)
    if commit is not None:
        trainer.accelerator.print(f"Pushed them to {commit.repo_url}")


def card_facts(
    script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig, command: str | None
) -> CardFacts:
    """What the model card says about the arguments. To be asked before `run` changes any of them."""
    data = about_data(script_args.dataset_name or EMBEDDED_TASK)
    given = given_fields(model_args) | given_fields(script_args) | training_args.given
    return CardFacts(data, as_yaml(given, known_secrets(training_args.hub_token)), command)
