"""Demonstrations from the dataset's columns to token ids.

The data contract is TRL's prompt-completion type, so the same dataset also serves `SFTTrainer`:

    completion         the demonstration: a str, a list with one assistant message, or one of several turns (see
                       `trajectories.py`). None: this prompt has none.
    demonstrations     instead of `completion`: a list of such completions, several per prompt.
    completion_logps   optional: the behavior policy's log-prob of each token of `completion`, EOS included.

They are encoded once, before training. A demonstration becomes what the policy would have had to sample: the tokens
of its text, then EOS; in a conversation the token that ends a turn in the chat template, if generation stops there.
"""

import json
import math
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from .rendering import Tools, brief, end_of_turn, rendered_prompt, without_images, without_repeated_opening
from .trajectories import ChatMessage, ContextSpan, TrajectoryEncoder, is_trajectory


SOURCE_COLUMNS = ("completion", "demonstrations", "completion_logps")
# What encoding leaves in their place. The trainer takes these columns out again before the reward functions. Ids and
# log-probs are bytes, one value a demonstration: rows are copied, sent and walked through many times on their way.
IDS_COLUMN = "demonstration_ids"  # list[bytes], int32
LOGPS_COLUMN = "demonstration_logps"  # list[bytes], float32; there only where the data has `completion_logps`
TURNS_COLUMN = "demonstration_turns"  # list[str], JSON of a trajectory's messages and context; "" for one message
USABLE_COLUMN = "demonstrations_usable"  # int, how many there are
DROPPED_COLUMN = "demonstrations_dropped"  # int, demonstrations of this row that were too long
TRUNCATED_COLUMN = "demonstrations_truncated"  # int, demonstrations of this row that were cut
ROW_COLUMN = "demonstrations_row"  # int, the row's place in the dataset; there only where a source asks for it
ENCODED_COLUMNS = (
    IDS_COLUMN, LOGPS_COLUMN, TURNS_COLUMN, USABLE_COLUMN, DROPPED_COLUMN, TRUNCATED_COLUMN, ROW_COLUMN,
)  # fmt: skip

# What encoding reads
READ_COLUMNS = ("prompt", "tools", "environment", *SOURCE_COLUMNS)
# TRL's, of rows whose prompts environments make
PROMPT_OF_ENVIRONMENTS = [{"role": "user", "content": ""}]

OVERFLOWS = ("drop", "truncate", "error")

# Rows tokenized together: 100 long traces are some 10 MB of tokens
ENCODED_AT_ONCE = 100

# Part of the datasets cache's fingerprint: raise it with every change of what encoding produces
ENCODING_VERSION = 3


@dataclass(frozen=True)
class Demonstration:
    """One off-policy completion: its token ids, and the behavior policy's log-prob of each, where known.

    Where it is `continued`, it is the beginning of one, and the policy goes on from there. A trajectory has its
    messages, as reward functions get them, and its `context`: the tokens that tools and users have written.
    """

    token_ids: list[int]
    logps: list[float] | None = None
    continued: bool = False
    context: Sequence[ContextSpan] = ()
    messages: Sequence[ChatMessage] = ()

    def prefix(self, ratio: float) -> "Demonstration | None":
        """The first part, `ratio` of the tokens rounded down; all of it is the demonstration itself, nothing None."""
        length = math.floor(ratio * len(self.token_ids))
        if length >= len(self.token_ids):
            return self
        if length == 0:
            return None
        return Demonstration(self.token_ids[:length], self.logps and self.logps[:length], continued=True)

    def tool_mask(self) -> list[int]:
        """TRL's: 0 on the tokens that tools and users have written, 1 on the others."""
        mask = [1] * len(self.token_ids)
        for start, end in self.context:
            mask[start:end] = [0] * (end - start)
        return mask

    def turns(self, longest: int) -> "Demonstration | None":
        """The first turns, as many as have `longest` tokens; None where the first has more."""
        kept = [span for span in self.context if span[0] <= longest]
        if not kept:
            return None
        length = kept[-1][0]
        spoken = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        messages = self.messages[: spoken[len(kept) - 1] + 1]
        return Demonstration(
            self.token_ids[:length], self.logps and self.logps[:length], context=kept[:-1], messages=messages
        )


def demonstrations_of(row: dict[str, Any]) -> list[Demonstration]:
    """The usable demonstrations of an encoded row."""
    ids = [array("i", value).tolist() for value in row[IDS_COLUMN]]
    # Empty: this one brings none
    logps = [array("f", value).tolist() or None for value in row.get(LOGPS_COLUMN, [b""] * len(ids))]
    turns = [json.loads(value) if value else {} for value in row.get(TURNS_COLUMN, [""] * len(ids))]
    return [Demonstration(tokens, given, **of) for tokens, given, of in zip(ids, logps, turns, strict=True)]


