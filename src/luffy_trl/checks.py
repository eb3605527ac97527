"""What is refused and warned of before anything is learned: each check says what is wrong, and what to do.

Refusals are ValueErrors, in the order in which a run meets them: options and columns, the tokenizer, the reward
functions. Warnings are sentences; a check that only warns never ends a run.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward
from trl.trainer.utils import get_callable_name, get_config_model_id

from .advantages import ANSWER_REWARDS, SOLVED_SLACK, TOTAL, Outcome, deciding_reward
from .config import LuffyConfig
from .data.loading import first_rows
from .demonstrations.agreement import LOOKED_AT, disagreements, turn_endings
from .demonstrations.encoding import (
    DROPPED_COLUMN,
    ENCODED_COLUMNS,
    SOURCE_COLUMNS,
    TRUNCATED_COLUMN,
    USABLE_COLUMN,
    DemonstrationEncoder,
    column_names,
)
from .demonstrations.images import IMAGE_COLUMNS, images_of
from .demonstrations.placement import Placement
from .demonstrations.prompts import Reader, check_prompts
from .demonstrations.rendering import images_in, tools_of
from .rewards.signatures import misfit


# TRL hands each dataset column to the reward functions by name, beside these arguments of its own
RESERVED_COLUMNS = ("prompts", "completions")

# What TRL gives to every reward function, beside the dataset's columns
ALWAYS_GIVEN = {
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments",
}  # fmt: skip
# Columns that TRL keeps from them
NEVER_GIVEN = ("prompt", "completion", "completion_ids")
READ_MESSAGES = (accuracy_reward, reasoning_accuracy_reward, think_format_reward)


# Options and columns


def check_options(arguments: dict[str, Any], args: LuffyConfig) -> None:
    """Refuse, by name, data and options that would fail later or silently do something else.

    Args:
        arguments: of the trainer's constructor, by name.

    Raises:
        ValueError: naming the option or the column.
    """
    for name, dataset in named_datasets(arguments).items():
        _check_columns(name, column_names(dataset), arguments.get("environment_factory") is not None)
        if isinstance(dataset, Dataset) and len(dataset) == 0 and name != "train_dataset":
            raise ValueError(f"`{name}` has no rows. Add some, or leave it out (eval_strategy='no').")
        if args.num_demonstrations > 0:
            _check_names_are_free(name, column_names(dataset))
    train_dataset = arguments.get("train_dataset")
    if isinstance(train_dataset, Dataset):
        _check_size(train_dataset, args)
    columns = column_names(train_dataset) if isinstance(train_dataset, Dataset | IterableDataset) else None
    if args.num_demonstrations > 0:
        _check_options_beside_demonstrations(arguments, args)
        if columns is not None and args.demonstration_source == "dataset":
            _check_demonstration_columns(columns)


def named_datasets(arguments: dict[str, Any]) -> dict[str, Dataset | IterableDataset]:
    """Those of the trainer's constructor, by the names under which messages speak of them."""
    eval_dataset = arguments.get("eval_dataset")
    named = {"train_dataset": arguments.get("train_dataset")}
    if isinstance(eval_dataset, dict):
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    else:
        named["eval_dataset"] = eval_dataset
    return {name: dataset for name, dataset in named.items() if isinstance(dataset, Dataset | IterableDataset)}


def _check_size(train_dataset: Dataset, args: LuffyConfig) -> None:
    prompts = args.generation_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} rows, fewer than the {prompts} prompts of one generation "
            f"(generation_batch_size={args.generation_batch_size} / num_generations={args.num_generations}), "
            "so no step would be taken. Add rows, or lower gradient_accumulation_steps or "
            "per_device_train_batch_size."
        )


def _check_options_beside_demonstrations(arguments: dict[str, Any], args: LuffyConfig) -> None:
    if arguments.get("rollout_func"):
        raise ValueError(
            "`rollout_func` cannot be combined with demonstrations: it makes all of a group's completions itself. Set "
            "num_demonstrations=0, or give `tools` or an `environment_factory` in its place."
        )
    if arguments.get("train_dataset") is None and args.demonstration_source == "dataset":
        raise ValueError(
            "`train_dataset` is missing, and with it the demonstrations. Give prompts and demonstrations, beside an "
            "`environment_factory` too, or a function as demonstration_source, or set num_demonstrations=0."
        )
    for option in ("tools", "environment_factory"):
        if arguments.get(option) and args.demonstration_source == "replay":
            raise ValueError(
                f"`{option}` cannot be combined with demonstration_source='replay': its buffer keeps the policy's "
                "tokens, and not what tools have answered between them. Record trajectories in the dataset, or leave "
                f"`{option}` out."
            )
    if args.demonstration_source == "replay" and isinstance(arguments.get("train_dataset"), IterableDataset):
        raise ValueError(
            "demonstration_source='replay' needs a dataset whose rows can be read again, and `train_dataset` is a "
            "stream. Load it without dataset_streaming (streaming=False)."
        )


