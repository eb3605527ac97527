"""
Worker processes that may die: each works on one request at a time, and a dead one costs no request but that.

Why no `multiprocessing`, and nothing built on it: forking a process with CUDA threads is unsafe, and its other start
methods import the user's script again, which a script without `if __name__ == "__main__"` does not survive. Here a
worker is a program of its own, and the two speak JSON lines over pipes: nothing is unpickled.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, cast


WORKERS_VARIABLE = "LUFFY_TRL_REWARD_WORKERS"
MAX_DEFAULT_WORKERS = 16  # with more, starting them takes longer than a batch of completions
PATIENCE = (
    60.0  # seconds beyond the time limit until a silent worker is taken for stuck: it was stopped, or cannot start
)
MAX_FAILED_STARTS = 3
MAX_POOLS = 4  # calls from different threads that are worked on at once
IN_HAND = 2  # requests given to a worker: it goes on with the second while this process is busy or waits for a core


def default_workers() -> int:
    """
    The variable LUFFY_TRL_REWARD_WORKERS, or this process's share of the usable cores, at most 16.

    Raises:
        ValueError: if the variable is no positive whole number.
    """
    given = os.environ.get(WORKERS_VARIABLE)
    if given is not None:
        if not given.isdecimal() or int(given) == 0:
            raise ValueError(f"{WORKERS_VARIABLE}={given!r} must be a whole number of 1 or more.")
        return int(given)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun and accelerate launch
    return max(1, min(MAX_DEFAULT_WORKERS, cores // local_ranks))


class Worker:
    """One process, and the numbers of the requests that it has, the one it works on first."""

    def __init__(self, module: str):
        self.command = [sys.executable, "-P", "-m", module]
        search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)  # it finds what this process finds
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What is made from a seed is the same in every worker
            env=os.environ | {"PYTHONPATH": search_path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the trainer, which ends its workers
        )
        self.requests = cast(IO[bytes], self.process.stdin)
        self.messages = cast(IO[bytes], self.process.stdout)
        self.partial = b""  # of a message
        self.ready = False
        self.tasks: deque[int] = deque()

    def fileno(self) -> int:
        return self.messages.fileno()

    def send(self, request: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):  # it has died: `receive` will say so
            self.requests.write(json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self.requests.flush()

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived, or None: the process has ended. Never waits, once `select` has named this worker."""
        chunk = os.read(self.fileno(), 2**16)
        *lines, self.partial = (self.partial + chunk).split(b"\n")
        return [json.loads(line) for line in lines] if chunk else None

    def end(self) -> int:
        """Kill the process, if it still runs. Returns its exit status, negative for a signal."""
        self.process.kill()
        status = self.process.wait()
        self.close_pipes()
        return status

    def close_pipes(self) -> None:
        for pipe in (self.requests, self.messages):
            with suppress(BrokenPipeError):
                pipe.close()


class WorkerPool:
    """Workers that start when first needed and stay for the next call. For one thread at a time.

    Args:
        module: the program of a worker, which calls [`~luffy_trl.rewards.serving.serve`].
    """

    def __init__(self, module: str):
        self.module = module
        self.workers: list[Worker] = []

    def run(self, requests: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
        """
        One verdict for each request, in their order.

        A request over its time limit gets the outcome "time limit". One whose worker died otherwise is tried once
        more, since the cause may have been outside (the kernel short of memory), then gets "crash".

        Args:
            requests: each with its "timeout" in seconds.
            size: most workers to use.

        Raises:
            RuntimeError: if workers cannot start.
        """
        try:
            return _Batch(self, requests, size).run()
        except BaseException:  # Ctrl-C too: replies to these requests must not reach the next call
            self.close()
            raise

    def close(self) -> None:
        while self.workers:
            self.workers.pop().end()

    def abandon(self) -> None:
        """Forget the workers of the process that this one was forked from, without touching them."""
        while self.workers:
            self.workers.pop().close_pipes()


class Pools:
    """The pools of this process. A call has one to itself, so that a request that hangs holds up no other thread; one
    stays for the next call, others while there is room."""

    def __init__(self, module: str):
        self.module = module
        self.pool = WorkerPool(module)
        self.forget_threads()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self.after_fork)

    def forget_threads(self) -> None:
        self.lock = threading.Lock()  # of what follows; never held while workers work
        self.idle = [self.pool]
        self.in_use: list[WorkerPool] = []
        self.room = threading.BoundedSemaphore(MAX_POOLS)

    @contextmanager
    def borrowed(self) -> Iterator[WorkerPool]:
        with self.room:
            with self.lock:
                pool = self.idle.pop() if self.idle else WorkerPool(self.module)
                self.in_use.append(pool)
            try:
                yield pool
            finally:
                with self.lock:
                    self.in_use.remove(pool)
                    self.idle.insert(0 if pool is not self.pool else len(self.idle), pool)

    def close(self) -> None:
        for pool in [*self.idle, *self.in_use]:
            pool.close()

    def after_fork(self) -> None:
        for pool in [*self.idle, *self.in_use]:
            pool.abandon()
        self.forget_threads()  # of which this process has none of those that held locks and pools


