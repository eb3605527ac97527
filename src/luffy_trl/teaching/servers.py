"""Teachers behind an OpenAI-compatible server: vLLM, SGLang, TGI, llama.cpp, Ollama, or a hosted one.

The `openai` client sends, waits, and tries again with growing pauses (what the server's Retry-After says counts). What
is left to do here: so many requests at a time, an end to all waiting, and what an answer means.
"""

import asyncio
import json
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..runs.redaction import known_secrets, redact, redact_values
from .answers import TeacherAnswer
from .teachers import Keep, Question, Sampling, readable


if TYPE_CHECKING:
    from openai import AsyncOpenAI

# The client waits so long at most where a server names a time (openai/_constants.py); asked for more, it gives up
LONGEST_PAUSE = 120.0  # seconds
# Requests that fail one after the other, each of them tried again before: the server is gone
MOST_FAILURES = 10
# A wrong key, no money, no such model: nothing will be answered
HOPELESS = (401, 402, 404)
FORBIDDEN = 403  # hopeless at first, later what some hosts say of a single question
SAID_AT_MOST = 300  # characters of what a server says
# What the client has to be given where a server needs no key
NO_KEY = "none"


class ServerGoneError(Exception):
    """A server that has stopped answering: the same command goes on later."""


@dataclass
class Server:
    """
    Args:
        name: what the server calls its model.
        key: None for a server that needs none.
        extra_body: fields of the request beside ours, or in their place; None leaves a field out.
        concurrency: requests at a time.
        timeout: seconds without a word from the server after which a request has failed.
        max_retries: how often a request is sent again.
    """

    name: str
    url: str
    key: str | None = field(repr=False)
    sampling: Sampling
    extra_body: Mapping[str, Any]
    concurrency: int
    timeout: float
    max_retries: int
    missed: int = 0  # questions without an answer, to be asked again by the next run
    _failures: int = 0  # in a row
    _has_answered: bool = False
    _refused: list[TeacherAnswer] = field(default_factory=list)  # before the first answer: perhaps all will be

    def settings(self) -> dict[str, Any]:
        extra = redact_values(dict(self.extra_body), known_secrets(self.key))  # some put keys there
        return {"teacher_model": self.name, **asdict(self.sampling), "extra_body": extra}

    async def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """
        Raises:
            ValueError: if the server will not answer this key, for this model.
            ServerGoneError: if it has stopped answering.
        """
        from openai import AsyncOpenAI

        pending = iter(questions)
        async with AsyncOpenAI(
            base_url=self.url, api_key=self.key or NO_KEY, timeout=self.timeout, max_retries=self.max_retries
        ) as client:
            for question in pending:  # alone: a wrong key costs one request
                await self._ask(client, question, keep)
                break
            await together(self._work(client, pending, keep) for _ in range(self.concurrency))
        if self._refused:
            keep(self._refused)

    async def _work(self, client: "AsyncOpenAI", pending: Iterator[Question], keep: Keep) -> None:
        for question in pending:
            await self._ask(client, question, keep)

    async def _ask(self, client: "AsyncOpenAI", question: Question, keep: Keep) -> None:
        from openai import APIConnectionError, APIError, APIStatusError

        patience = (self.max_retries + 1) * (self.timeout + LONGEST_PAUSE)
        try:
            async with asyncio.timeout(patience):
                reply = await client.chat.completions.with_raw_response.create(**self._request(question))
            answer = self._read(question, reply.content)
        except APIStatusError as error:
            self._take_refusal(question, error.status_code, self._said(_message(error.body) or error), keep)
        except APIConnectionError as error:
            self._miss(self._said(error.__cause__ or error) or type(error.__cause__).__name__)
        except TimeoutError:
            self._miss(f"no end of its answer after {patience:.0f} seconds")
        except (ValueError, APIError) as error:
            self._miss(f"what it sent is no chat completion ({self._said(error)})")
        else:
            keep([*self._refused, answer])
            self._refused, self._failures, self._has_answered = [], 0, True

    def _request(self, question: Question) -> dict[str, Any]:
        prompt = question.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body = {"temperature": self.sampling.temperature, "max_tokens": self.sampling.max_tokens}
        if self.sampling.top_p != 1:
            body["top_p"] = self.sampling.top_p
        if self.sampling.temperature > 0:
            body["seed"] = question.seed(self.sampling.seed)
        if self.sampling.logprobs:
            body["logprobs"] = True
        body = {name: value for name, value in {**body, **self.extra_body}.items() if value is not None}
        return {"model": self.name, "messages": messages, "extra_body": body}

    def _read(self, question: Question, content: bytes) -> TeacherAnswer:
        """Raises ValueError for what is no chat completion."""
        try:
            reply = json.loads(content)
            if reply.get("error"):  # some hosts say so with status 200
                raise ValueError(str(reply["error"]))
            choice = reply["choices"][0]
            message = choice["message"]
            tokens, logps = _logprobs(choice.get("logprobs"))
            prompt_tokens, completion_tokens = _usage(reply.get("usage"))
            return TeacherAnswer(
                question.teacher,
                question.problem,
                question.repeat,
                finish="content_filter" if message.get("refusal") else str(choice.get("finish_reason") or "stop"),
                text=_text(message.get("content")),
                thought=_thought(message),
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                tokens=tokens,
                logps=logps,
            )
        except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _take_refusal(self, question: Question, status: int, said: str, keep: Keep) -> None:
        if status in HOPELESS or (status == FORBIDDEN and not self._has_answered):
            raise ValueError(
                f"the server of --teacher_model {self.name} refuses with status {status}: {said}. Look at the key, "
                "the model's name and --teacher_url."
            )
        if status in (408, 409, 429) or status >= 500:
            self._miss(f"status {status}: {said}")
            return
        refused = question.refused(f"status {status}: {said}")
        self._failures = 0
        if self._has_answered:
            keep([refused])
            return
        self._refused.append(refused)
        if len(self._refused) == MOST_FAILURES:
            raise ValueError(
                f"the server of --teacher_model {self.name} refuses every question, the last with status {status}: "
                f"{said}. If it does not take one of the fields that are sent, leave it out, such as with "
                "--extra_body '{\"seed\": null}'."
            )

    def _miss(self, reason: str) -> None:
        self.missed += 1
        self._failures += 1
        is_first = not self._has_answered and self.missed == 1 and not self._refused
        if is_first or self._failures >= MOST_FAILURES:
            raise ServerGoneError(f"The server of --teacher_model {self.name} does not answer ({reason}).")

    def _said(self, error: BaseException | str) -> str:
        """What a server or a connection said, on one line and cut, without the key."""
        text = " ".join(redact(str(error), known_secrets(self.key)).split()).rstrip(".")
        return text if len(text) <= SAID_AT_MOST else f"{text[:SAID_AT_MOST]}..."