def _check_columns(name: str, columns: list[str], environment_makes_prompts: bool) -> None:
    if not columns:
        raise ValueError(f"`{name}` is empty.")
    if "prompt" not in columns and not environment_makes_prompts:
        raise ValueError(f"`{name}` has no `prompt` column, only {columns}.")
    for column in RESERVED_COLUMNS:
        if column in columns:
            raise ValueError(
                f"`{name}` has a column {column!r}, the name under which reward functions receive the trainer's own "
                f"{column}. Rename it: demonstrations are called 'completion' or 'demonstrations'."
            )


def _check_demonstration_columns(columns: list[str]) -> None:
    has_one, has_several = "completion" in columns, "demonstrations" in columns
    if not has_one and not has_several:
        raise ValueError(
            f"`train_dataset` has neither a `completion` nor a `demonstrations` column, only {columns}. Add one (see "
            "luffy_trl.demonstrations.encoding), or set num_demonstrations=0 for plain GRPO."
        )
    if has_one and has_several:
        raise ValueError("`train_dataset` has both `completion` and `demonstrations`. Remove one of them.")
    if has_several and "completion_logps" in columns:
        raise ValueError(
            "`train_dataset` has `completion_logps`, which go with `completion`, but its demonstrations are in "
            "`demonstrations`. Use `completion`, or remove the log-probs."
        )


def _check_names_are_free(name: str, columns: list[str]) -> None:
    taken = [column for column in ENCODED_COLUMNS if column in columns]
    if taken:
        raise ValueError(f"`{name}` has a column {taken[0]!r}, a name LuffyTrainer uses itself. Rename it.")


# The model and its tokenizer


def check_against_model(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    config: PretrainedConfig,
    eos_token_ids: list[int] | None,
    arguments: dict[str, Any],
    args: LuffyConfig,
) -> list[str]:
    """Sentences on prompts of training and evaluation that the model reads otherwise than it should.

    Args:
        config: of the model, whose weights need not be there yet.
        eos_token_ids: at which generation stops; None where that is not known yet.
        arguments: of the trainer's constructor, by name.

    Raises:
        ValueError: naming row and field, for prompts that the model cannot read: see [`check_prompts`].
    """
    if arguments.get("rollout_func") is not None:  # it may take prompts of any kind
        return []
    window = args.vllm_max_model_length if args.use_vllm else None
    tools = arguments.get("tools")
    options = (args.chat_template_kwargs or {}) | ({"tools": list(tools)} if tools else {})
    reader = Reader(processing_class, config, options, window)
    messages = []
    for name, dataset in named_datasets(arguments).items():
        if "prompt" in column_names(dataset):
            rows = dataset if isinstance(dataset, Dataset) else first_rows(dataset, LOOKED_AT, f"`{name}`")
            of = "" if name == "train_dataset" else f" of `{name}`"
            messages += check_prompts(reader, rows, of, args.max_completion_length)
            if not tools and arguments.get("environment_factory") is None:
                _check_tools_of_rows(rows, of)
            if eos_token_ids is not None and name == "train_dataset" and isinstance(rows[0]["prompt"], list):
                messages += turn_endings(processing_class, eos_token_ids, args.chat_template_kwargs)
    return messages


def _check_tools_of_rows(rows: Sequence[dict[str, Any]] | Dataset, of: str) -> None:
    """TRL renders prompts with images by itself a second time, and then knows of the trainer's own tools alone."""
    if "tools" not in (column_names(rows) if isinstance(rows, Dataset) else rows[0]):
        return
    tools = rows["tools"] if isinstance(rows, Dataset) else [row["tools"] for row in rows]
    of_rows = (i for i, value in enumerate(tools) if tools_of({"tools": value}, f"Row {i}{of}") is not None)
    number = next(of_rows, None)
    if number is not None and (images_of(rows[number]) or images_in(rows[number]["prompt"])):
        raise ValueError(
            f"Row {number}{of}: `tools` cannot be combined with the images of its prompt. Leave one of them out, or "
            "give the trainer the tools themselves."
        )


def check_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so a demonstration cannot end. Set `tokenizer.eos_token` to the token "
            "that ends the model's answers and pass it as `processing_class`."
        )


# The reward functions


