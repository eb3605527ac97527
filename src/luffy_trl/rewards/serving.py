"""
What a worker process does: reads requests as JSON lines, answers each with one line.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any


MAX_SERVED = 5000  # requests, some 50 MB of growth
HAS_MEMORY_LIMIT = sys.platform == "linux"  # macOS takes the limit and ignores it


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until there are no more, or this process is to be replaced.

    Args:
        answer: from a request, which also has its "timeout" in seconds and "memory_limit" in MiB, to its verdict.
    """
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
        verdict = answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"verdict": verdict, "retire": is_spent(served, request["memory_limit"])}), file=replies)


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
