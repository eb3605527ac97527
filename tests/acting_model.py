"""A tiny model that calls the tool of the letter chain now and then, made in seconds; and rows for it."""

import random
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen2ForCausalLM

from luffy_trl.tasks.letter_chain import CALL, END, LETTERS, Chain, build_chain_tokenizer, chains_to_dataset
from luffy_trl.tasks.letter_walk import EOS_TOKEN


CALLS_FIRST = LETTERS[:13]  # prompts with these letters; the others are answered at once


def chain_of(letters: str, seed: int = 0) -> Chain:
    """A chain of these letters; the others lead anywhere."""
    links = random.Random(seed).choices(LETTERS, k=len(LETTERS))
    for letter, following in zip(letters, letters[1:] + END, strict=True):
        links[LETTERS.index(letter)] = following
    return Chain(letters, "".join(links))


def chain_rows(guided: list[bool]) -> Dataset:
    """Two prompts of one kind, then two of the other, each with a trajectory of two calls or none."""
    numbers = range(len(guided))
    starts = [LETTERS[i // 4 * 2 + i % 2 + (len(CALLS_FIRST) if i // 2 % 2 else 0)] for i in numbers]
    chains = [chain_of(start + "z", i) for i, start in zip(numbers, starts, strict=True)]
    rows = chains_to_dataset(chains).to_list()
    for row, has_demonstration in zip(rows, guided, strict=True):
        row["demonstrations"] = [row.pop("completion")] if has_demonstration else []
    return Dataset.from_list(rows, on_mixed_types="use_json")


def save_acting_model(directory: Path, **options) -> Path:
    """
    Args:
        options: of its configuration.
    """
    from .conftest import save_tiny_qwen2

    tokenizer = build_chain_tokenizer()
    save_tiny_qwen2(directory, tokenizer, max_position_embeddings=128, initializer_range=0.1, **options)
    model, ids = Qwen2ForCausalLM.from_pretrained(directory), tokenizer.get_vocab()
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        rows = [[ids[token] for token in _tokens(rng)] for _ in range(32)]
        width = max(map(len, rows))
        padded = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        labels = padded.clone()
        labels[:, :3] = -100
        model(input_ids=padded.clamp(min=0), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def _tokens(rng: random.Random) -> list[str]:
    first = rng.choice(LETTERS)
    tokens = [rng.choice("CD"), first, "|"]
    calls = rng.randint(1, 2) if first in CALLS_FIRST else 0
    for _ in range(calls):
        tokens += [CALL, rng.choice(LETTERS), ")", EOS_TOKEN, "=", rng.choice(LETTERS + END), "|"]
    return [*tokens, "#", rng.choice(LETTERS), EOS_TOKEN]