class DemonstrationEncoder:
    """Checks and tokenizes the demonstrations of a batch of dataset rows; made for `datasets.map(batched=True)`.

    Args:
        processing_class: the trainer's tokenizer or processor. Its tokenizer has an EOS token.
        eos_token_ids: every token at which a rollout ends, the tokenizer's EOS among them.
        max_length: `max_completion_length`, in tokens, EOS included.
        overflow: what to do with a longer demonstration. "drop" it; "truncate" it to `max_length` tokens, which then
            do not end with EOS; "error".
        chat_template_kwargs: what prompts are rendered with, beside their messages.
        tools: and the tools that they are rendered with.
        gives_prefixes: the policy continues demonstrations, which cannot be done with a trajectory.

    Raises:
        ValueError: naming the row and the field, for a prompt that is missing; for a demonstration that
            is empty, is no text, or holds an EOS before its end; for log-probs that are not finite, positive, or of
            another number than the tokens; and for a demonstration that is too long under "error".
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        eos_token_ids: list[int],
        max_length: int,
        overflow: str,
        chat_template_kwargs: dict[str, Any],
        tools: Tools = Tools(),  # noqa: B008 - holds nothing
        gives_prefixes: bool = False,
    ):
        self.version = ENCODING_VERSION
        self.processing_class = processing_class
        self.eos_token_ids = eos_token_ids
        is_processor = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = processing_class.tokenizer if is_processor else processing_class
        # Where an image of the prompt is read; not each processor names it
        self.image_token_id = getattr(processing_class, "image_token_id", None) if is_processor else None
        self.max_length = max_length
        self.overflow = overflow
        self.chat_template_kwargs = chat_template_kwargs
        self.tools = tools
        self.gives_prefixes = gives_prefixes
        self.encode_trajectory = TrajectoryEncoder(processing_class, eos_token_ids)
        # Rollouts of a conversation end as its template does, where generation stops there
        turn_end = end_of_turn(processing_class, chat_template_kwargs)
        self.turn_end_id = turn_end if turn_end in eos_token_ids else self.tokenizer.eos_token_id

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        read = [name for name in READ_COLUMNS if name in batch]
        rows = [{name: batch[name][i] for name in read} for i in range(len(indices))]
        columns: dict[str, list] = {IDS_COLUMN: [], TURNS_COLUMN: [], USABLE_COLUMN: []}
        columns |= {DROPPED_COLUMN: [], TRUNCATED_COLUMN: []}
        if "completion_logps" in batch:
            columns[LOGPS_COLUMN] = []
        named = [_named(self._checked(row, number), number) for row, number in zip(rows, indices, strict=True)]
        for demonstrations in self._encoded(rows, named):
            fitting = [(self.fitting(demonstration, where), demonstration) for demonstration, where in demonstrations]
            kept = [(short, whole) for short, whole in fitting if short is not None]
            columns[IDS_COLUMN].append([array("i", short.token_ids).tobytes() for short, _ in kept])
            columns[TURNS_COLUMN].append([_turns(short) for short, _ in kept])
            columns[USABLE_COLUMN].append(len(kept))
            columns[DROPPED_COLUMN].append(len(fitting) - len(kept))
            columns[TRUNCATED_COLUMN].append(sum(len(s.token_ids) < len(w.token_ids) for s, w in kept))
            if LOGPS_COLUMN in columns:
                columns[LOGPS_COLUMN].append([array("f", short.logps or []).tobytes() for short, _ in kept])
        return columns

    def encode(self, value: Any, row: dict[str, Any], where: str) -> Demonstration:
        """One demonstration, however long: a completion in one of TRL's forms, or token ids with their log-probs.

        Args:
            row: of the dataset, with its `prompt`, and its `tools` where it has any.

        Raises:
            ValueError: starting with `where`, as for a dataset's row.
        """
        if isinstance(value, Demonstration):
            if not value.token_ids:
                raise ValueError(f"{where} has no tokens.")
            ids, logps = self._ended(list(value.token_ids), row["prompt"], where), value.logps
            if logps is not None:
                _check_logps(logps, len(ids), f"`logps` of {where}")
            return Demonstration(ids, logps)
        [[(demonstration, _)]] = self._encoded([row], [[(value, where)]])
        return demonstration

    def _checked(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        if "prompt" not in row and self.tools.of_environments is not None:
            row["prompt"] = PROMPT_OF_ENVIRONMENTS
        _check_prompt(row.get("prompt"), number)
        return row

    def _encoded(
        self, rows: list[dict[str, Any]], named: list[list[tuple[Any, str]]]
    ) -> list[list[tuple[Demonstration, str]]]:
        """Each row's demonstrations, and what messages call them.

        Args:
            named: the completions of each row, and what messages call them.
        """
        texts = [
            self._as_written(row, [demonstration_text(v, where) for v, where in values if not is_trajectory(v)])
            for row, values in zip(rows, named, strict=True)
        ]
        # One call for all texts of the batch: fast tokenizers spread it over the cores
        flat = [text for row_texts in texts for text in row_texts]
        tokenized = self.tokenizer(flat, add_special_tokens=False, return_attention_mask=False) if flat else {}
        flat_ids = iter(tokenized.get("input_ids", []))
        encoded: list[list[tuple[Demonstration, str]]] = []
        for row, values in zip(rows, named, strict=True):
            encoded.append([])
            for value, where in values:
                if is_trajectory(value):
                    demonstration = self._trajectory(value, row, where)
                else:
                    demonstration = Demonstration(self._ended(next(flat_ids), row["prompt"], where))
                encoded[-1].append((_with_logps(demonstration, row.get("completion_logps"), where), where))
        return encoded

    def _trajectory(self, value: list[ChatMessage], row: dict[str, Any], where: str) -> Demonstration:
        if self.gives_prefixes:
            raise ValueError(
                f"{where} is a trajectory, which is replayed whole: leave prefix_strategy, prefix_min and prefix_max "
                "out, or give the prompt one assistant message without tool calls."
            )
        options = self.chat_template_kwargs | self.tools.options(row, where.partition(":")[0])
        ids, context, messages = self.encode_trajectory(value, row["prompt"], options, where)
        self._check_image_tokens(ids, where)
        return Demonstration(ids, context=context, messages=messages)

    def fitting(self, demonstration: Demonstration, where: str) -> Demonstration | None:
        """The demonstration, if it fits; if it does not, what `overflow` makes of it, None where it is dropped."""
        length = len(demonstration.token_ids)
        if length <= self.max_length:
            return demonstration
        if self.overflow == "error":
            raise ValueError(
                f"{where} has {length} tokens, EOS included, more than max_completion_length={self.max_length}. Raise "
                "max_completion_length, shorten it, or set demonstration_overflow to 'drop' or 'truncate'."
            )
        if self.overflow == "drop":
            return None
        if demonstration.messages:  # whole turns: half of what a tool has answered is nothing to learn from
            return demonstration.turns(self.max_length)
        logps = demonstration.logps and demonstration.logps[: self.max_length]
        return Demonstration(demonstration.token_ids[: self.max_length], logps)

    def _as_written(self, row: dict[str, Any], texts: list[str]) -> list[str]:
        """The texts as the policy would write them after this prompt, which may already open the thought."""
        if not any("<think>" in text for text in texts):
            return texts
        options = self.chat_template_kwargs | self.tools.options(row, "`tools`")
        # Its end is what matters: images are not needed for it, and not there
        rendered = rendered_prompt(self.processing_class, without_images(row["prompt"]), options)
        return [without_repeated_opening(rendered, text) for text in texts]

    def _ended(self, ids: list[int], prompt: str | list[dict[str, Any]], where: str) -> list[int]:
        """The tokens with an end of sequence at their end, that of the prompt's kind, and nowhere else."""
        if not ids or ids[-1] not in self.eos_token_ids:
            ids = [*ids, self.turn_end_id if isinstance(prompt, list) else self.tokenizer.eos_token_id]
        early = [i for i in ids[:-1] if i in self.eos_token_ids]
        if early:
            raise ValueError(
                f"{where} holds the end-of-sequence token {self.tokenizer.decode(early[:1])!r} before its end. The "
                "policy could never write what follows it: cut the demonstration there, or remove the token."
            )
        self._check_image_tokens(ids, where)
        return ids

    def _check_image_tokens(self, ids: list[int], where: str) -> None:
        if self.image_token_id is not None and self.image_token_id in ids:
            raise ValueError(
                f"{where} holds the token {self.tokenizer.decode([self.image_token_id])!r}, in whose place the model "
                "reads an image, and a demonstration has none: remove the token."
            )


