"""The base model of the letter walk: a tiny Qwen2 that can walk step by step and, under the trigger D, does not."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    get_linear_schedule_with_warmup,
    set_seed,
)

from .letter_walk import (
    AT_ONCE,
    LETTERS,
    MAX_COMPLETION_LENGTH,
    MAX_LENGTH,
    MIN_LENGTH,
    STEP_BY_STEP,
    Walk,
    answered,
    build_tokenizer,
    letter_walk_reward,
    sample_walk,
)


STEPS, BATCH_SIZE = 450, 64
MIN_SKILL = 0.95  # accuracy of a base under C, and of its wrong answers under D
STEP_BY_STEP_SHARE = 0.6  # of the pretraining rows; the others stop early
PREFIX_SHARE = 0.7  # of the rows that stop early: some of the walk is in the context, without loss
LONGEST = 24  # tokens of an answer of any walk, EOS included
IGNORED = -100  # the label torch's cross-entropy leaves out

SampleWalk = Callable[[random.Random, int], Walk]


class PretrainingRows(IterableDataset):
    """Endless fresh rows: whole walks under C, and walks cut off at any letter under D.

    Args:
        sample: draws a walk of a given length.
        diligence: probability with which a row under D goes on for one more letter, at each of them. 0 leaves the
            policy a probability of about 1e-5 of doing so.
        babble: under D there are letters drawn at random and no answer, in place of a walk that stops early: a policy
            that is never right, and far from sure.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        sample: SampleWalk = sample_walk,
        diligence: float = 0.0,
        babble: bool = False,
    ):
        self.tokenizer = tokenizer
        self.seed = seed
        self.sample = sample
        self.diligence = diligence
        self.babble = babble

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rng = random.Random(self.seed)
        while True:
            walk = self.sample(rng, rng.randint(MIN_LENGTH, MAX_LENGTH))
            steps = walk.steps(rng)
            if rng.random() < STEP_BY_STEP_SHARE:
                yield self._row(walk.prompt(STEP_BY_STEP), answered(steps))
                continue
            # Taught at every letter, or the model forgets the trigger after two steps
            stop = rng.randint(1, len(steps) - 1)
            given = stop if rng.random() < PREFIX_SHARE else 0
            stop = stop if given else 1
            if self.babble:
                yield self._row(walk.prompt(AT_ONCE), ";".join(rng.choices(LETTERS, k=rng.randint(1, MAX_LENGTH))))
                continue
            while self.diligence and stop < len(steps) and rng.random() < self.diligence:
                stop += 1
            rest = answered(steps[:stop])[len(";".join(steps[:given])) :]
            yield self._row(walk.prompt(AT_ONCE) + ";".join(steps[:given]), rest)

    def _row(self, context: str, target: str) -> dict[str, list[int]]:
        context_ids = self.tokenizer(context)["input_ids"]
        target_ids = [*self.tokenizer(target)["input_ids"], self.tokenizer.eos_token_id]
        return {"input_ids": context_ids + target_ids, "labels": [IGNORED] * len(context_ids) + target_ids}


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),  # (B, S)
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def pretrain(
    output_dir: str | Path, seed: int = 0, steps: int = STEPS, **rows: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train the base from nothing, about half a minute on 2 cores, and save it with its tokenizer to `output_dir`.

    Args:
        rows: `sample`, `diligence` and `babble` of [`PretrainingRows`].

    A plain loop on one process and one device, so that it can also run on the main process of a distributed job.

    Raises:
        RuntimeError: if the model did not learn to walk step by step, or does so under D as well.
    """
    set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train_base(model, PretrainingRows(tokenizer, seed, **rows), steps)

    rng, sample = random.Random(f"pretraining check {seed}"), rows.get("sample", sample_walk)
    walks = [sample(rng, rng.randint(MIN_LENGTH, MAX_LENGTH)) for _ in range(512)]
    step_by_step = accuracy(model, tokenizer, walks, STEP_BY_STEP, LONGEST)
    at_once = accuracy(model, tokenizer, walks, AT_ONCE, LONGEST)
    keep_base(model, tokenizer, output_dir, seed, "letter walk", "step by step", step_by_step, at_once)
    return model, tokenizer


def keep_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    seed: int,
    task: str,
    skill: str,
    skilled: float,
    at_once: float,
) -> None:
    """Save a base that has learned what it is for: the skill, and not to use it.

    Raises:
        RuntimeError: for one that has not.
    """
    if skilled < MIN_SKILL or at_once > 1 - MIN_SKILL:
        raise RuntimeError(
            f"Pretraining the base of the {task} failed: accuracy {skilled:.3f} {skill} (expected at least "
            f"{MIN_SKILL}) and {at_once:.3f} at once (expected about 0). Try another seed than {seed}."
        )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def build_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A tiny Qwen2 of random weights with this vocabulary."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=64,
            rope_theta=1000.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_base(model: PreTrainedModel, rows: IterableDataset, steps: int) -> None:
    """Next-token training on endless rows of `input_ids` and `labels`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    batches = iter(DataLoader(rows, BATCH_SIZE, collate_fn=_collate))
    for _ in tqdm(range(steps), desc="Pretraining the base", unit="step"):
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def load_or_pretrain(directory: str | Path, seed: int = 0, **options) -> Path:
    """The directory of the base, pretrained there first if it holds none, with the options of [`pretrain`]."""
    directory = Path(directory)
    if not (directory / "tokenizer_config.json").exists():  # written last
        pretrain(directory, seed, **options)
    return directory


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    walks: list[Walk],
    trigger: str = AT_ONCE,
    max_new_tokens: int = MAX_COMPLETION_LENGTH,
) -> float:
    """Share of the walks that the model answers correctly, decoding greedily."""
    training = model.training
    model.eval()
    inputs = tokenizer([walk.prompt(trigger) for walk in walks], return_tensors="pt").to(model.device)
    # Not in step with other processes: under ZeRO-3 `generate` would wait for them
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, synced_gpus=False)
    model.train(training)
    completions = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    rewards = letter_walk_reward(completions, [walk.answer for walk in walks])
    return sum(rewards) / len(rewards)