def check_rewards(arguments: dict[str, Any], args: LuffyConfig) -> None:
    """Refuse reward functions that could not be called, or not decide what is solved, before a model is loaded.

    Args:
        arguments: of the trainer's constructor, by name.

    Raises:
        ValueError: naming the function and what it needs, or the option.
    """
    given = arguments.get("reward_funcs") or []
    functions = given if isinstance(given, list) else [given]
    if arguments.get("environment_factory") is None:  # whose own rewards, and their names, come later
        deciding_reward([reward_name(function) for function in functions], args.solved_reward)
    if arguments.get("rollout_func"):  # which may bring what a function needs
        return
    called = [f for f in functions if not isinstance(f, str | torch.nn.Module)]
    for name, dataset in named_datasets(arguments).items():
        withheld = list(SOURCE_COLUMNS) if args.num_demonstrations > 0 else []
        if args.remove_unused_columns:
            withheld = [column for column in column_names(dataset) if column not in IMAGE_COLUMNS]
        check_reward_inputs(called, dataset, "The reward function", f"`{name}`", withheld)


def reward_name(function: Callable | str) -> str:
    """What TRL calls a reward function, or a reward model."""
    if isinstance(function, str):
        return function.split("/")[-1]
    if isinstance(function, torch.nn.Module):
        return get_config_model_id(function.config).split("/")[-1]
    return get_callable_name(function)


def check_signature(function: Callable, name: str, columns: Sequence[str] = ()) -> None:
    """Raises ValueError for a function that cannot be called as reward functions are, or returns no list.

    Args:
        name: what to call it in messages.
        columns: of the dataset, where it is known: they are arguments too.
    """
    if isinstance(function, torch.nn.Module):  # TRL calls a model in another way
        return
    own = ("prompt", *SOURCE_COLUMNS, *ENCODED_COLUMNS, "completion_ids")
    given = ALWAYS_GIVEN - {"environments"} | {column for column in columns if column not in own}
    fault = misfit(function, given)
    if fault is not None:
        raise ValueError(f"{name} {fault}")


def check_reward_inputs(
    functions: Sequence[Callable],
    dataset: Dataset | IterableDataset,
    option: str,
    where: str,
    withheld: Collection[str] = (),
) -> None:
    """
    Args:
        option, where: what to call the functions and the dataset in messages.
        withheld: columns that reward functions are not given, beside `NEVER_GIVEN`.

    Raises:
        ValueError: naming a function that cannot be called with the dataset's columns, needs a column which is not
            there, or messages where there are texts.
    """
    [first] = first_rows(dataset, 1, where)
    for function in functions:
        name = reward_name(function)
        check_signature(function, f"{option} {name}", list(first))
        for column in needed_columns(function):
            if column not in first:
                raise ValueError(
                    f"{option} {name} needs the column {column!r}, and {where} has only {', '.join(first)}. Rename or "
                    "add it."
                )
            if column in NEVER_GIVEN or column in withheld:
                raise ValueError(
                    f"{option} {name} needs the column {column!r} of {where}, which reward functions are not given. "
                    "Take `prompts` and `completions`, or a column of another name."
                )
        if function in READ_MESSAGES and isinstance(first.get("prompt"), str):
            raise ValueError(
                f"{option} {name} reads conversations, and the prompts of {where} are plain texts. Make `prompt` and "
                "`completion` lists of messages (luffy-trl prepare-data --conversational does), or take math_reward "
                "or math_reward_optional_thought, which read both."
            )