def encode_dataset(
    dataset: Dataset | IterableDataset,
    encoder: DemonstrationEncoder,
    first: AbstractContextManager = nullcontext(),  # noqa: B008 - holds nothing
) -> Dataset | IterableDataset:
    """The dataset with the columns of the data contract replaced by token ids; a stream is encoded as it is read.

    Args:
        first: entered around the work: on several processes the others wait, and read the cache of the first.

    Raises:
        ValueError: of the encoder.
    """
    columns = column_names(dataset)
    used = [column for column in SOURCE_COLUMNS if column in columns]
    options: dict[str, Any] = {"batched": True, "batch_size": ENCODED_AT_ONCE, "with_indices": True}
    if isinstance(dataset, IterableDataset):
        return dataset.map(encoder, remove_columns=used, **options)

    features = {name: feature for name, feature in dataset.features.items() if name not in used}
    features |= {IDS_COLUMN: List(Value("binary")), TURNS_COLUMN: List(Value("string"))}
    features |= dict.fromkeys((USABLE_COLUMN, DROPPED_COLUMN, TRUNCATED_COLUMN), Value("int32"))
    if "completion_logps" in used:
        features[LOGPS_COLUMN] = List(Value("binary"))
    with first:
        return dataset.map(
            encoder,
            writer_batch_size=ENCODED_AT_ONCE,
            remove_columns=used,
            features=Features(features),
            desc="Encoding demonstrations",
            **options,
        )


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Column names; those of a stream that does not know them are read off its first row, none if it is empty."""
    return dataset.column_names or list(next(iter(dataset), {}))


def without_demonstrations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the reward functions get them, in training and evaluation alike."""
    ours = (*SOURCE_COLUMNS, *ENCODED_COLUMNS)
    return [{key: value for key, value in row.items() if key not in ours} for row in rows]


