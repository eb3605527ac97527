"""Conversations as they stand in front of the policy: through the chat template, with the tools that go with them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import get_json_schema
from trl import prepare_multimodal_messages


@dataclass(frozen=True)
class Tools:
    """The tools that a row's prompt is rendered with, as JSON schemas: the run's, else those in its column `tools`.

    Args:
        of_run: of the trainer's `tools`; none where they are empty.
        of_environments: of the trainer's `environment_factory`, by the name in the column `environment`, None the only
            one.
    """

    of_run: Sequence[Any] = ()
    of_environments: Mapping[str | None, Sequence[Any]] | None = None

    def of(self, row: Mapping[str, Any], where: str) -> list[Any] | None:
        """None where there are none.

        Raises:
            ValueError: starting with `where`, for a column `tools` that holds no tools.
        """
        if self.of_environments is not None:
            name = None if None in self.of_environments else row.get("environment")
            return list(self.of_environments.get(name, ())) or None
        return list(self.of_run) or tools_of(row, where)

    def options(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """For the chat template: nothing where there are none."""
        tools = self.of(row, where)
        return {} if tools is None else {"tools": tools}


def schemas(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Of functions, as the chat template gets them."""
    return [get_json_schema(tool) for tool in tools]


def tools_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The column `tools` of a row, in TRL's forms: a list of JSON schemas, or its JSON; None where it has none."""
    value = without_nones(row.get("tools"))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{where}: `tools` is {brief(value)}, expected a list of JSON schemas.") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{where}: `tools` is {brief(value)}, expected a list of JSON schemas, or its JSON.")
    return value


def without_nones(value: Any) -> Any:
    """Without the keys that only other rows have, which a table fills with None."""
    if isinstance(value, dict):
        return {key: without_nones(part) for key, part in value.items() if part is not None}
    return [without_nones(part) for part in value] if isinstance(value, list) else value


def rendered_prompt(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    prompt: str | list[dict[str, Any]],
    chat_template_kwargs: dict[str, Any],
    images: list[Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """A prompt as it stands in front of the policy."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(processing_class, ProcessorMixin):  # TRL gives these their messages in parts
        prompt = prepare_multimodal_messages(prompt, images)
    return processing_class.apply_chat_template(
        prompt, add_generation_prompt=add_generation_prompt, tokenize=False, **chat_template_kwargs
    )


def images_in(messages: Any) -> list[Any]:
    """The images among the parts of messages, in their order; there are none in a text."""
    said = [message for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    contents = [message.get("content") for message in said]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part.get("image") for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def without_images(prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A prompt with its texts alone."""
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": [part for part in message["content"] if part.get("type") != "image"]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def end_of_turn(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, chat_template_kwargs: dict[str, Any]
) -> int | None:
    """The token with which the chat template ends an assistant's turn: after the answer and blanks, if it is special,
    else what follows the answer.

    None where there is no chat template, or nothing but blanks follows, or the template takes no such conversation.
    """
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    try:
        rendered = rendered_prompt(processing_class, turns, chat_template_kwargs, add_generation_prompt=False)
    except Exception:  # a template may raise anything; what it does not take, it does not end
        return None
    before, _, end = rendered.rpartition(answer)
    special = set(tokenizer.added_tokens_decoder)
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if before and end.strip() else []
    after_blanks = next((i for i in ids if i in special or tokenizer.decode([i]).strip()), None)
    return after_blanks if after_blanks in special else next(iter(ids), None)


def without_repeated_opening(prompt: str, text: str) -> str:
    """The demonstration without a leading `<think>`, or empty thought, that the rendered prompt already ends with."""
    for opening in ("<think>\n\n</think>\n\n", "<think>\n", "<think>"):
        if prompt.endswith(opening) and text.startswith(opening):
            return text.removeprefix(opening)
    return text


def brief(value: Any) -> str:
    """A value as messages show it: its type, and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
