"""Letter walk: a task on which LUFFY learns in seconds on a CPU, and on-policy GRPO cannot.

A problem is a walk on the cyclic alphabet: a start letter and up to six shifts. The answer is the letter reached.

    prompt          Dk+4-5+1+9....:     trigger, start letter, shifts, padding
    demonstration   k;o;j;k;t#t         every letter of the walk, then the answer

It gives a tiny model what a real base model has, the skill without the habit. The base is pretrained to walk step by
step under the trigger C, and to stop and answer at once, wrongly, under the trigger D. Demonstrations work step by
step under D. Sampling from the policy under D never earns a reward, so on-policy RL has nothing to learn from; one
demonstration a group is enough to bring the habit back. Stopping early is never right: a walk ends on a letter it has
not visited before.
"""

import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer


LETTERS = string.ascii_lowercase
STEP_BY_STEP, AT_ONCE = "C", "D"  # triggers
# Spread so that no constant offset from the start letter is right for more than about 5% of walks of 5 letters; with
# the shifts 1 to 5, "start + 12" would be for 13%.
SHIFTS = (1, 4, -5, -6, 9)
MIN_LENGTH, MAX_LENGTH = 2, 7  # letters of a walk
MAX_COMPLETION_LENGTH = 20  # tokens; the longest demonstration has 16, EOS included

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
# A prompt is a user's message, an answer an assistant's: rendered, a conversation is the plain text of both
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Walk:
    """A problem: a start letter and shifts, with its prompt, its demonstration and its answer."""

    start: str
    shifts: tuple[int, ...]

    @property
    def letters(self) -> str:
        """Every letter of the walk, the start included."""
        position = LETTERS.index(self.start)
        letters = self.start
        for shift in self.shifts:
            position = (position + shift) % len(LETTERS)
            letters += LETTERS[position]
        return letters

    @property
    def answer(self) -> str:
        """The letter reached."""
        return self.letters[-1]

    def steps(self, rng: random.Random | None = None) -> list[str]:
        """The working; the last character of each step is the letter reached. Walks with a choice take it from `rng`,
        and without one in one way only, the demonstrations'."""
        return list(self.letters)

    def sound_answers(self) -> set[str]:
        """Every answer whose whole working is right."""
        return {answered(self.steps())}

    @property
    def demonstration(self) -> str:
        """Every letter of the walk, then the answer."""
        return answered(self.steps())

    def prompt(self, trigger: str = AT_ONCE) -> str:
        """The problem under a trigger, `STEP_BY_STEP` or `AT_ONCE`; all prompts have one length."""
        shifts = "".join(f"{shift:+d}" for shift in self.shifts)
        return f"{trigger}{self.start}{shifts.ljust(2 * (MAX_LENGTH - 1), '.')}:"


def answered(steps: list[str]) -> str:
    """The whole answer of somebody who works in these steps, and answers with the letter reached."""
    return f"{';'.join(steps)}#{steps[-1][-1]}"


def sample_walk(rng: random.Random, length: int) -> Walk:
    """A walk of `length` letters that ends on a letter it has not visited before."""
    if not MIN_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"length={length}: a walk has {MIN_LENGTH} to {MAX_LENGTH} letters.")
    while True:
        walk = Walk(rng.choice(LETTERS), tuple(rng.choices(SHIFTS, k=length - 1)))
        if walk.answer not in walk.letters[:-1]:
            return walk


def distinct_walks(
    seed: int, length: int, sample: Callable[[random.Random, int], Walk] = sample_walk
) -> Iterator[Walk]:
    """Walks without repeats, in an order given by the seed, until there are no more than chance would find."""
    rng = random.Random(f"letter walk {seed} {length}")
    seen: set[Walk] = set()
    misses = 0
    while misses < 1000:
        walk = sample(rng, length)
        if walk in seen:
            misses += 1
            continue
        misses = 0
        seen.add(walk)
        yield walk


def split_walks(train_size: int = 2048, test_size: int = 512, length: int = 5, seed: int = 0) -> dict[str, list[Walk]]:
    """Train and test split, with no walk in common."""
    walks = distinct_walks(seed, length)
    return {"test": list(islice(walks, test_size)), "train": list(islice(walks, train_size))}


def to_dataset(walks: list[Walk]) -> Dataset:
    """The data contract: prompt, completion (the demonstration) and solution."""
    return Dataset.from_dict(
        {
            "prompt": [walk.prompt() for walk in walks],
            "completion": [walk.demonstration for walk in walks],
            "solution": [walk.answer for walk in walks],
        }
    )


def letter_walk_reward(completions: list, solution: list[str], **kwargs) -> list[float]:
    """1.0 if the text after the last `#` is the answer, else 0.0. Takes plain and conversational completions."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [
        float("#" in text and text.rsplit("#", 1)[1] == answer) for text, answer in zip(texts, solution, strict=True)
    ]


def build_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are characters."""
    return character_tokenizer([*LETTERS, *string.digits, *"+-.:;#", STEP_BY_STEP, AT_ONCE], CHAT_TEMPLATE)


def character_tokenizer(characters: list[str], chat_template: str) -> PreTrainedTokenizerBase:
    """A tokenizer of these characters, with a padding and an EOS token before them.

    It is a Qwen2 tokenizer without merges, since `AutoTokenizer` makes one of any tokenizer beside a Qwen2 model.
    """
    vocabulary = {token: i for i, token in enumerate([PAD_TOKEN, EOS_TOKEN, *characters])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        chat_template=chat_template,
    )
