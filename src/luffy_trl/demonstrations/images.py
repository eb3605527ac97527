"""Images of prompts: which column or message holds them, and what of them goes to the sampler."""

from collections.abc import Callable, Sequence
from typing import Any

from trl import prepare_multimodal_messages

from .placement import Placement, Row


IMAGE_COLUMNS = ("image", "images")

# Prompts to token ids, images and fields of a processor: TRL's `_tokenize_prompts`
Tokenize = Callable[[list[Any]], tuple[list[list[int]], list[list[Any] | None] | None, dict[str, Any]]]


def images_of(row: Row) -> list[Any] | None:
    """The images of a dataset row's columns, None where there are none; those in its messages are in their places."""
    return row.get("images") or ([row["image"]] if row.get("image") is not None else None)


def with_images(row: Row) -> list[dict[str, Any]]:
    """The messages of a prompt in parts, as TRL shows them to the model: its images in their places."""
    return prepare_multimodal_messages(row["prompt"], images_of(row))


def images_in(messages: Any) -> list[Any]:
    """The images among the parts of messages, in their order; there are none in a text."""
    contents = [message.get("content") for message in messages] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part.get("image") for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def requests(
    placement: Placement,
    asked: Sequence[int],
    prompt_ids: list[list[int]],
    fields: dict[str, Any],
    tokenize: Tokenize,
) -> tuple[list[list[int]], list[list[Any] | None] | None, dict[str, Any]]:
    """What the sampler is asked: token ids, images and a processor's fields of these rows alone.

    Image features stand one after another, some for each row, in a form of the model's own. So these rows' are made
    anew and not picked.

    Args:
        asked: rows, by their numbers; one may be there again.
        prompt_ids, fields: of all rows.

    Raises:
        ValueError: where some rows have images and others none.
    """
    beginnings = [d.token_ids if d else [] for d in (placement.demonstrations[i] for i in asked)]
    ids = [[*prompt_ids[i], *beginning] for i, beginning in zip(asked, beginnings, strict=True)]
    if not fields:
        return ids, None, {}
    rows = [placement.rows[i] for i in asked]
    _, images, own = tokenize([with_images(row) for row in rows])
    if images is not None and None in images:
        prompt = rows[images.index(None)]["prompt"]
        raise ValueError(
            f"The prompt {prompt!r:.200} has no image, and others of its generation have. TRL's GRPO takes prompts "
            "with images or without, and not both: give each row one, or none."
        )
    return ids, images, {name: _continued(values, beginnings) for name, values in own.items()}


def _continued(values: Any, beginnings: Sequence[Sequence[int]]) -> Any:
    """A field of one value a token, for prompts that go on with text; another field as it is."""
    if not (isinstance(values, list) and values and isinstance(values[0], list)):
        return values
    return [[*row, *[0] * len(beginning)] for row, beginning in zip(values, beginnings, strict=True)]
