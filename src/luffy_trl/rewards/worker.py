"""
One worker process: `python -m luffy_trl.rewards.worker`. Reads requests as JSON lines, answers each with one line.

It limits itself: the kernel ends it when a request takes too long, also inside C code, and also when the trainer has
died in the meantime; memory beyond the limit cannot be had. Whoever reads its answers takes end-of-file for "this
request was too much".
"""

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from pathlib import Path

from .answers import find_answer, read_gold
from .comparison import equal, parsed


MAX_SHOWN = 200  # characters of a parsed answer that are sent back
MAX_SERVED = 5000  # requests, some 50 MB of growth
HAS_MEMORY_LIMIT = sys.platform == "linux"  # macOS takes the limit and ignores it


@lru_cache(maxsize=4096)  # the completions of a group share their gold
def parse_gold(gold: str) -> str | None:
    """The gold answer in tidy LaTeX, None if no answer could equal it."""
    latex = read_gold(gold)
    return latex if latex and parsed(latex) else None


def judge(answer: str, gold: str) -> dict:
    gold_latex = parse_gold(gold)
    if gold_latex is None:
        return {"equal": None, "outcome": "gold not parsed"}
    parts = find_answer(answer)
    if not any(map(parsed, parts)):
        return {"equal": False, "outcome": "no answer"}
    # Several boxes are one answer, unless they say the same: "\\boxed{\\frac12} or \\boxed{0.5}"
    right = equal(gold_latex, ", ".join(parts)) or (len(parts) > 1 and all(equal(gold_latex, part) for part in parts))
    shown = ",".join(str(parsed(part)[-1]) for part in parts if parsed(part))
    return {"equal": right, "outcome": "equal" if right else "different", "answer": shown[:MAX_SHOWN]}


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
