"""Whether answers equal their gold answers: Math-Verify in worker processes with hard limits, and a cache."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from .answers import read_gold
from .completions import LONGEST_ANSWER
from .pool import Pools, default_workers


CACHE_SIZE = 100_000  # verdicts
DEFAULT_TIMEOUT = 10.0  # seconds
DEFAULT_MEMORY_LIMIT = 1024  # MiB
MIN_MEMORY_LIMIT = 256  # MiB; Math-Verify alone takes about 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What became of one answer.

    Attributes:
        equal: None if the gold answer cannot be parsed.
        outcome: "equal", "different", "no answer", "time limit", "crash" or "gold not parsed".
        answer: what was taken for the answer, as Math-Verify normalises it; at most 200 characters.
    """

    equal: bool | None
    outcome: str
    answer: str = ""


GOLD_NOT_PARSED = Verdict(None, "gold not parsed")
NO_ANSWER = Verdict(False, "no answer")


def verify_math(answers: Sequence[str], golds: Sequence[str], timeout: float = DEFAULT_TIMEOUT) -> list[bool | None]:
    r"""
    Whether each answer equals its gold answer, mathematically.

    Args:
        answers: texts that hold an answer, as a model wrote them, without the thought. A box (or `<answer>`) counts
            first, the last one of several that nothing joins, then what is announced last ("The answer is 2.",
            `#### 2`). Of more than 10,000 characters the end is read.
        golds: as many gold answers: bare LaTeX (`\frac12`), `$...$`, with a unit ("72 clips"), or written as
            answers are.
        timeout: seconds for one answer, by the clock.

    Returns:
        True: equal. False: not equal, no answer in it, over the time or memory limit, or too much for the parser.
        None: the gold answer cannot be read, see [`~luffy_trl.rewards.answers.read_gold`].
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

    The last 100,000 verdicts are remembered, time limits and crashes too: within one process, equal inputs get equal
    verdicts, and a demonstration that comes up again costs nothing. May be called from any thread.

    Args:
        memory_limit: MiB for one worker. Not enforced on macOS, whose kernel has no such limit.
        workers: most worker processes to use. Default: LUFFY_TRL_REWARD_WORKERS, or this rank's share of the cores.

    Raises:
        ValueError: if there are not as many answers as golds, or for limits that leave no room for any answer.
        RuntimeError: if workers cannot start.
    """
    check_limits(timeout, memory_limit, workers)
    if len(answers) != len(golds):
        raise ValueError(f"{len(answers)} answers, but {len(golds)} golds: give one gold answer for each.")
    requests = [
        {"answer": answer[-LONGEST_ANSWER:], "gold": gold, "timeout": timeout, "memory_limit": memory_limit}
        for answer, gold in zip(answers, golds, strict=True)
    ]
    return _verifier.judge(requests, workers or default_workers())


def check_limits(timeout: float, memory_limit: int, workers: int | None) -> None:
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout={timeout} must be a positive number of seconds.")
    if memory_limit < MIN_MEMORY_LIMIT:
        raise ValueError(f"memory_limit={memory_limit} must be {MIN_MEMORY_LIMIT} MiB or more: Math-Verify needs it.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more.")


class Verifier:
    """Verdicts, new ones from the worker pools of this process, others as they are remembered."""

    def __init__(self):
        self.pools = Pools("luffy_trl.rewards.worker")
        self.cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self.forget_threads()
        os.register_at_fork(after_in_child=self.forget_threads)

    def forget_threads(self) -> None:
        self.lock = threading.Lock()  # of the cache; never held while workers work

    def judge(self, requests: list[dict], workers: int) -> list[Verdict]:
        keys = [blake2b(repr(request).encode(), digest_size=16).digest() for request in requests]
        with self.lock:
            verdicts = {key: self.cache[key] for key in keys if key in self.cache}
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in verdicts}
        if new:
            verdicts |= self.judge_new(new, workers)
        with self.lock:
            self.remember(verdicts)
        return [verdicts[key] for key in keys]

    def judge_new(self, requests: dict[bytes, dict], workers: int) -> dict[bytes, Verdict]:
        verdicts = {}
        for key, request in requests.items():
            if not request["gold"].strip() or len(request["gold"]) > LONGEST_ANSWER:
                verdicts[key] = GOLD_NOT_PARSED
            elif not request["answer"].strip():
                verdicts[key] = GOLD_NOT_PARSED if read_gold(request["gold"]) is None else NO_ANSWER
        hard = [key for key in requests if key not in verdicts]
        with self.pools.borrowed() as pool:
            replies = pool.run([requests[key] for key in hard], workers)
        return verdicts | {key: Verdict(**reply) for key, reply in zip(hard, replies, strict=True)}

    def remember(self, verdicts: dict[bytes, Verdict]) -> None:
        for key, verdict in verdicts.items():
            self.cache[key] = verdict
            self.cache.move_to_end(key)
        while len(self.cache) > CACHE_SIZE:
            self.cache.popitem(last=False)


_verifier = Verifier()
