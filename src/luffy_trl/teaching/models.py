"""Models in this process: the local teachers, and the student. What reads prompts comes before the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..demonstrations.prompts import Reader
from .answers import TeacherAnswer
from .problems import Prompt
from .teachers import Question


def load_reader(name: str, flag: str) -> Reader:
    """A model's configuration and tokenizer.

    Args:
        flag: that names the model.

    Raises:
        ValueError: if they cannot be loaded, or there is no token with which an answer ends.
    """
    try:
        reader = Reader(AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if reader.tokenizer.eos_token_id is None:
        raise ValueError(f"{flag} {name} has no EOS token, so an answer cannot end.")
    return reader


def load_model(name: str, dtype: str, device: str | None, flag: str) -> Any:
    """
    Raises:
        ValueError: if it cannot be loaded.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{flag} {name} cannot be loaded: {' '.join(str(error).split())}") from error
    # What a model's authors sample with (top_k, penalties) is not what was asked for
    model.generation_config = GenerationConfig()
    return model


def prompt_ids_of(reader: Reader, prompt: Prompt) -> list[int]:
    """As the trainer reads it: a conversation through the chat template, a text as it stands.

    Raises:
        ValueError: if the chat template refuses it.
    """
    rendered = reader.render({"prompt": prompt}, "A problem")
    [ids] = reader.token_ids([rendered], add_special_tokens=isinstance(prompt, str))
    return ids


def fitting(
    reader: Reader, questions: Sequence[Question], prompts: Sequence[list[int]]
) -> tuple[list[tuple[Question, list[int]]], list[TeacherAnswer]]:
    """The questions that leave room in the model's window, with their tokens, and what is kept of the others."""
    window = reader.window()
    asked, refused = [], []
    for question, ids in zip(questions, prompts, strict=True):
        if window is not None and len(ids) >= window:
            refused.append(question.refused(f"its {len(ids)} tokens leave nothing of the model's window of {window}"))
        else:
            asked.append((question, ids))
    return asked, refused
