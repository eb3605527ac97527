"""Images of prompts: which column or message holds them, and what of them goes to the sampler."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from trl import prepare_multimodal_messages

from .placement import Generation, Row


IMAGE_COLUMNS = ("image", "images")

# What TRL gives a model of images, but for what has a value a token
IMAGE_FEATURES = (
    "pixel_values", "image_grid_thw", "image_position_ids", "image_sizes", "pixel_attention_mask", "spatial_shapes",
)  # fmt: skip

Images = list[list[Any] | None] | None  # one entry a row; None where no row has any
# Of prompts the token ids, images and fields of a processor: what TRL's `_tokenize_prompts` gives
Tokenized = tuple[list[list[int]], Images, dict[str, Any]]


def images_of(row: Row) -> list[Any] | None:
    """The images of a dataset row's columns, None where there are none; those in its messages are in their places."""
    return row.get("images") or ([row["image"]] if row.get("image") is not None else None)


def with_images(row: Row) -> list[dict[str, Any]]:
    """The messages of a prompt in parts, as TRL shows them to the model: its images in their places."""
    return prepare_multimodal_messages(row["prompt"], images_of(row))


def requests(
    generation: Generation,
    asked: Sequence[int],
    prompt_ids: list[list[int]],
    images: Images,
    fields: dict[str, Any],
    tokenize: Callable[[Sequence[int]], Tokenized],
) -> Tokenized:
    """What the sampler is asked: token ids, images and a processor's fields of these rows alone.

    Image features stand one after another, some for each row, in a form of the model's own. So these rows' are made
    anew and not picked.

    Args:
        asked: rows, by their numbers; one may be there again.
        prompt_ids, images, fields: of all rows.
        tokenize: the prompts of rows, anew.

    Raises:
        ValueError: where some rows have images and others none.
    """
    placed = generation.placement.demonstrations
    beginnings = [d.token_ids if d else [] for d in (placed[i] for i in asked)]
    ids = [[*prompt_ids[i], *beginning] for i, beginning in zip(asked, beginnings, strict=True)]
    seen: Images = None
    if images is None:  # what fields there are have a value a token
        own = {name: [values[i] for i in asked] for name, values in fields.items()}
    elif None in images:
        raise ValueError(
            f"The prompt {generation.prompts[images.index(None)]!r:.200} has no image, and others of its generation "
            "have. TRL's GRPO takes prompts with images or without, and not both: give each row one, or none."
        )
    else:
        _, seen, own = tokenize(asked)
    return ids, seen, {name: _continued(values, beginnings) for name, values in own.items()}


def as_tensors(fields: dict[str, Any]) -> dict[str, Any]:
    """A processor's fields with image features as tensors, as TRL's tool loop takes them; Pillow's give arrays."""
    return {
        name: torch.as_tensor(np.array(values)) if len(values) and isinstance(values[0], np.ndarray) else values
        for name, values in fields.items()
    }


def without_empty_images(
    is_sharded: bool, module: torch.nn.Module, args: tuple, inputs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """A forward pass's pre-hook. Where tools answer with images, rows without any have features of no image.

    Args:
        is_sharded: each process has a part of the weights, and all must run the same modules.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.numel() > 0:
        return args, inputs
    if is_sharded:
        raise ValueError(
            "No row of a micro-batch has an image, and others of its generation have, with which tools have answered. "
            "Under ZeRO-3 and FSDP all processes must run the same modules: take ZeRO-2, or give each prompt an image."
        )
    return args, {name: value for name, value in inputs.items() if name not in IMAGE_FEATURES}


def _continued(values: Any, beginnings: Sequence[Sequence[int]]) -> Any:
    """A field of one value a token, for prompts that go on with text; another field as it is."""
    if not (isinstance(values, list) and values and isinstance(values[0], list)):
        return values
    return [[*row, *[0] * len(beginning)] for row, beginning in zip(values, beginnings, strict=True)]
