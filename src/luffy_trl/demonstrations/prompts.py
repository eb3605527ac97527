"""Prompts against the model that is to read them: its chat template, its window, its embeddings.

What a template refuses, what is longer than the window, and tokens that have no embedding are found in the data,
before a model's weights are loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeAlias

from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .encoding import SOURCE_COLUMNS
from .images import IMAGE_COLUMNS, images_of
from .rendering import brief, images_in, rendered_prompt, tools_of


# Positions beyond the window are an index error in these, and no extrapolation
TABLE_OF_POSITIONS = ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "opt")
# Of a whole table the prompts with the most bytes are counted: each token is a byte or more
COUNTED_AT_MOST = 1000
TOKENIZED_AT_ONCE = 100
EXTEND = "extend the model: model.resize_token_embeddings(len(tokenizer))"
BEGINNING = 20  # of a text, in characters without blanks: templates strip and join

ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def render(
    processing_class: ProcessingClass,
    row: dict[str, Any],
    chat_template_kwargs: dict[str, Any],
    where: str,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt of a dataset row as it stands in front of the policy.

    Raises:
        ValueError: starting with `where`, if the chat template refuses it, or its images have no places.
    """
    places, images = images_in(row["prompt"]).count(None), images_of(row) or []
    if places and places != len(images):
        raise ValueError(
            f"{where}: `prompt` has {places} places for images ({{'type': 'image'}}), and the row has {len(images)} "
            "images in its columns `image` or `images`. Give each place its image."
        )
    if "tools" not in chat_template_kwargs and (tools := tools_of(row, where)) is not None:
        chat_template_kwargs = chat_template_kwargs | {"tools": tools}
    try:
        return rendered_prompt(processing_class, row["prompt"], chat_template_kwargs, images, add_generation_prompt)
    except Exception as error:  # a template may raise anything
        raise ValueError(_refusal(processing_class, row["prompt"], chat_template_kwargs, where, error)) from error


def _refusal(
    processing_class: ProcessingClass, prompt: Any, kwargs: dict[str, Any], where: str, error: Exception
) -> str:
    another = "give the model a template that takes it (luffy-trl prepare-model --template)"
    if processing_class.chat_template is None and "chat_template" not in kwargs:
        return (
            f"{where}: `prompt` is a list of messages, and the model's tokenizer has no chat template. Give it one "
            "(luffy-trl prepare-model --template chatml or plain), or make the prompts texts."
        )
    says = f"the model's chat template ({' '.join(str(error).split()).rstrip('.')})"
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return f"{where}: `prompt` is {brief(prompt)}, refused by {says}. It must be a str or a list of messages."
    roles = [str(message.get("role")) for message in prompt]
    for role in dict.fromkeys(roles):
        rest = [message for message in prompt if message.get("role") != role]
        if role not in ("user", "assistant") and rest and _renders(processing_class, rest, kwargs):
            return (
                f"{where}: `prompt` has a message with the role {role!r}, which is refused by {says}. Put its text "
                f"into the first user message, or {another}."
            )
    return (
        f"{where}: `prompt`, with the roles {', '.join(roles)}, is refused by {says}. Write it in the roles and the "
        f"order that the template takes, or {another}."
    )


def _renders(processing_class: ProcessingClass, prompt: list[dict[str, Any]], kwargs: dict[str, Any]) -> bool:
    try:
        return bool(rendered_prompt(processing_class, prompt, kwargs))
    except Exception:  # as above
        return False


