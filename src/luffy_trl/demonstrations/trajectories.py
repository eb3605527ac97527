"""Recorded trajectories: demonstrations of several turns, in token ids, and which of them are the policy's.

    prompt | assistant's, end of turn | tools' or a user's, opening of a turn | assistant's, end of turn

Each piece is the difference of two renderings: the conversation before an assistant's message, with a turn opened for
it, and the same with the message. Before the next message, this must stand there as it was written. A chat template
that writes history otherwise (many strip thoughts from it) has no such pieces; where TRL has a template for training
that keeps history, and opens the first turn alike, that one is taken. Pieces are tokenized one by one: a policy that
acts reads and writes them so.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template

from .rendering import brief, images_in, rendered_prompt, without_images, without_nones


ChatMessage = dict[str, Any]
ContextSpan = tuple[int, int]  # of tokens: from, to before

BETWEEN = ("tool", "user")  # roles, beside the assistant's
QUOTED = 40  # characters of a text in messages
EXPECTED_CALL = "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"


def is_trajectory(value: Any) -> bool:
    """Whether a completion has several messages that begin with an assistant's, or calls a tool."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    several = len(value) > 1 and all(isinstance(message, dict) for message in value)
    return value[0].get("role") == "assistant" and bool(several or value[0].get("tool_calls"))


class TrajectoryEncoder:
    """
    Args:
        processing_class: the trainer's tokenizer or processor.
        eos_token_ids: every token at which a rollout ends.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin, eos_token_ids: list[int]):
        self.processing_class = processing_class
        is_processor = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = processing_class.tokenizer if is_processor else processing_class
        self.ends = [self.tokenizer.decode([token]) for token in eos_token_ids if token is not None]
        self.training_template = _training_template(processing_class)

    def __call__(
        self, value: list[ChatMessage], prompt: Any, chat_template_kwargs: dict[str, Any], where: str
    ) -> tuple[list[int], list[ContextSpan], list[ChatMessage]]:
        """Token ids, which of them are not the policy's, and the messages as reward functions get them.

        Raises:
            ValueError: starting with `where`, for what is no trajectory, and for one that the chat template does not
                render as it is.
        """
        messages = checked_messages(value, where)
        if not isinstance(prompt, list):
            raise ValueError(f"{where} is a trajectory, and `prompt` is {brief(prompt)}: make it messages, too.")
        prompt = without_images(prompt)  # what stands behind it is what matters
        try:
            pieces = list(self._pieces(messages, prompt, chat_template_kwargs, where))
        except ValueError:
            options = self._training_options(prompt, chat_template_kwargs)
            if options is None:
                raise
            pieces = list(self._pieces(messages, prompt, options, where))
        ids: list[int] = []
        context: list[ContextSpan] = []
        tokenized = self.tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
        for (_, is_own), piece in zip(pieces, tokenized, strict=True):
            if not is_own:
                context.append((len(ids), len(ids) + len(piece)))
            ids += piece
        return ids, context, messages

    def _training_options(self, prompt: list[ChatMessage], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """With TRL's template for training, where there is one and rollouts begin as under the model's own."""
        if self.training_template is None or "chat_template" in kwargs:
            return None
        options = kwargs | {"chat_template": self.training_template}
        own, other = (rendered_prompt(self.processing_class, prompt, each) for each in (kwargs, options))
        return options if own == other else None

    def _pieces(
        self, messages: list[ChatMessage], prompt: list[ChatMessage], kwargs: dict[str, Any], where: str
    ) -> Iterator[tuple[str, bool]]:
        """The texts behind the rendered prompt, and whether they are the policy's."""
        render = self._renderer(prompt, kwargs, where)
        before = render(messages[:0], True)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            here = f"{where}, message {turn}"
            whole = render(messages[: turn + 1], False)
            if not whole.startswith(before):
                raise ValueError(
                    f"{here}: the chat template does not write it behind {_end(before)!r}, with which it opens the "
                    "assistant's turn, so no policy would write it there: begin its content with what the template "
                    "opens the turn with, or take another template (chat_template_kwargs, luffy-trl prepare-model)."
                )
            said = self._ended(whole[len(before) :], here)
            _check_said(messages[turn], said, here)
            yield said, True
            if following is None:
                return
            so_far, before = before + said, render(messages[:following], True)
            if not before.startswith(so_far):
                raise ValueError(_rewritten(so_far, before, here))
            given = before[len(so_far) :]
            for number in range(turn + 1, following):
                _check_given(messages[number], given, f"{where}, message {number}")
            yield given, False

    def _renderer(
        self, prompt: list[ChatMessage], kwargs: dict[str, Any], where: str
    ) -> Callable[[list[ChatMessage], bool], str]:
        def render(messages: list[ChatMessage], opens_turn: bool) -> str:
            conversation = [*prompt, *messages]
            try:
                return rendered_prompt(self.processing_class, conversation, kwargs, add_generation_prompt=opens_turn)
            except Exception as error:  # a template may raise anything
                roles = ", ".join(str(message.get("role")) for message in conversation)
                raise ValueError(
                    f"{where}: the conversation with the roles {roles} is refused by the model's chat template "
                    f"({' '.join(str(error).split()).rstrip('.')}). Give the model a template that takes it."
                ) from error

        return render

    def _ended(self, text: str, where: str) -> str:
        """Up to the end of the turn, behind which templates write a line break."""
        found = [(text.find(end), end) for end in self.ends if end in text]
        if not found:
            raise ValueError(
                f"{where}: the chat template ends it with {_end(text)!r}, at which generation does not stop "
                f"({', '.join(map(repr, self.ends))} are what it stops at): set the tokenizer's eos_token and the "
                "generation config's eos_token_id to the template's token (luffy-trl prepare-model --eos_token)."
            )
        start, end = min(found)
        if text[start + len(end) :].strip():
            raise ValueError(
                f"{where} holds the end-of-sequence token {end!r} before its end. The policy could never write what "
                "follows it: cut the message there, or remove the token."
            )
        return text[: start + len(end)]


