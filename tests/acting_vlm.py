"""A tiny Qwen2.5-VL that calls a tool about every other time, made in seconds; and rows for it, with images."""

import random
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from luffy_trl.tasks.letter_chain import response_template

from .tiny_vlm import COLORS, ImageProcessor, build_model, build_processor, one_image, several_images, square


CALL = "look(side="  # one token
END, OPENING = "<|im_end|>", "<|im_start|>assistant\n"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content or [] %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}("
    "{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }}{% endfor %}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_acting_processor() -> ImageProcessor:
    processor = build_processor()
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    processor.tokenizer.add_tokens([CALL])
    processor.tokenizer.response_template = response_template("side", OPENING, re.escape(END))
    return processor


def look(side: str) -> str:
    """Look at a side of the picture.

    Args:
        side: l or r.
    """
    return {"l": "red", "r": "blue"}.get(side, "?")


def called(side: str) -> dict[str, Any]:
    function = {"name": "look", "arguments": {"side": side}}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def trajectory(color: str) -> list[dict[str, Any]]:
    """Of two calls, one after another."""
    told = [{"role": "tool", "name": "look", "content": look(side)} for side in "lr"]
    return [called("l"), told[0], called("r"), told[1], {"role": "assistant", "content": f"#{color[0]}"}]


def acting_rows(rows: int = 4, images: str | None = "one") -> Dataset:
    """Prompts with one image each, one or two among their parts ("several"), or none; with trajectories."""
    made = (several_images if images == "several" else one_image)(rows)
    made = made if images else made.remove_columns("image")
    colors = [list(COLORS)[i % len(COLORS)] for i in range(rows)]
    plain = made.remove_columns("completion").to_list() if images is None else [dict(row) for row in made]
    completions = [trajectory(color) for color in colors]
    for messages, color in zip(completions, colors, strict=True):
        messages[-1]["content"] = f"({color})"  # which the model does not say
    return Dataset.from_list(
        [{**row, "completion": completion} for row, completion in zip(plain, completions, strict=True)],
        on_mixed_types="use_json",
    )


def save_acting_vlm(directory: Path) -> Path:
    processor = build_acting_processor()
    model, rng = build_model(processor), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        chosen = [list(COLORS)[rng.randrange(len(COLORS))] for _ in range(16)]
        with_images = step % 2 == 0
        image = [{"type": "image"}] if with_images else []
        texts, openings = [], []
        for i, color in enumerate(chosen):
            ask = {"role": "user", "content": [*image, {"type": "text", "text": "What color" + "?" * (1 + i % 4)}]}
            said = trajectory(color)[rng.choice((0, 2, -1, -1)) :]
            said = [{**message, "content": message.get("content", "")} for message in said]
            openings.append(processor.apply_chat_template([ask], add_generation_prompt=True))
            texts.append(processor.apply_chat_template([ask, *said]))
        pictures = [[square(color, i)] for i, color in enumerate(chosen)] if with_images else None
        batch = processor(images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt")
        ids = batch["input_ids"]
        begin = processor(images=pictures, text=openings, padding=True, padding_side="right", return_tensors="pt")
        positions = torch.arange(ids.size(1))
        is_prompt = positions < begin["attention_mask"].sum(1, keepdim=True)
        labels = ids.masked_fill(is_prompt | (batch["attention_mask"] == 0), -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
