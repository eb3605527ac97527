"""What a run is made of, from arguments: the dataset, the rewards, the model. Shared by `train` and `sft`."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoProcessor, PretrainedConfig
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

from ..checks import check_against_model, check_signature, named_datasets
from ..config import LuffyConfig
from ..data.contract import to_contract
from ..data.loading import check_file, choose_split, load_splits
from ..data.rows import checked_rows
from ..demonstrations.prompts import Reader, check_prompts
from ..rewards import choice_reward, format_reward, math_reward, math_reward_optional_thought
from ..runs.checkpoints import NEWEST, NONE, checkpoints, find_checkpoint
from ..runs.fitting import check_adapter, read_state
from ..runs.imports import named_function
from ..runs.lock import alone_in
from ..runs.manifest import CannotResumeError
from ..runs.mixin import WholeCheckpointMixin
from ..runs.stopping import RunStopped, StopAtStep
from ..tasks.gym import is_gym_task
from ..tasks.gym_reward import reasoning_gym_reward, reasoning_gym_solved_reward
from ..tasks.letter_walk import letter_walk_reward, split_walks, to_dataset
from ..tasks.letter_walk_base import load_or_pretrain
from .adapters import refuse_adapter


if TYPE_CHECKING:
    from peft import LoraConfig

EMBEDDED_TASK = "letter_walk"
# A part of a module's name, and no pattern
MODULE_NAME = re.compile(r"[\w.]+")
REWARD_FUNCS: dict[str, Callable] = {
    "math_reward": math_reward,
    "math_reward_optional_thought": math_reward_optional_thought,
    "choice_reward": choice_reward,
    "format_reward": format_reward,
    "accuracy_reward": accuracy_reward,
    "reasoning_accuracy_reward": reasoning_accuracy_reward,
    "think_format_reward": think_format_reward,
    "letter_walk_reward": letter_walk_reward,
    "reasoning_gym_reward": reasoning_gym_reward,
    "reasoning_gym_solved_reward": reasoning_gym_solved_reward,
}


@dataclass
class LuffyScriptArguments(ScriptArguments):
    """
    What to train on: the dataset and its rewards. The dataset fields are TRL's.

    Without `dataset_name` and `model_name_or_path` the run is the embedded letter walk, which needs no download.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, a local .parquet, .arrow, .json, .jsonl, .csv or .tsv file, a directory (of such files, "
            "or from prepare-data or save_to_disk), 'reasoning_gym:TASK,OPTION=VALUE,...', or 'letter_walk', the "
            "embedded task. The columns of "
            "Elliott/Openr1-Math-46k-8192 and open-r1/OpenR1-Math-220k are recognised. Default: the embedded task, if "
            "no model is given either."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or more reward functions, summed: 'math_reward', 'math_reward_optional_thought' (without the "
            "need of a '</think>'), 'choice_reward', 'format_reward', 'accuracy_reward', 'reasoning_accuracy_reward', "
            "'think_format_reward' (TRL's), 'letter_walk_reward', 'reasoning_gym_reward', "
            "'reasoning_gym_solved_reward', "
            "or a dotted path such as "
            "my_rewards.my_function, found from the working directory. Needed for every dataset but the embedded one "
            "and reasoning-gym's."
        },
    )


class UsageError(ValueError):
    """What the person who started a run can put right: arguments, data, a model that do not go together."""


@contextmanager
def before_training() -> Iterator[None]:
    """A ValueError in here is about arguments or data, an OSError about files or the Hub, an ImportError about a
    package that is missing."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error


@contextmanager
def after_training() -> Iterator[None]:
    """Ctrl-C in here is no loss of the training, which the message says."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("after the training, while the model was saved or pushed") from error


def check_arguments(script_args: LuffyScriptArguments, model_args: ModelConfig) -> None:
    """Raises ValueError for arguments that do not go together, before anything is loaded."""
    check_dataset_arguments(script_args, model_args)
    load_reward_funcs(script_args.reward_funcs, script_args.dataset_name or EMBEDDED_TASK)


def check_dataset_arguments(script_args: LuffyScriptArguments, model_args: ModelConfig) -> None:
    """Raises ValueError if dataset and model do not go together, or there is no such file."""
    model_name, dataset_name = model_args.model_name_or_path, script_args.dataset_name
    if model_name is None and dataset_name is not None and dataset_name != EMBEDDED_TASK:
        raise ValueError(f"--model_name_or_path is missing: which model should be trained on {dataset_name}?")
    if dataset_name is None and model_name is not None:
        raise ValueError(
            f"--dataset_name is missing: what should {model_name} be trained on? ('letter_walk' is the embedded task.)"
        )
    if dataset_name not in (None, EMBEDDED_TASK):
        check_file(dataset_name, f"--dataset_name {dataset_name}")


