"""Whether prompts, demonstrations, generation and model agree about thoughts, lengths, and where an answer ends.

A policy that starts inside a thought which no demonstration closes, or a turn that ends with a token at which
generation does not stop, is no error for a trainer. It is a run without reward.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .encoding import demonstration_text
from .prompts import render
from .rendering import end_of_turn, without_repeated_opening
from .trajectories import is_trajectory


# Rows whose prompts and demonstrations are compared before training
LOOKED_AT = 100

OPENING, CLOSING = "<think>", "</think>"

# What is said of the demonstrations that `_thought_state` finds in a state
DISAGREEMENTS = {
    "never closed": (
        f"have no {CLOSING!r}, although their prompt ends with {OPENING!r}: rollouts start inside a thought that they "
        "are not shown to leave, and a reward that needs the end of the thought stays 0. Use a chat template without "
        f"{OPENING!r} at the end (luffy-trl prepare-model), or demonstrations with a thought."
    ),
    "never opened": (
        f"close a thought with {CLOSING!r} that neither they nor their prompt open with {OPENING!r}. Let the prompt "
        "end with it (luffy-trl prepare-model --think), or write it at their beginning."
    ),
    "opened twice": (
        f"open a thought with {OPENING!r} although their prompt already ends with it, and not in a form that can be "
        "joined. Take it out of them, or out of the chat template."
    ),
    "opened after": (
        f"open a thought with {OPENING!r} although their prompt has already closed one with {CLOSING!r}, as templates "
        "do that are told not to think: rollouts will not begin as they do. Let the template think "
        "(chat_template_kwargs, such as enable_thinking: true), or take the thought out of them."
    ),
}


def disagreements(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    rows: Iterable[dict[str, Any]],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """What a person should know before training on these rows: one message for each kind of disagreement.

    Args:
        processing_class: the tokenizer, or processor, that renders the prompts.
        rows: dataset rows in the data contract, before encoding; some hundred are enough.
        chat_template_kwargs: what prompts are rendered with, beside their messages.
    """
    kwargs = chat_template_kwargs or {}
    found: Counter[str] = Counter()
    unread: list[str] = []
    for i, row in enumerate(rows):
        try:
            prompt = render(processing_class, row, kwargs, f"Row {i}")
            opened, closed = _thought_of(prompt, _tail(processing_class, row, kwargs, prompt))
            texts = [
                demonstration_text(value, f"Row {i}: a demonstration")
                for value in _completions(row)
                if not is_trajectory(value)
            ]
        except ValueError as error:  # who must read the row refuses it; here it is only not compared
            unread.append(str(error))
            continue
        found.update(_thought_state(opened, closed, without_repeated_opening(prompt, text)) for text in texts)

    demonstrations = sum(found.values())
    messages = [
        f"{count} of {demonstrations} demonstrations looked at {DISAGREEMENTS[kind]}"
        for kind, count in found.items()
        if kind in DISAGREEMENTS
    ]
    ended, without = found["agrees"] + found["never opened"], found["no thought"]
    if ended and without:
        messages.append(
            f"{without} of {demonstrations} demonstrations looked at have no {CLOSING!r}, while the others do. A "
            "reward that needs one gives them 0: leave them out, or write all of them in one form."
        )
    if unread:
        messages.append(f"{len(unread)} rows looked at cannot be compared with the chat template: {unread[0]}")
    return messages


def turn_endings(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    eos_token_ids: list[int],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """The same, of the token with which the chat template ends an answer and those at which generation stops."""
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    end = end_of_turn(processing_class, chat_template_kwargs or {})
    if end is None or end in eos_token_ids:
        return []
    stops = ", ".join(repr(tokenizer.decode([token])) for token in eos_token_ids)
    return [
        f"The chat template ends an assistant's turn with {tokenizer.decode([end])!r}, but generation stops at "
        f"{stops}. Demonstrations and rollouts will end with the latter, and who chats with the model later may wait "
        "for the former: set the tokenizer's eos_token and the generation config's eos_token_id to the template's "
        "token (luffy-trl prepare-model --eos_token)."
    ]


def _completions(row: dict[str, Any]) -> list[Any]:
    values = row.get("demonstrations") or [row.get("completion")]
    return [value for value in values if value is not None]


def _tail(processing_class, row: dict[str, Any], kwargs: dict[str, Any], prompt: str) -> str:
    """What the chat template writes behind the last message, "" where that cannot be told."""
    if isinstance(row["prompt"], str):
        return ""
    messages = render(processing_class, row, kwargs, "", add_generation_prompt=False)
    return prompt.removeprefix(messages) if prompt.startswith(messages) else ""


def _thought_of(prompt: str, tail: str) -> tuple[bool, bool]:
    """Whether the prompt leaves a thought open, and whether it has closed one for the answer."""
    opening, closing = tail.rfind(OPENING), tail.rfind(CLOSING)
    end = prompt.rstrip()
    return opening > closing or end.endswith(OPENING), closing > opening or end.endswith(CLOSING)


def _thought_state(opened: bool, closed: bool, text: str) -> str:
    opens, closes = text.lstrip().startswith(OPENING), CLOSING in text
    if opened and opens:
        return "opened twice"
    if closed and opens:
        return "opened after"
    if opened and not closes:
        return "never closed"
    if closes and not opened and not opens:
        return "never opened"
    return "agrees" if closes else "no thought"