def checked_messages(value: list[ChatMessage], where: str) -> list[ChatMessage]:
    """The messages of a trajectory, without the keys that only other messages have, calls as TRL has them.

    Raises:
        ValueError: starting with `where`, naming the message.
    """
    roles = [message.get("role") for message in value]
    for number, (role, following) in enumerate(zip(roles, [*roles[1:], None], strict=True)):
        is_last = number == len(roles) - 1
        if role not in (("assistant",) if is_last else ("assistant", *BETWEEN)) or role == following == "assistant":
            raise ValueError(
                f"{where} is a list with roles {roles}; expected a str, a list with exactly one assistant message, or "
                "a trajectory: assistant messages, with tool or user messages after each but the last. Message "
                f"{number} breaks that. The messages before the first go in `prompt`."
            )
    return [_checked_message(message, f"{where}, message {number}") for number, message in enumerate(value)]


def _checked_message(message: ChatMessage, where: str) -> ChatMessage:
    message = without_nones({key: part for key, part in message.items() if key != "tool_calls"}) | (
        {"tool_calls": [_checked_call(call, where) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else {}
    )
    content = message.setdefault("content", "")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = message["content"] = "".join(str(part.get("text", "")) for part in content)
    if images_in([message]):
        raise ValueError(f"{where} has an image, and demonstrations are texts: images go in `prompt`.")
    if not isinstance(content, str):
        raise ValueError(f"{where} has the content {brief(content)}, expected a text.")
    if message["role"] == "assistant" and not content.strip() and "tool_calls" not in message:
        raise ValueError(f"{where} is empty: give it a content, or tool_calls.")
    return message


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has the tool call {brief(call)}, expected {EXPECTED_CALL}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's form
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    elif arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where} calls {function['name']} with {brief(function['arguments'])}, expected an object.")
    named = {"name": function["name"], "arguments": without_nones(arguments)}
    return without_nones(call) | {"type": "function", "function": named}


# That nothing was left out or written otherwise


def _check_said(message: ChatMessage, text: str, where: str) -> None:
    said = {key: part for key, part in message.items() if key in ("content", "reasoning_content", "thinking")}
    if "</think>" in message["content"]:  # templates set blanks around a thought
        said["content"] = message["content"].replace("<think>", "")
    for key, part in said.items():
        if not _holds(text.replace("<think>", ""), part):
            raise ValueError(_left_out(f"`{key}`", part, where))
    for call in message.get("tool_calls", []):
        for part in _leaves(call["function"]):
            if not _holds(text, part):
                raise ValueError(_left_out(f"the call of {call['function']['name']}", part, where))


def _check_given(message: ChatMessage, text: str, where: str) -> None:
    if not _holds(text, message["content"]):
        raise ValueError(_left_out("`content`", message["content"], where))


def _left_out(what: str, part: str, where: str) -> str:
    return (
        f"{where}: the chat template leaves out or changes {what}, of which {part[:QUOTED]!r} is not in what it "
        "renders: write the message as the template does, or give the model a template that takes it whole."
    )


def _rewritten(so_far: str, now: str, where: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(so_far, now, strict=False)) if a != b), min(len(so_far), len(now)))
    start = max(start - QUOTED // 4, 0)
    was, becomes = (text[start : start + QUOTED] for text in (so_far, now))
    return (
        f"{where}: the chat template writes it otherwise once other messages follow ({was!r} becomes {becomes!r}), as "
        "templates do that strip thoughts from history, so a policy would not read there what it has written: take "
        "the thoughts out of all turns but the last, or give the model a template that keeps history as it was."
    )


def _holds(text: str, part: str) -> bool:
    """Blanks aside, as it is or as JSON writes it."""
    squeezed = _squeezed(text)
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(_squeezed(form) in squeezed for form in forms)


def _leaves(value: Any) -> Iterator[str]:
    """Texts and names in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("name", "arguments"):
                yield str(key)
            yield from _leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _end(text: str) -> str:
    return text[-QUOTED:]


def _training_template(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str | None:
    """TRL's, for one of the templates that it knows; None where none is needed or known."""
    if processing_class.chat_template is None:
        return None
    try:
        return get_training_chat_template(processing_class)
    except Exception:  # it renders with the model's template, which may raise anything
        return None