def check_output_dir(output_dir: str) -> None:
    """Raises ValueError if nothing can be written there: better now than at the first checkpoint."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output_dir) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written to: {error}") from error


def base_model(name: str | None, output_dir: str, seed: int) -> str:
    """The model to train: the one that was named, or the embedded task's, pretrained now if it is not there."""
    if name is not None:
        return name
    # the underscore keeps it out of a push to the Hub
    with PartialState().main_process_first():
        return str(load_or_pretrain(Path(output_dir) / f"_base-seed{seed}", seed))


@contextmanager
def holding(output_dir: str) -> Iterator[None]:
    """As [`alone_in`]; that another run is there is a UsageError."""
    with ExitStack() as stack:
        with before_training():
            stack.enter_context(alone_in(output_dir))
        yield


def resume_point(training_args: LuffyConfig | SFTConfig, model_args: ModelConfig) -> str | None:
    """What to resume from: "auto", a checkpoint's directory, downloaded if need be, or None. Before a model is loaded.

    Raises:
        CannotResumeError: a ValueError, if there is no such checkpoint, or it does not fit the arguments.
    """
    name = training_args.resume_from_checkpoint
    if name in NEWEST:
        return "auto"
    found = find_checkpoint(name, training_args.output_dir)
    if found is not None:
        peft_config = get_peft_config(model_args)
        check_adapter(Path(found), None if peft_config is None else peft_config.to_dict())
    return found


def warn_of_checkpoints(training_args: LuffyConfig | SFTConfig) -> None:
    """Of another run in the same place. The trainer moves it away when it begins."""
    directory, earlier = training_args.output_dir, checkpoints(training_args.output_dir)
    if earlier and training_args.resume_from_checkpoint in NONE:
        names = ", ".join(path.name for path in earlier)
        PartialState().print(
            f"Warning: {directory} holds {earlier[0].name} of an earlier run. --resume_from_checkpoint auto goes on "
            f"from it; without it this is a new run, for which {names} and the logs beside make place, and which "
            "belongs in another --output_dir."
        )