def needed_columns(function: Callable) -> list[str]:
    """Those that it names in `columns`, and the arguments without a default, which TRL fills from columns."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # compiled code: nobody knows what it needs
        parameters = []
    return list(getattr(function, "columns", ())) + [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind in named and parameter.name not in ALWAYS_GIVEN
    ]


def solved_warnings(names: Sequence[str], weights: Sequence[float], args: LuffyConfig) -> list[str]:
    """A sentence where a completion could count as solved without being right.

    Args:
        names, weights: of the reward functions, each taken to give at most 1.
    """
    if len(names) < 2:
        return []
    how = "Set solved_reward to the name of the one that decides (and solved_threshold to its value)"
    answers = [name for name in names if name in ANSWER_REWARDS]
    if deciding_reward(names, args.solved_reward) is not None:
        if args.solved_reward is None and len(answers) > 1:
            return [f"Of {' and '.join(answers)}, {answers[0]} decides what is solved. {how}, if it is another one."]
        return []
    threshold = args.solved_threshold
    most = sum(max(weight, 0.0) for weight in weights)
    weight, missed = min((weight, name) for weight, name in zip(weights, names, strict=True))
    can_miss = most - max(weight, 0.0) >= threshold - SOLVED_SLACK
    if args.solved_reward is None:
        message = (
            f"Solved, for success_gate, replay and groups/*, is a weighted total reward of at least {threshold:g}: "
            f"none of {', '.join(names)} is known to judge answers"
        )
    elif can_miss:
        message = f"solved_reward={TOTAL!r} counts a weighted total of at least {threshold:g} as solved"
    else:
        return []
    without = f", and the others can reach it without {missed}" if can_miss else ""
    return [f"{message}{without}. {how}."]


# What is said of demonstrations


def source_warnings(
    dataset: Dataset | IterableDataset,
    encoded: Dataset | IterableDataset,
    encoder: DemonstrationEncoder,
    args: LuffyConfig,
) -> list[str]:
    """Sentences on where demonstrations come from.

    Args:
        dataset, encoded: before and after the source was opened.

    Raises:
        ValueError: if no prompt has a usable demonstration.
    """
    if args.demonstration_source == "replay":
        return unused_columns(dataset)
    if args.demonstration_source != "dataset":
        return []
    is_table = isinstance(encoded, Dataset)
    if "prompt" not in column_names(dataset):  # an environment makes them
        return check_encoded(encoded, encoder.max_length, args.demonstration_overflow) if is_table else []
    messages = check_encoded(encoded, encoder.max_length, args.demonstration_overflow) if is_table else []
    return messages + disagreements(encoder.processing_class, dataset.take(LOOKED_AT), encoder.chat_template_kwargs)


def check_encoded(dataset: Dataset, max_completion_length: int, overflow: str) -> list[str]:
    """A sentence on demonstrations that were too long, if any was.

    Raises:
        ValueError: if no prompt has a usable demonstration.
    """
    guided = sum(usable > 0 for usable in dataset[USABLE_COLUMN])
    dropped, truncated = sum(dataset[DROPPED_COLUMN]), sum(dataset[TRUNCATED_COLUMN])
    too_long = (
        f"{dropped} demonstrations dropped and {truncated} truncated for having more than max_completion_length="
        f"{max_completion_length} tokens (demonstration_overflow={overflow!r})"
    )
    if guided == 0:
        raise ValueError(
            f"None of the {len(dataset)} prompts has a usable demonstration; {too_long}. Give the dataset "
            "demonstrations that fit, or set num_demonstrations=0 for plain GRPO."
        )
    if dropped == truncated == 0:
        return []
    return [f"{guided} of {len(dataset)} prompts have a demonstration; {too_long}."]


def unused_columns(dataset: Dataset) -> list[str]:
    """With replay, a sentence on demonstrations of the dataset, which it does not use."""
    return [
        f"demonstration_source='replay' does not use the column {column!r} of `train_dataset`."
        for column in SOURCE_COLUMNS
        if column in dataset.column_names
    ][:1]


# What is said of a generation, and of many

COLD_START = (
    "No rollout has been right for a while, and the rollouts' advantages push down harder than the demonstrations' "
    "pull up (groups/push_to_pull): a policy of some entropy forgets what it knows before it learns. Set shaping: log "
    "and advantage_baseline: on_policy, which pull improbable tokens up and push nothing down where all rollouts are "
    'wrong, or begin with luffy-trl sft. See docs/method.md, "A cold start".'
)


def overflow_warnings(placement: Placement, max_completion_length: int) -> list[str]:
    """A sentence on a generation whose demonstrations were all too long, on this process."""
    if not placement.dropped or any(d is not None for d in placement.demonstrations):
        return []
    return [
        "All demonstrations of a generation were dropped for having more than max_completion_length="
        f"{max_completion_length} tokens."
    ]


def first_generation_warnings(outcome: Outcome) -> list[str]:
    """Sentences on rewards from which nothing can be learned."""
    messages, rewards = [], outcome.rewards
    if rewards.isnan().all():
        messages.append(
            "No reward function had a reward for any completion of the first generation (all None), so nothing is "
            "learned from it. TRL's accuracy rewards give None for a `solution` that they cannot read: it must be "
            "text that holds the answer alone."
        )
    demonstrations_rewards = rewards[outcome.has_demonstration & ~rewards.isnan()]
    if demonstrations_rewards.numel() > 0 and (demonstrations_rewards <= 0).all():
        messages.append(
            "No demonstration of the first generation earned a reward, so nothing is learned from them. Most "
            "often the reward looks for something that they do not have (such as '</think>' or \\boxed{}), or "
            "`solution` is not their answer: grade one by hand."
        )
    return messages