def _named(row: dict[str, Any], number: int) -> list[tuple[Any, str]]:
    """The completions of a row, and what messages call them."""
    if "demonstrations" not in row:
        value = row["completion"]
        return [] if value is None else [(value, f"Row {number}: `completion`")]
    values = row["demonstrations"] or []
    if not isinstance(values, list):
        raise ValueError(
            f"Row {number}: `demonstrations` is {brief(values)}, expected a list of completions (each a str, or a "
            "list with one assistant message, or of several turns)."
        )
    return [(value, f"Row {number}: `demonstrations[{j}]`") for j, value in enumerate(values)]


def _turns(demonstration: Demonstration) -> str:
    if not demonstration.messages:
        return ""
    return json.dumps({"context": demonstration.context, "messages": demonstration.messages})


def _with_logps(demonstration: Demonstration, logps: list[float] | None, where: str) -> Demonstration:
    """With the behavior policy's log-probs in their places: a trajectory has them of its own tokens alone."""
    if logps is None:
        return demonstration
    mask = demonstration.tool_mask()
    _check_logps(logps, sum(mask), f"{where.partition(':')[0]}: `completion_logps`")
    own = iter(logps)
    return replace(demonstration, logps=[next(own) if is_own else 0.0 for is_own in mask])


def _check_logps(logps: list[float], number_of_tokens: int, where: str) -> None:
    if len(logps) != number_of_tokens:
        raise ValueError(
            f"{where} has {len(logps)} values, but `completion` has {number_of_tokens} tokens under this "
            "tokenizer, EOS included and without a '<think>\\n' that the prompt already ends with. There must be "
            "one log-prob a token."
        )
    for j, logp in enumerate(logps):
        if logp is None or not math.isfinite(logp) or logp > 0:
            raise ValueError(
                f"{where}[{j}] is {logp}. A log-probability is a finite number not above 0: pass natural logs of "
                "probabilities."
            )


def _check_prompt(prompt: Any, row: int) -> None:
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"Row {row}: `prompt` is {brief(prompt)}, expected a str or a list of messages.")


def demonstration_text(value: Any, where: str) -> str:
    """The text of a completion in TRL's plain or conversational form.

    Raises:
        ValueError: starting with `where`, if there is none or it is empty.
    """
    expected = "expected a str, or a list with exactly one assistant message"
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            roles = [m.get("role") if isinstance(m, dict) else brief(m) for m in value]
            raise ValueError(
                f"{where} is a list with roles {roles}; {expected}. The messages before it go in `prompt`."
            )
        message = value[0]
        extra = [k for k, v in message.items() if k not in ("role", "content") and v]
        if extra:
            raise ValueError(
                f"{where} has {', '.join(map(repr, extra))} beside its content. Only `content` is trained: write it "
                "there in the form that the policy should produce, such as '<think>\\n...\\n</think>\\n\\n...'."
            )
        value = message.get("content")
        if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
            value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{where} is {brief(value)}, no text; {expected}.")
    if not value.strip():
        raise ValueError(f"{where} is empty. Give it a text, or None where the prompt has no demonstration.")
    return value


def as_completion(prompt: str | list, text: str) -> str | list[dict[str, str]]:
    """The text in the prompt's form."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text


def stop_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token at which the model's generation stops, the tokenizer's EOS first."""
    try:
        stops = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # a tokenizer without a model
        stops = None
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return list(dict.fromkeys([tokenizer.eos_token_id, *stops]))