class _Batch:
    """The requests of one call on their way through the workers."""

    def __init__(self, pool: WorkerPool, requests: Sequence[dict[str, Any]], size: int):
        self.pool = pool
        self.requests = requests
        self.size = min(size, len(requests))
        self.waiting = deque(range(len(requests)))
        self.verdicts: dict[int, dict[str, Any]] = {}
        self.tried_again: set[int] = set()
        self.failed_starts = 0
        self.patience = PATIENCE + max((request["timeout"] for request in requests), default=0.0)

    def run(self) -> list[dict[str, Any]]:
        with selectors.DefaultSelector() as self.selector:
            for worker in self.pool.workers[: self.size]:
                self.selector.register(worker, selectors.EVENT_READ)
                if worker.ready:
                    self.give(worker)
            while len(self.selector.get_map()) < self.size:
                self.start()
            while len(self.verdicts) < len(self.requests):
                self.listen()
        return [self.verdicts[i] for i in range(len(self.requests))]

    def start(self) -> None:
        worker = Worker(self.pool.module)
        self.pool.workers.append(worker)
        self.selector.register(worker, selectors.EVENT_READ)

    def give(self, worker: Worker) -> None:
        while self.waiting and len(worker.tasks) < IN_HAND:
            worker.tasks.append(self.waiting.popleft())
            worker.send(self.requests[worker.tasks[-1]])

    def listen(self) -> None:
        heard = self.selector.select(self.patience)
        if not heard:
            for worker in self.pool.workers:
                if worker.tasks or not worker.ready:
                    worker.process.kill()  # its end is heard next
        for key, _ in heard:
            worker = cast(Worker, key.fileobj)
            messages = worker.receive()
            if messages is None:
                self.bury(worker)
            else:
                self.take(worker, messages)

    def take(self, worker: Worker, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if worker.ready:
                self.verdicts[worker.tasks.popleft()] = message["verdict"]
            worker.ready = True
        if messages and messages[-1]["retire"]:
            self.replace(worker)
        else:
            self.give(worker)

    def bury(self, worker: Worker) -> None:
        culprit = worker.tasks.popleft() if worker.tasks else None
        status = self.replace(worker)
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts == MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"Reward workers do not start (exit status {status}): `{' '.join(worker.command)}` must work in "
                    "this environment. What they said is above."
                )
        if culprit is not None:
            self.settle(culprit, status)

    def settle(self, task: int, status: int) -> None:
        """Decide on the request that a worker died of."""
        if status == -signal.SIGALRM:
            self.verdicts[task] = {"equal": False, "outcome": "time limit"}
        elif task in self.tried_again:
            self.verdicts[task] = {"equal": False, "outcome": "crash"}
        else:
            self.tried_again.add(task)
            self.waiting.appendleft(task)

    def replace(self, worker: Worker) -> int:
        """End a worker, take back what it had, and start another. Returns its exit status."""
        self.selector.unregister(worker)
        self.pool.workers.remove(worker)
        self.waiting.extendleft(reversed(worker.tasks))
        status = worker.end()
        self.start()
        return status
