"""Whether prompts, demonstrations, generation and model agree about thoughts, lengths, and where an answer ends.

A policy that starts inside a thought which no demonstration closes, or a turn that ends with a token at which
generation does not stop, is no error for a trainer. It is a run without reward.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .encoding import demonstration_text, rendered_prompt, without_repeated_opening


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
}


def disagreements(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    eos_token_ids: list[int],
    rows: Iterable[dict[str, Any]],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """What a person should know before training on these rows: one message for each kind of disagreement.

    Args:
        processing_class: the tokenizer, or processor, that renders the prompts.
        eos_token_ids: the tokens at which a rollout ends.
        rows: dataset rows in the data contract, before encoding; some hundred are enough.
        chat_template_kwargs: what prompts are rendered with, beside their messages.
    """
    kwargs = chat_template_kwargs or {}
    found: Counter[str] = Counter()
    demonstrations = 0
    conversation = None
    for row in rows:
        prompt = rendered_prompt(processing_class, row["prompt"], kwargs)
        if isinstance(row["prompt"], list):
            conversation = row["prompt"]
        for value in _completions(row):
            demonstrations += 1
            found[
                _thought_state(prompt, without_repeated_opening(prompt, demonstration_text(value, "A demonstration")))
            ] += 1

    messages = [
        f"{count} of {demonstrations} demonstrations looked at {DISAGREEMENTS[kind]}"
        for kind, count in found.items()
        if kind in DISAGREEMENTS
    ]
    closed, without = found["agrees"] + found["never opened"], found["no thought"]
    if closed and without:
        messages.append(
            f"{without} of {demonstrations} demonstrations looked at have no {CLOSING!r}, while the others do. A "
            "reward that needs one gives them 0: leave them out, or write all of them in one form."
        )
    if conversation is not None:
        messages += _end_of_turn(processing_class, eos_token_ids, conversation, kwargs)
    return messages


def first_disagreements(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    eos_token_ids: list[int],
    dataset: Dataset | IterableDataset,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[str]:
    """As [`disagreements`], of a dataset's first rows."""
    return disagreements(processing_class, eos_token_ids, dataset.take(LOOKED_AT), chat_template_kwargs)


def beyond_window(config: PretrainedConfig, max_completion_length: int | None) -> list[str]:
    """The same, of a model that was made for shorter texts than it is to write."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is None or max_completion_length is None or max_completion_length < window:
        return []
    return [
        f"max_completion_length={max_completion_length} and a prompt are more than the {window} tokens of the model's "
        "window. Lower it, or extend the window: luffy-trl prepare-model --max_position_embeddings."
    ]


def _completions(row: dict[str, Any]) -> list[Any]:
    values = row.get("demonstrations") or [row.get("completion")]
    return [value for value in values if value is not None]


def _thought_state(prompt: str, text: str) -> str:
    opened = prompt.rstrip().endswith(OPENING)
    opens, closes = text.lstrip().startswith(OPENING), CLOSING in text
    if opened and opens:
        return "opened twice"
    if opened and not closes:
        return "never closed"
    if closes and not opened and not opens:
        return "never opened"
    return "agrees" if closes else "no thought"


def _end_of_turn(processing_class, eos_token_ids: list[int], prompt: list[dict[str, Any]], kwargs) -> list[str]:
    """Compares the token after an assistant's answer in the chat template with those at which generation stops."""
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    answer = "An answer."
    rendered = processing_class.apply_chat_template(
        [*prompt, {"role": "assistant", "content": answer}], tokenize=False, **kwargs
    )
    before, _, end = rendered.rpartition(answer)
    after = tokenizer(end, add_special_tokens=False)["input_ids"]
    if not before or not after or after[0] in eos_token_ids:
        return []
    stops = ", ".join(repr(tokenizer.decode([token])) for token in eos_token_ids)
    return [
        f"The chat template ends an assistant's turn with {tokenizer.decode(after[:1])!r}, but generation stops at "
        f"{stops}. Demonstrations and rollouts will end with the latter, and who chats with the model later may wait "
        "for the former: set the tokenizer's eos_token and the generation config's eos_token_id to the template's "
        "token (luffy-trl prepare-model --eos_token)."
    ]
