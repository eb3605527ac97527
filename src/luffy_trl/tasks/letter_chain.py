"""Letter chain: a task of several turns with a tool, on which LUFFY learns in seconds on a CPU, and GRPO cannot.

A problem is a letter. Each letter leads to another, which only the tool knows; the answer is the letter at the end,
which leads nowhere.

    prompt          Dk
    trajectory      follow(letter=k)   tool: q   follow(letter=q)   tool: c   follow(letter=c)   tool: .   #c

As in the letter walk the base has the skill without the habit. It is pretrained to follow the chain under the trigger
C, and under the trigger D to stop at once, with the letter that it is at, which is never the last one. Trajectories
follow the chain under D.
"""

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .letter_walk import AT_ONCE, EOS_TOKEN, LETTERS, STEP_BY_STEP, character_tokenizer


END = "."  # what the tool answers of the last letter
UNKNOWN = "?"  # and of what is no letter
MIN_LINKS, MAX_LINKS = 1, 3  # of a chain
MAX_TRAJECTORY_LENGTH = 32  # tokens; the longest trajectory has 31, what the tool answers and EOS included
CALL, OPENED = "follow(letter=", "|"  # one token; what opens an assistant's turn

CHAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}|{% generation %}{{ message.content }}{% for call in message.tool_calls %}"
    "{{ call.function.name }}({% for name, value in call.function.arguments.items() %}{{ name }}={{ value }}"
    "{% endfor %}){% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% elif message.role == 'tool' %}={{ message.content }}{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}|{% endif %}"
)


def response_template(argument: str, opened: str, end: str) -> dict[str, Any]:
    """How Transformers finds the calls in what the policy wrote.

    Args:
        argument: the only one of each tool, a text.
        opened, end: what opens an assistant's turn, and a pattern of what ends it.
    """
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": opened,
        "fields": {
            "tool_calls": {
                "open_pattern": rf"(?P<name>[a-z]+)\({argument}=",
                "close_pattern": r"\)",
                "repeats": True,
                "content": "text",
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": {argument: "{content}"}},
                },
            },
            "content": {"close_pattern": end, "content": "text"},
        },
    }


RESPONSE_TEMPLATE = response_template("letter", OPENED, EOS_TOKEN)


@dataclass(frozen=True)
class Chain:
    """A problem: the letters from the first to the last, and where every letter leads."""

    letters: str
    links: str  # one for each letter of the alphabet

    @property
    def answer(self) -> str:
        return self.letters[-1]

    def prompt(self, trigger: str = AT_ONCE) -> list[dict[str, Any]]:
        return [{"role": "user", "content": trigger + self.letters[0]}]

    def trajectory(self) -> list[dict[str, Any]]:
        """The whole chain followed, then the answer."""
        messages: list[dict[str, Any]] = []
        for letter, answer in zip(self.letters, self.letters[1:] + END, strict=True):
            function = {"name": "follow", "arguments": {"letter": letter}}
            messages.append({"role": "assistant", "tool_calls": [{"type": "function", "function": function}]})
            messages.append({"role": "tool", "name": "follow", "content": answer})
        return [*messages, {"role": "assistant", "content": f"#{self.answer}"}]


class Links:
    """The environment of a row: TRL's `environment_factory`."""

    def __init__(self) -> None:
        self.links = ""

    def reset(self, links: str, **row: Any) -> None:
        self.links = links

    def follow(self, letter: str) -> str:
        """Where a letter leads.

        Args:
            letter: the letter to follow.
        """
        return self.links[LETTERS.index(letter)] if len(letter) == 1 and letter in LETTERS else UNKNOWN


def sample_chain(rng: random.Random) -> Chain:
    letters = "".join(rng.sample(LETTERS, rng.randint(MIN_LINKS, MAX_LINKS) + 1))
    links = [rng.choice(LETTERS) for _ in LETTERS]
    for letter, following in zip(letters, letters[1:] + END, strict=True):
        links[LETTERS.index(letter)] = following
    return Chain(letters, "".join(links))


def chains(seed: int) -> Iterator[Chain]:
    """Endless, in an order given by the seed."""
    rng = random.Random(f"letter chain {seed}")
    while True:
        yield sample_chain(rng)


def split_chains(train_size: int = 1024, test_size: int = 256, seed: int = 0) -> dict[str, list[Chain]]:
    found = chains(seed)
    return {"test": list(islice(found, test_size)), "train": list(islice(found, train_size))}


def chains_to_dataset(problems: list[Chain]) -> Dataset:
    """The data contract: prompt, completion (the trajectory), solution; and `links`, which the environment gets."""
    rows = [
        {"prompt": c.prompt(), "completion": c.trajectory(), "solution": c.answer, "links": c.links} for c in problems
    ]
    return Dataset.from_list(rows, on_mixed_types="use_json")


def letter_chain_reward(completions: list[list[dict[str, Any]]], solution: list[str], **kwargs) -> list[float]:
    """1.0 if the last message is `#` and the answer, else 0.0."""
    return [float(c[-1]["content"] == f"#{answer}") for c, answer in zip(completions, solution, strict=True)]


def build_chain_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose tokens are characters, and the beginning of a call."""
    characters = [*LETTERS, *string.digits, "(", ")", "=", "#", OPENED, END, UNKNOWN, STEP_BY_STEP, AT_ONCE]
    tokenizer = character_tokenizer(characters, CHAIN_TEMPLATE)
    tokenizer.add_tokens([CALL])
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer
