"""An OpenAI-compatible server on 127.0.0.1 whose answers are scripted, with faults to order.

with TeacherServer(lambda body: Reply("\\boxed{4}")) as server:
    server.fault(status=429, headers={"Retry-After": "0.2"}, times=2)
    ...
assert len(server.bodies) == 3
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


# A planted secret: it may be in the requests' Authorization header, and nowhere else
KEY = "sk-PlantedKeyThatMustNotLeak0123456789"
LONGEST_HANG = 60.0


@dataclass
class Reply:
    """An answer. `tokens` are (token, its bytes or None, log-prob)."""

    content: Any
    finish: str | None = "stop"
    message: dict[str, Any] = field(default_factory=dict)
    tokens: list[tuple[str, list[int] | None, float]] | None = None
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 11, "completion_tokens": 7})

    def body(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.content, **self.message}
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish, "message": message}
        if self.tokens is not None:
            entries = [{"token": t, "bytes": b, "logprob": p, "top_logprobs": []} for t, b, p in self.tokens]
            choice["logprobs"] = {"content": entries}
        return {"id": "1", "object": "chat.completion", "created": 1, "choices": [choice], "usage": self.usage}


@dataclass
class Fault:
    """What the server does instead of answering, `times` times (None: always), after `after` requests."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "a scripted fault"
    does: str = "status"  # or "drop", "half", "hang", "garbage"
    times: int | None = 1
    after: int = 0
    about: str = ""  # only requests that have this in a message


class TeacherServer:
    """
    Attributes:
        bodies: of all requests, in their order.
        keys: what each of them had as a bearer token.
        most_at_once: requests that were under way at the same time, at most.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Reply], key: str | None = None, pause: float = 0.0):
        self.answer, self.key, self.pause = answer, key, pause
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.faults: list[Fault] = []
        self.under_way = self.most_at_once = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = _Server(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def fault(self, **options: Any) -> None:
        self.faults.append(Fault(**options))

    def asked(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def __enter__(self) -> "TeacherServer":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def take(self, body: dict[str, Any], key: str) -> Fault | None:
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            if self.key is not None and key != self.key:
                return Fault(status=401, message=f"Incorrect API key provided: {key}")
            for fault in self.faults:
                if len(self.bodies) <= fault.after or fault.times == 0:
                    continue
                if fault.about in json.dumps(body["messages"]):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that nobody has taken yet: more are reset


def _handler(teacher: TeacherServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions", self.path
            fault = teacher.take(body, self.headers.get("Authorization", "").removeprefix("Bearer "))
            with teacher.lock:
                teacher.under_way += 1
                teacher.most_at_once = max(teacher.most_at_once, teacher.under_way)
            try:
                if fault is None:
                    time.sleep(teacher.pause)
                    self.send(200, json.dumps(teacher.answer(body).body()))
                else:
                    self.fail(fault)
            except OSError:  # the client has gone
                self.close_connection = True
            finally:
                with teacher.lock:
                    teacher.under_way -= 1

        def fail(self, fault: Fault) -> None:
            if fault.does == "status":
                self.send(fault.status, json.dumps({"error": {"message": fault.message}}), fault.headers)
                return
            if fault.does == "garbage":
                self.send(200, '{"choices": [{"mess')
                return
            if fault.does == "hang":
                teacher.closing.wait(LONGEST_HANG)
            if fault.does == "half":
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"id": "1", "choices": [{')
                self.wfile.flush()
            self.close_connection = True

        def send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def boxed_reward(completions: list, solution: list, **kwargs: Any) -> list[float]:
    """1 for the solution in a box, at the end of a text or of an assistant's message."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(f"\\boxed{{{gold}}}" in text) for text, gold in zip(texts, solution, strict=True)]


def any_reward(completions: list, **kwargs: Any) -> list[float]:
    return [1.0] * len(completions)


def broken_reward(completions: list, **kwargs: Any) -> list[float]:
    raise KeyError("no")


def token_reward(completions: list, completion_ids: list, **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


async def letters_reward(completions: list, **kwargs: Any) -> list[float]:
    return [0.5] * len(completions)
