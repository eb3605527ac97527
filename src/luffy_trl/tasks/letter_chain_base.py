"""The base model of the letter chain: a tiny Qwen2 that can follow a chain and, under the trigger D, does not."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .letter_chain import (
    CALL,
    END,
    MAX_TRAJECTORY_LENGTH,
    OPENED,
    Chain,
    Links,
    build_chain_tokenizer,
    sample_chain,
)
from .letter_walk import AT_ONCE, EOS_TOKEN, STEP_BY_STEP
from .letter_walk_base import IGNORED, build_model, keep_base, train_base


CHAIN_STEPS = 450
FOLLOWING_SHARE = 0.6  # of the pretraining rows; the others stop early
MAX_TURNS = 5


class ChainRows(IterableDataset):
    """Endless fresh rows: whole trajectories under C, and under D the answer at once, at any letter but the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.ids, self.seed = tokenizer.get_vocab(), seed  # a token a piece: no tokenizer is needed, which takes long

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = random.Random(self.seed)
        while True:
            chain = sample_chain(rng)
            pieces = turns(chain)
            if rng.random() < FOLLOWING_SHARE:
                yield self._row([STEP_BY_STEP, chain.letters[0], OPENED], pieces)
                continue
            done = rng.randrange(len(chain.letters) - 1)  # turns that are in the context
            before = [token for tokens, _ in pieces[: 2 * done] for token in tokens]
            stopped = ["#", chain.letters[done], EOS_TOKEN]
            yield self._row([AT_ONCE, chain.letters[0], OPENED, *before], [(stopped, True)])

    def _row(self, context: list[str], pieces: list[tuple[list[str], bool]]) -> dict[str, list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for piece, is_own in [(context, False), *pieces]:
            tokens = [self.ids[token] for token in piece]
            ids += tokens
            labels += tokens if is_own else [IGNORED] * len(tokens)
        return {"input_ids": ids, "labels": labels}


def turns(chain: Chain) -> list[tuple[list[str], bool]]:
    """The tokens of the trajectory behind the prompt, and whether a piece is the policy's."""
    pieces = []
    for letter, answer in zip(chain.letters, chain.letters[1:] + END, strict=True):
        pieces += [([CALL, letter, ")", EOS_TOKEN], True), (["=", answer, OPENED], False)]
    return [*pieces, (["#", chain.answer, EOS_TOKEN], True)]


def pretrain_chain(
    output_dir: str | Path, seed: int = 0, steps: int = CHAIN_STEPS
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the base from nothing, about half a minute on 2 cores, and save it with its tokenizer to `output_dir`.

    Raises:
        RuntimeError: if the model did not learn to follow chains, or does so under D as well.
    """
    set_seed(seed)
    tokenizer = build_chain_tokenizer()
    model = build_model(tokenizer)
    train_base(model, ChainRows(tokenizer, seed), steps)
    rng = random.Random(f"pretraining check {seed}")
    problems = [sample_chain(rng) for _ in range(256)]
    following = chain_accuracy(model, tokenizer, problems, STEP_BY_STEP)
    at_once = chain_accuracy(model, tokenizer, problems)
    keep_base(model, tokenizer, output_dir, seed, "letter chain", "when it follows", following, at_once)
    return model, tokenizer


@torch.no_grad()
def chain_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Chain], trigger: str = AT_ONCE
) -> float:
    """Share of the chains at whose end the model arrives, asking greedily."""
    training = model.training
    model.eval()
    texts = [f"{trigger}{chain.letters[0]}{OPENED}" for chain in problems]
    right = [False] * len(problems)
    under_way = list(range(len(problems)))
    for _ in range(MAX_TURNS):
        inputs = tokenizer([texts[i] for i in under_way], return_tensors="pt", padding=True).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=MAX_TRAJECTORY_LENGTH // 4, do_sample=False, synced_gpus=False)
        said = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        acting = []
        for i, text in zip(under_way, said, strict=True):
            right[i] = text == f"#{problems[i].answer}"
            if text.startswith(CALL) and text.endswith(")"):
                links = Links()
                links.reset(problems[i].links)
                answer = links.follow(text[len(CALL) : -1])
                texts[i] += f"{text}{EOS_TOKEN}={answer}{OPENED}"
                acting.append(i)
        under_way = acting
        if not under_way:
            break
    model.train(training)
    return sum(right) / len(problems)