async def ask_servers(asked: Sequence[tuple[Server, Sequence[Question]]], keep: Keep) -> None:
    """Ask all servers at the same time. The first that cannot go on ends it for all."""
    await together(server.ask(questions, keep) for server, questions in asked if questions)


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at the same time; the first exception ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _message(body: Any) -> str | None:
    """Of an error: what the client found in the reply, an object with a message or a text."""
    message = body.get("message") if isinstance(body, dict) else body
    return message if isinstance(message, str) else None


def _text(content: Any) -> str:
    """Of a message, or its parts."""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"its content is {type(content).__name__}")
    return readable(content or "")


def _thought(message: dict[str, Any]) -> str | None:
    """What a server gives apart: DeepSeek's name for it, or vLLM's."""
    thoughts = [message.get(name) for name in ("reasoning_content", "reasoning")]
    return next((readable(thought) for thought in thoughts if thought and isinstance(thought, str)), None)


def _usage(usage: Any) -> list[int]:
    """Tokens of the prompt and of the answer; 0 where the server does not say."""
    usage = usage if isinstance(usage, dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return [count if type(count) is int and count >= 0 else 0 for count in counts]


def _logprobs(logprobs: Any) -> tuple[list[str] | None, list[float] | None]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not content:
        return None, None
    return [_token(entry) for entry in content], [float(entry["logprob"]) for entry in content]


def _token(entry: dict[str, Any]) -> str:
    """Its text; of a part of a character what decoding makes of its bytes alone."""
    spelled = entry.get("bytes")
    return bytes(spelled).decode(errors="replace") if isinstance(spelled, list) else readable(str(entry["token"]))
