"""One training run from arguments: what `train.py`, `luffy-trl train` and notebooks share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

from .config import LuffyConfig
from .imports import import_function
from .model_card import CardFacts
from .recipe import as_yaml, given_fields
from .redact import known_secrets
from .tasks.letter_walk import letter_walk_reward, split_walks, to_dataset
from .tasks.letter_walk_base import load_or_pretrain
from .trainer import LuffyTrainer


EMBEDDED_TASK = "letter_walk"
REWARD_FUNCS: dict[str, Callable] = {
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "letter_walk_reward": letter_walk_reward,
}
# `datasets`' loader for a file with this ending
FILE_LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass
class LuffyScriptArguments(ScriptArguments):
    """
    What to train on: the dataset and its rewards. The dataset fields are TRL's.

    Without `dataset_name` and `model_name_or_path` the run is the embedded letter walk, which needs no download.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, a local .parquet, .json, .jsonl or .csv file, a directory written by save_to_disk, or "
            "'letter_walk', the embedded task. Default: the embedded task, if no model is given either."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or more reward functions, summed: 'accuracy_reward', 'reasoning_accuracy_reward', "
            "'think_format_reward' (TRL's), 'letter_walk_reward', or a dotted path such as my_rewards.my_function, "
            "found from the working directory. Needed for every dataset but the embedded one."
        },
    )


def check_arguments(script_args: LuffyScriptArguments, model_args: ModelConfig) -> None:
    """Raises ValueError for arguments that do not go together, before anything is loaded."""
    model_name, dataset_name = model_args.model_name_or_path, script_args.dataset_name
    if model_name is None and dataset_name is not None and dataset_name != EMBEDDED_TASK:
        raise ValueError(f"--model_name_or_path is missing: which model should be trained on {dataset_name}?")
    if dataset_name is None and model_name is not None:
        raise ValueError(
            f"--dataset_name is missing: what should {model_name} be trained on? ('letter_walk' is the embedded task.)"
        )
    if Path(dataset_name or "").suffix in FILE_LOADERS and not Path(dataset_name or "").is_file():
        raise ValueError(f"--dataset_name {dataset_name}: there is no such file.")
    load_reward_funcs(script_args.reward_funcs, dataset_name or EMBEDDED_TASK)


def run(
    script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig, command: str | None = None
) -> LuffyTrainer:
    """Train, save the model, its tokenizer and its card to `output_dir`, and push them if asked to.

    Args:
        command: the command line for the card, without secrets.

    Raises:
        ValueError: for arguments or data that do not go together, before any training step.
    """
    check_arguments(script_args, model_args)
    facts = card_facts(script_args, training_args, model_args, command)
    dataset_name = script_args.dataset_name or EMBEDDED_TASK
    reward_funcs = load_reward_funcs(script_args.reward_funcs, dataset_name)
    dataset = load_splits(dataset_name, script_args, seed=training_args.seed)
    train_dataset = _split(dataset, script_args.dataset_train_split, dataset_name)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = _split(dataset, script_args.dataset_test_split, dataset_name)

    model_name = model_args.model_name_or_path
    if model_name is None:
        # the underscore keeps it out of a push to the Hub
        base = Path(training_args.output_dir) / f"_base-seed{training_args.seed}"
        with PartialState().main_process_first():
            model_name = str(load_or_pretrain(base, training_args.seed))
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    trainer = LuffyTrainer(
        model_name,
        reward_funcs,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.card_facts = facts
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # Only a dataset of the Hub can be linked to
    on_hub = dataset_name != EMBEDDED_TASK and not Path(dataset_name).exists()
    card: dict[str, Any] = {
        "model_name": Path(training_args.output_dir).name,
        "dataset_name": dataset_name if on_hub else None,
    }
    commit = None
    if training_args.push_to_hub:
        commit = trainer.push_to_hub(**card)  # saves as below, before
    else:
        trainer.save_model(training_args.output_dir)
        trainer.create_model_card(**card)
        trainer.accelerator.wait_for_everyone()  # others stay until the main process has saved
    trainer.accelerator.print(f"Saved the model, its tokenizer and its card to {training_args.output_dir}")
    if commit is not None:
        trainer.accelerator.print(f"Pushed them to {commit.repo_url}")
    return trainer


def card_facts(
    script_args: LuffyScriptArguments, training_args: LuffyConfig, model_args: ModelConfig, command: str | None
) -> CardFacts:
    """What the model card says about the arguments. To be asked before `run` changes any of them."""
    name = script_args.dataset_name or EMBEDDED_TASK
    data = None
    if name == EMBEDDED_TASK:
        data = "The data is the embedded letter walk, which `luffy_trl` generates."
    elif Path(name).exists():
        data = f"The data is `{Path(name).name}`, which is not on the Hub."
    given = given_fields(model_args) | given_fields(script_args) | training_args.given
    return CardFacts(data, as_yaml(given, known_secrets(training_args.hub_token)), command)


def load_reward_funcs(names: list[str] | None, dataset_name: str) -> list[Callable]:
    """The functions behind names and dotted paths.

    Raises:
        ValueError: naming the one that cannot be found.
    """
    if not names:
        if dataset_name != EMBEDDED_TASK:
            raise ValueError(
                f"--reward_funcs is missing. Give one or more of {', '.join(REWARD_FUNCS)}, or a dotted path to a "
                "function of your own."
            )
        names = ["letter_walk_reward"]
    functions = []
    for name in names:
        if name not in REWARD_FUNCS and "." not in name:
            raise ValueError(
                f"--reward_funcs {name}: no such reward function. Known are {', '.join(REWARD_FUNCS)}; your own is "
                "named by its dotted path, such as my_rewards.my_function."
            )
        functions.append(REWARD_FUNCS[name] if name in REWARD_FUNCS else import_function(name, "--reward_funcs"))
    return functions


def load_splits(
    name: str, script_args: ScriptArguments, seed: int
) -> dict[str, Dataset] | DatasetDict | IterableDatasetDict:
    """All splits of the embedded task, a file, a saved directory or a Hub dataset."""
    if name == EMBEDDED_TASK:
        return {split: to_dataset(walks) for split, walks in split_walks(seed=seed).items()}
    path = Path(name)
    if path.suffix in FILE_LOADERS:
        try:
            return datasets.load_dataset(
                FILE_LOADERS[path.suffix], data_files=str(path), streaming=script_args.dataset_streaming
            )
        except (DatasetGenerationError, StopIteration) as error:  # what `datasets` raises for broken, for empty files
            cause = error.__cause__ or "it holds no rows"
            raise ValueError(f"--dataset_name {name} cannot be read: {cause}") from error
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else {script_args.dataset_train_split: saved}
    return datasets.load_dataset(name, script_args.dataset_config, streaming=script_args.dataset_streaming)


def _split(dataset, split: str, dataset_name: str) -> Dataset | IterableDataset:
    if split not in dataset:
        raise ValueError(
            f"--dataset_name {dataset_name} has no split {split!r}, only {', '.join(map(repr, dataset))}. Choose with "
            "--dataset_train_split and --dataset_test_split."
        )
    return dataset[split]
