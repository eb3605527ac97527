"""Whether answers equal their gold answers: Math-Verify in worker processes with hard limits, and a cache."""

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from .pool import WorkerPool, default_workers


MAX_ANSWER_LENGTH = 10_000  # characters; of a longer answer, the end is verified
MAX_GOLD_LENGTH = 2_000  # characters; the longest of the six benchmarks has 173
CACHE_SIZE = 100_000  # verdicts, about 40 MB at most
DEFAULT_TIMEOUT = 10.0  # seconds
DEFAULT_MEMORY_LIMIT = 1024  # MiB


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What became of one answer.

    Attributes:
        equal: None if the gold answer cannot be parsed.
        outcome: "equal", "different", "no answer", "time limit", "crash" (the memory limit, mostly) or
            "gold not parsed".
        answer: what was taken for the answer, as Math-Verify normalises it; at most 200 characters.
    """

    equal: bool | None
    outcome: str
    answer: str = ""


def verify_math(answers: Sequence[str], golds: Sequence[str], timeout: float = DEFAULT_TIMEOUT) -> list[bool | None]:
    r"""
    Whether each answer equals its gold answer, mathematically.

    Args:
        answers: texts that hold an answer, as a model wrote them, without the thought. A box counts first, the last
            one of several, then a formula that is announced ("the answer is $2$"). Of more than 10,000 characters the
            end is read.
        golds: as many gold answers: bare LaTeX (`\frac12`), `$...$` or `\boxed{...}`.
        timeout: seconds for one answer, by the clock.

    Returns:
        True: equal. False: not equal, no answer in it, over the time or memory limit, or too much for the parser.
        None: the gold answer cannot be parsed.
    """
    return [verdict.equal for verdict in judge_math(answers, golds, timeout=timeout)]


def judge_math(
    answers: Sequence[str],
    golds: Sequence[str],
    timeout: float = DEFAULT_TIMEOUT,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
    workers: int | None = None,
) -> list[Verdict]:
    """
    [`verify_math`] with reasons.

    Verdicts are remembered, time limits and crashes too: within one process, equal inputs always get equal verdicts.

    Args:
        memory_limit: MiB for one worker. Not enforced on macOS, whose kernel has no such limit.
        workers: most worker processes to use. Default: LUFFY_TRL_REWARD_WORKERS, or this rank's share of the cores.

    Raises:
        ValueError: if there are not as many answers as golds.
        RuntimeError: if workers cannot start.
    """
    if len(answers) != len(golds):
        raise ValueError(f"{len(answers)} answers, but {len(golds)} golds: give one gold answer for each.")
    requests = [
        {"answer": answer[-MAX_ANSWER_LENGTH:], "gold": gold, "timeout": timeout, "memory_limit": memory_limit}
        for answer, gold in zip(answers, golds, strict=True)
    ]
    return _verifier.judge(requests, workers or default_workers())


class Verifier:
    """The worker pool and the cache of this process."""

    def __init__(self):
        self.pool = WorkerPool()
        self.cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self.lock = threading.Lock()

    def judge(self, requests: list[dict], workers: int) -> list[Verdict]:
        keys = [blake2b(repr(request).encode(), digest_size=16).digest() for request in requests]
        with self.lock:
            verdicts = {key: self.cache[key] for key in keys if key in self.cache}
            new = {key: request for key, request in zip(keys, requests, strict=True) if key not in verdicts}
            replies = self.pool.run(list(new.values()), workers) if new else []
            verdicts |= {key: Verdict(**reply) for key, reply in zip(new, replies, strict=True)}
            self.remember(verdicts)
        return [verdicts[key] for key in keys]

    def remember(self, verdicts: dict[bytes, Verdict]) -> None:
        for key, verdict in verdicts.items():
            self.cache[key] = verdict
            self.cache.move_to_end(key)
        while len(self.cache) > CACHE_SIZE:
            self.cache.popitem(last=False)

    def after_fork(self) -> None:
        self.lock = threading.Lock()  # another thread may have held it
        self.pool.abandon()


_verifier = Verifier()
atexit.register(_verifier.pool.close)
os.register_at_fork(after_in_child=_verifier.after_fork)
