"""Worked solutions of reasoning-gym's tasks: its own where it has them, ours for tasks that small models learn from.

Each writes what a person would write down, a step a line, and ends with the answer in a box.
"""

from collections.abc import Callable
from typing import Any


Entry = dict[str, Any]


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def chain_sum(entry: Entry) -> list[str]:
    """Each partial sum on a line."""
    first, *rest = entry["metadata"]["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{before} {sign} {term} = {total}")
    return lines


def word_sequence_reversal(entry: Entry) -> list[str]:
    """The words from the last to the first, numbered."""
    return [f"{i}. {word}" for i, word in enumerate(reversed(entry["metadata"]["words"]), start=1)]


def spell_backward(entry: Entry) -> list[str]:
    """What has been read of the word, letter by letter from its end."""
    word = entry["metadata"]["word"]
    return [" ".join(reversed(word))]


def gcd(entry: Entry) -> list[str]:
    """Euclid's divisions."""
    result, *others = entry["metadata"]["numbers"]
    lines = []
    for number in others:
        a, b = result, number
        while b:
            lines.append(f"{a} = {a // b} * {b} + {a % b}")
            a, b = b, a % b
        result = a
    return lines


def letter_counting(entry: Entry) -> list[str]:
    """The words that hold the letter, and how many were found so far."""
    letter, found, lines = entry["metadata"]["target_letter"].lower(), 0, []
    for word in entry["metadata"]["span"]:
        count = word.lower().count(letter)
        if count:
            found += count
            lines.append(f"{word}: {count}, together {found}")
    return lines


def gsm_symbolic(entry: Entry) -> list[str]:
    """reasoning-gym's own."""
    return [entry["metadata"]["answer_cot"]]


ORACLES: dict[str, Callable[[Entry], list[str]]] = {
    oracle.__name__: oracle
    for oracle in (chain_sum, gcd, gsm_symbolic, letter_counting, spell_backward, word_sequence_reversal)
}


def worked_solution(name: str, entry: Entry) -> str | None:
    """None: nobody wrote one for this task."""
    oracle = ORACLES.get(name)
    return None if oracle is None else "\n".join([*oracle(entry), boxed(entry["answer"])])
