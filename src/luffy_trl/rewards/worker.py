"""
One worker process: `python -m luffy_trl.rewards.worker`. Reads requests as JSON lines, answers each with one line.

It limits itself: the kernel ends it when a request takes too long, also inside C code, and also when the trainer has
died in the meantime; memory beyond the limit cannot be had. Whoever reads its answers takes end-of-file for "this
request was too much".
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify


# Boxed answers first, else a formula that is announced ("the answer is $2$"); `\frac12` and `\sqrt2` are fine LaTeX
ANSWER = LatexExtractionConfig(
    boxed_match_priority=0,
    try_extract_without_anchor=False,
    normalization_config=NormalizationConfig(units=True, malformed_operators=True, nits=True),
)
# Between two boxes that are one answer: "\\boxed{1} or $x = \\boxed{2}$"
JOINED = re.compile(r"[\s$]*(?:,|;|and|or|, and|, or)[\s$]*(?:\w+\s*=\s*)?")
MAX_GAP = 40  # characters; a longer gap joins nothing
MAX_SHOWN = 200  # characters of a parsed answer that are sent back
MAX_SERVED = 5000  # requests, some 50 MB of growth
HAS_MEMORY_LIMIT = sys.platform == "linux"  # macOS takes the limit and ignores it


def from_last_box(text: str) -> str:
    """The text from its last box on, with those before it that "and", "or" or a comma join to it.

    Math-Verify would take all boxes of a text for one answer, also those that it goes on to correct.
    """
    starts = [match.start() for match in re.finditer(r"\\boxed\b", text)]
    if len(starts) < 2:
        return text
    answer = text[starts[-1] :]
    for start, following in reversed(list(pairwise(starts))):
        box, _, gap = text[start:following].rpartition("}")
        if not JOINED.fullmatch(gap[:MAX_GAP]):
            break
        answer = f"{box}}}, {answer}"
    return answer


def parse_answer(text: str) -> list:
    text = from_last_box(text)
    return parse(text, extraction_config=[ANSWER], extraction_mode="first_match", parsing_timeout=None)


@lru_cache(maxsize=4096)  # the completions of a group share their gold
def parse_gold(gold: str) -> list:
    return parse_answer(gold if "\\boxed" in gold else f"\\boxed{{{gold}}}")


def judge(answer: str, gold: str) -> dict:
    parsed_gold = parse_gold(gold)
    if not parsed_gold:
        return {"equal": None, "outcome": "gold not parsed"}
    parsed = parse_answer(answer)
    if not parsed:
        return {"equal": False, "outcome": "no answer"}
    equal = verify(parsed_gold, parsed, timeout_seconds=None)
    # The last entry is the text that was taken for the answer
    return {"equal": equal, "outcome": "equal" if equal else "different", "answer": str(parsed[-1])[:MAX_SHOWN]}


def limit_memory(megabytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def is_spent(served: int, memory_limit: int) -> bool:
    """Whether another worker should take over: Math-Verify's parser keeps something of all that it has ever read."""
    if not HAS_MEMORY_LIMIT:
        return served == MAX_SERVED
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # of address space, which is what is limited
    return served == MAX_SERVED or pages * resource.getpagesize() > memory_limit * 2**20 / 2


def main() -> None:
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    print(json.dumps({"retire": False}), file=replies)  # ready
    for served, line in enumerate(requests, start=1):
        request = json.loads(line)
        if HAS_MEMORY_LIMIT:
            limit_memory(request["memory_limit"])
        signal.setitimer(signal.ITIMER_REAL, request["timeout"])
        verdict = judge(request["answer"], request["gold"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict, "retire": is_spent(served, request["memory_limit"])}), file=replies)


if __name__ == "__main__":
    main()