@dataclass(frozen=True)
class Reader:
    """A model as far as prompts are concerned.

    Args:
        processing_class: the tokenizer, or processor, that renders the prompts.
        config: of the model.
        chat_template_kwargs: what prompts are rendered with, beside their messages.
        max_window: a smaller window, if there is one, such as vLLM's.
    """

    processing_class: ProcessingClass
    config: PretrainedConfig
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_window: int | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        processing_class = self.processing_class
        return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class

    def render(self, row: dict[str, Any], where: str) -> str:
        return render(self.processing_class, row, self.chat_template_kwargs, where)

    def token_ids(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Of rendered prompts, or of plain ones, to which TRL adds the tokenizer's special tokens."""
        return self.tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def window(self) -> int | None:
        """How many tokens the model was made for, scaling of its positions included; None where there is no limit."""
        text = self.config.get_text_config()
        window = getattr(text, "max_position_embeddings", None)
        rope = getattr(text, "rope_parameters", None) or {}
        if window is not None and isinstance(rope.get("factor"), int | float):
            window = max(window, int(rope["factor"] * rope.get("original_max_position_embeddings", window)))
        limits = [limit for limit in (window, self.max_window) if limit is not None]
        return min(limits) if limits else None


def check_prompts(
    reader: Reader, rows: Sequence[dict[str, Any]], of: str, max_completion_length: int | None
) -> list[str]:
    """Sentences on prompts that leave too little of the model's window, or do not reach the model whole.

    Args:
        rows: dataset rows, in the data contract; a `Dataset`, or a stream's first rows.
        of: what they are rows of, to follow "Row 3" in messages, such as " of `eval_dataset`"; "" for the training's.
        max_completion_length: tokens that are written after each prompt, at most; None: not known.

    Raises:
        ValueError: naming row and field, for images that the model does not read, a prompt that the chat template
            refuses, a prompt that alone fills the window, one that may grow beyond the positions of a model that has
            no others, and for a token without an embedding.
    """
    sizes, examples = _scan(rows)
    _check_images(reader, rows, of, examples)
    longest_frame = 0
    left_out: dict[str, str] = {}
    for row in examples:
        rendered = reader.render(rows[row], f"Row {row}{of}")
        for role in _left_out(rows[row]["prompt"], rendered):
            left_out.setdefault(
                role,
                f"The chat template leaves out the text of {role} messages, such as that of row {row}{of}, so the "
                "model does not see it. Give the model another template (luffy-trl prepare-model --template).",
            )
        longest_frame = max(longest_frame, len(rendered.encode(errors="surrogatepass")) - sizes[row])
    _check_embeddings(reader, rows, of)
    bounds = [size + longest_frame for size in sizes]
    return [*left_out.values(), *_check_window(reader, rows, of, bounds, max_completion_length)]


def _check_images(reader: Reader, rows: Sequence[dict[str, Any]], of: str, examples: list[int]) -> None:
    """Raises ValueError for images where the model reads none, or in columns beside prompts without a place for them.

    Args:
        examples: a row for each form of prompts.
    """
    columns = [name for name in IMAGE_COLUMNS if name in _column_names(rows)]
    places = [f"The column {name!r}{of} holds images" for name in columns]
    places += [f"Row {row}{of}: `prompt` has an image" for row in examples if images_in(rows[row]["prompt"])]
    if places and not isinstance(reader.processing_class, ProcessorMixin):
        raise ValueError(
            f"{places[0]}, and the model reads no images: it has a tokenizer and no processor. Take a vision-language "
            "model, or leave the images out."
        )
    if columns and isinstance(rows[0]["prompt"], str):
        raise ValueError(
            f"{places[0]}, and the prompts are plain texts, in which images have no place. Make `prompt` a list of "
            "messages, such as [{'role': 'user', 'content': ...}]."
        )


def _scan(rows: Sequence[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Each prompt's size in bytes, and one row for each form of prompts: a template refuses forms, not texts."""
    sizes: list[int] = []
    first: dict[Any, int] = {}
    tools = _column(rows, "tools") if "tools" in _column_names(rows) else repeat(None)
    for row, (prompt, of_row) in enumerate(zip(_column(rows, "prompt"), tools, strict=False)):
        sizes.append(_size(prompt))
        first.setdefault((_form(prompt), repr(of_row)), row)
    return sizes, list(first.values())


def _column(rows: Sequence[dict[str, Any]], name: str) -> Iterator[Any]:
    """A column's values, without the other columns: images are not decoded for it."""
    if isinstance(rows, list):
        return (row[name] for row in rows)
    batches = rows.select_columns([name]).iter(batch_size=TOKENIZED_AT_ONCE)  # type: ignore[attr-defined]
    return (value for batch in batches for value in batch[name])


def _form(prompt: Any) -> Any:
    """What a chat template looks at, texts aside: roles, kinds of content, other keys."""
    if not isinstance(prompt, list):
        return type(prompt).__name__
    return tuple(_message_form(message) for message in prompt)


def _message_form(message: Any) -> Any:
    if not isinstance(message, dict):
        return type(message).__name__
    content = message.get("content")
    kinds = [part.get("type") if isinstance(part, dict) else part for part in content or []]
    kind = str(kinds) if isinstance(content, list) else type(content).__name__
    others = sorted(str(key) for key, value in message.items() if value and key not in ("role", "content"))
    return str(message.get("role")), kind, *others


def _left_out(prompt: Any, rendered: str) -> list[str]:
    """Roles of messages whose text is not in the rendered prompt. Thoughts of former turns are left out on purpose."""
    if not isinstance(prompt, list):
        return []
    seen = "".join(rendered.split())
    asking = [message for message in prompt if message.get("role") in ("system", "user")]
    return [m["role"] for m in asking if "".join(_said(m.get("content")).split())[:BEGINNING] not in seen]


def _said(content: Any) -> str:
    """The text of a message, or the first of its parts that is one."""
    if isinstance(content, list):
        content = next((part.get("text") for part in content if part.get("type") == "text"), "")
    return content if isinstance(content, str) else ""


def _size(value: Any) -> int:
    """Of all texts in it, in bytes."""
    return sum(len(text.encode(errors="surrogatepass")) for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


# The window


def _check_window(
    reader: Reader, rows: Sequence[dict[str, Any]], of: str, bounds: list[int], max_completion_length: int | None
) -> list[str]:
    window, answer = reader.window(), max_completion_length or 0
    if window is None:
        return []
    row, length = _longest(reader, rows, bounds, window - answer)
    if length >= window:
        raise ValueError(
            f"Row {row}{of}: `prompt` has {length} tokens, and the model's window {window}, so nothing can be written "
            "after it. Leave the row out, shorten it, or extend the window (luffy-trl prepare-model "
            "--max_position_embeddings)."
        )
    if length + answer <= window:
        return []
    if reader.config.get_text_config().model_type in TABLE_OF_POSITIONS:
        raise ValueError(
            f"Row {row}{of}: `prompt` has {length} tokens, with max_completion_length={answer} more than the {window} "
            "positions of the model, which knows no others. Lower max_completion_length to "
            f"{window - length} or less, or leave the row out."
        )
    return [
        f"max_completion_length={answer} and the longest prompt (row {row}{of}, {length} tokens) are more than the "
        f"{window} tokens of the model's window. Lower it, or extend the window: luffy-trl prepare-model "
        "--max_position_embeddings."
    ]


def _longest(reader: Reader, rows: Sequence[dict[str, Any]], bounds: list[int], limit: int) -> tuple[int, int]:
    """Row and tokens of the longest prompt among those that may have more than `limit` tokens; (0, 0) if none may."""
    candidates = sorted((row for row, bound in enumerate(bounds) if bound > limit), key=lambda row: -bounds[row])
    longest = (0, 0)
    for start in range(0, min(len(candidates), COUNTED_AT_MOST), TOKENIZED_AT_ONCE):
        chosen = candidates[start : start + TOKENIZED_AT_ONCE]
        for row, ids in zip(chosen, _prompt_ids(reader, rows, chosen), strict=True):
            longest = max(longest, (row, len(ids)), key=lambda found: found[1])
        if bounds[chosen[-1]] <= longest[1]:
            break
    return longest


def _prompt_ids(reader: Reader, rows: Sequence[dict[str, Any]], chosen: Sequence[int]) -> list[list[int]]:
    prompts = [rows[row] for row in chosen]
    texts = [reader.render(row, f"Row {number}") for number, row in zip(chosen, prompts, strict=True)]
    plain = bool(prompts) and isinstance(prompts[0]["prompt"], str)
    return reader.token_ids(texts, add_special_tokens=plain)


# The embeddings


def _check_embeddings(reader: Reader, rows: Sequence[dict[str, Any]], of: str) -> None:
    """Raises ValueError where the data, or padding or EOS, have a token for which the model has no embedding."""
    tokenizer, size = reader.tokenizer, getattr(reader.config.get_text_config(), "vocab_size", None)
    if size is None or max(tokenizer.get_vocab().values(), default=0) < size:
        return
    for name in ("pad_token", "eos_token", "bos_token"):
        token, token_id = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= size:
            raise ValueError(
                f"The tokenizer's {name} {token!r} is token {token_id}, and the model has embeddings for {size} "
                f"tokens. Set {name} to one that it has, or {EXTEND}."
            )
    columns = ["prompt", *(column for column in SOURCE_COLUMNS[:2] if column in _column_names(rows))]
    for column in columns:
        for row, value in enumerate(_column(rows, column)):
            texts = [reader.render(rows[row], f"Row {row}{of}")] if column == "prompt" else list(_texts(value))
            for ids in reader.token_ids(texts) if texts else []:
                beyond = next((token_id for token_id in ids if token_id >= size), None)
                if beyond is not None:
                    raise ValueError(
                        f"Row {row}{of}: `{column}` has the token {tokenizer.convert_ids_to_tokens(beyond)!r}, number "
                        f"{beyond} of the tokenizer, and the model has embeddings for {size} tokens. Take it out, or "
                        f"{EXTEND}."
                    )


def _column_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(rows[0]) if isinstance(rows, list) else rows.column_names  # type: ignore[attr-defined]