def model_options(model_args: ModelConfig, training_args: LuffyConfig | SFTConfig) -> dict[str, Any]:
    """A trainer's arguments that make its model. Completes `training_args.model_init_kwargs`.

    Raises:
        ValueError: if flash attention is asked for and not installed.
    """
    attention = model_args.attn_implementation
    if attention == "flash_attention_2" and not (is_flash_attn_2_available() or is_kernels_available()):
        raise ValueError(
            f"--attn_implementation {attention} needs a GPU and a kernel of the Hub, or the package flash-attn, and "
            "one is missing here. pip install 'luffy_trl[kernels]', or take --attn_implementation sdpa, which pads."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    return {
        "model": base_model(model_args.model_name_or_path, training_args.output_dir, training_args.seed),
        "quantization_config": get_quantization_config(model_args),
        "peft_config": peft_config(model_args),
    }


def finished_before(trainer: WholeCheckpointMixin, checkpoint: str | None) -> bool:
    """Whether the run that is in the output directory has come to its end, with the model saved. Says so.

    The trainer gets its state and weights; nothing on disk changes.

    Raises:
        ValueError: for a state that cannot be read, or a metric that no evaluation logs.
    """
    trainer.check_before_training()
    step = trainer.finished_at(checkpoint)
    if step is None:
        return False
    directory = trainer.args.output_dir
    trainer.state = read_state(Path(directory))
    if is_peft_model(trainer.model):
        trainer.model.load_adapter(directory, trainer.model.active_adapters[0], is_trainable=True)
    elif not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        trainer._load_from_checkpoint(directory)
    trainer.accelerator.print(
        f"This run is finished: {step} of {step} optimizer steps are done, and its model is in {directory}. Nothing "
        "was changed. A higher --max_steps or --num_train_epochs goes on from there; a new run belongs in another "
        "--output_dir."
    )
    return True


def peft_config(model_args: ModelConfig) -> "LoraConfig | None":
    """TRL's; a single module's name stays that: TRL makes a text of a list of one, which PEFT takes for a pattern."""
    target = model_args.lora_target_modules
    if isinstance(target, str) and MODULE_NAME.fullmatch(target):
        model_args = copy(model_args)
        model_args.lora_target_modules = [target]
    return get_peft_config(model_args)


def check_model(model_args: ModelConfig) -> None:
    """Raises ValueError if there is no such model, or it is an adapter alone."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        return
    try:
        refuse_adapter(f"--model_name_or_path {name}", name, revision)
        PretrainedConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise ValueError(f"--model_name_or_path {name} cannot be loaded: {error}") from error


def check_reading(
    model_args: ModelConfig,
    training_args: LuffyConfig | SFTConfig,
    datasets: dict[str, Dataset | IterableDataset | None],
) -> None:
    """What the model's tokenizer and configuration say of the data, before its weights are loaded.

    Args:
        datasets: `train_dataset` and `eval_dataset`, as the trainer will get them.

    Raises:
        ValueError: naming row and field of what the model cannot read, or if it has no tokenizer.
    """
    name = model_args.model_name_or_path
    if name is None:  # the embedded task's reads its own data
        return
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        processing_class = AutoProcessor.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(f"--model_name_or_path {name} has no tokenizer that can be loaded: {error}") from error
    if isinstance(training_args, LuffyConfig):
        check_against_model(processing_class, config, None, datasets, training_args)  # the trainer warns
    elif training_args.chat_template_path is None:
        for split, dataset in named_datasets(datasets).items():
            of = "" if split == "train_dataset" else f" of `{split}`"
            check_prompts(Reader(processing_class, config), dataset, of, None)


def train_until_stopped(trainer: WholeCheckpointMixin, checkpoint: str | None) -> None:
    """Train to the end, from the checkpoint if there is one.

    Raises:
        UsageError: for a checkpoint that does not fit.
        RunStopped: after a signal, when the checkpoint is saved.
    """
    with StopAtStep() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except CannotResumeError as error:
            raise UsageError(str(error)) from error
    if stop.received and stop.stopped:
        raise RunStopped(stop.received, f"checkpoint-{trainer.state.global_step}")


def load_reward_funcs(names: list[str] | None, dataset_name: str) -> list[Callable]:
    """The functions behind names and dotted paths.

    Raises:
        ValueError: naming the one that cannot be found.
    """
    if not names:
        if dataset_name != EMBEDDED_TASK and not is_gym_task(dataset_name):
            raise ValueError(
                f"--reward_funcs is missing. Give one or more of {', '.join(REWARD_FUNCS)}, or a dotted path to a "
                "function of your own."
            )
        names = ["letter_walk_reward" if dataset_name == EMBEDDED_TASK else "reasoning_gym_reward"]
    known = ", ".join(REWARD_FUNCS)
    functions = [
        named_function(
            name,
            REWARD_FUNCS,
            "--reward_funcs",
            f"--reward_funcs {name}: no such reward function. Known are {known}; your own is named by its dotted "
            "path, such as my_rewards.my_function.",
        )
        for name in names
    ]
    for name, function in zip(names, functions, strict=True):
        check_signature(function, f"--reward_funcs {name}")
    return functions


def load_dataset_splits(name: str, script_args: ScriptArguments, seed: int) -> Mapping[str, Dataset | IterableDataset]:
    """All splits of the embedded task, a file, a directory or a Hub dataset."""
    if name == EMBEDDED_TASK:
        return {split: to_dataset(walks) for split, walks in split_walks(seed=seed).items()}
    where = f"--dataset_name {name}"
    try:
        return load_splits(
            name,
            where,
            script_args.dataset_config,
            script_args.dataset_streaming,
            only_split=script_args.dataset_train_split,
        )
    except OSError as error:
        raise ValueError(f"{where}: no such file or directory here, nor to be had from the Hub: {error}") from error


def load_eval_split(
    splits: Mapping[str, Dataset | IterableDataset],
    script_args: LuffyScriptArguments,
    training_args: LuffyConfig | SFTConfig,
    name: str,
) -> Dataset | IterableDataset | None:
    """The split to evaluate on, if there is to be any evaluation.

    Raises:
        ValueError: if there is no such split, with how to bring one.
    """
    option = f"--eval_strategy {training_args.eval_strategy.value}"
    if training_args.eval_strategy == "no":
        if not training_args.eval_on_start:
            return None
        option = "--eval_on_start"
    split = script_args.dataset_test_split
    if split not in splits:
        raise ValueError(
            f"{option} needs a split to evaluate on, and --dataset_name {name} has no {split!r}, only "
            f"{', '.join(map(repr, splits))}. Give a folder with a file {script_args.dataset_train_split}.jsonl and a "
            f"file {split}.jsonl as --dataset_name, name another split with --dataset_test_split, or leave {option} "
            "out."
        )
    return load_split(splits, split, name)


def load_split(
    splits: Mapping[str, Dataset | IterableDataset],
    split: str,
    name: str,
    options: str = "--dataset_train_split and --dataset_test_split",
) -> Dataset | IterableDataset:
    """One split, in the columns of the data contract, its prompts and gold answers checked.

    Args:
        options: with which another split is chosen.
    """
    where = f"--dataset_name {name}"
    dataset = choose_split(splits, split, where, options)
    return checked_rows(to_contract(dataset, where), f"{where}, split {split!r}" if len(splits) > 1 else where)
