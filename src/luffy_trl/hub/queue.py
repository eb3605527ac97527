"""Pushes in the background of a run, and the record of what is not pushed yet, from which it is done later."""

import itertools
import json
import logging
import os
import shlex
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import HfApi

from ..reporting.logs import COMPLETIONS
from .errors import PushError, explain
from .files import check_weights, files_below, is_pushed
from .upload import Push, Uploaded, push_of, push_once_or_again


logger = logging.getLogger(__name__)

RECORD = "_hub.json"  # the underscore keeps it out of pushes
HELD_PREFIX = "_push-"
NOT_YET = "the run ended before"


class Record:
    """`OUTPUT_DIR/_hub.json`: where a run pushes to, and what is not pushed yet, each with the reason.

    Raises:
        ValueError: if what lies there is no such record.
    """

    def __init__(self, output_dir: Path):
        self.path = output_dir / RECORD
        self.model: Push | None = None  # how the run pushes its final model
        self.missing: dict[Push, str] = {}
        if not os.path.lexists(self.path):
            return
        try:
            if not self.path.is_file():  # a pipe, which nobody may ever write to
                raise ValueError("not a file")
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            self.model = push_of(saved["model"]) if saved["model"] else None
            self.missing = {push_of(push): str(why) for push, why in saved["missing"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path} does not say what a run could not push: it is damaged, or not luffy-trl's. Remove it, "
                "and `luffy-trl push` pushes the model as if no run had noted anything."
            ) from error

    def save(self) -> None:
        """Atomic: a run can be killed at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "model": asdict(self.model) if self.model else None,
            "missing": [[asdict(push), why] for push, why in self.missing.items()],
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)


def record_of_run(output_dir: Path) -> Record:
    """The record that a run goes on with. What lies there and is none is set aside: no run ends for it."""
    try:
        return Record(output_dir)
    except ValueError:
        path = output_dir / RECORD
        aside = next(name for i in itertools.count(1) if not (name := output_dir / f"_hub-damaged-{i}.json").exists())
        os.replace(path, aside)
        logger.warning(
            f"{path} does not say what an earlier run could not push: it is damaged, or not luffy-trl's. It is now "
            f"{aside.name}, and this run notes its own pushes anew."
        )
        return Record(output_dir)


def same_place(push: Push, other: Push) -> bool:
    """Whether one takes the other's place on the Hub. A name without its owner is taken for the one with it."""
    owner, _, name = push.repo_id.rpartition("/")
    other_owner, _, other_name = other.repo_id.rpartition("/")
    same_repo = name == other_name and (owner == other_owner or not owner or not other_owner)
    place = (push.repo_type, push.revision or "main", push.folder)
    return same_repo and place == (other.repo_type, other.revision or "main", other.folder)


def what_is_missing(output_dir: Path) -> str | None:
    """One screen on what was not pushed and how to do it, None if nothing is missing."""
    missing = Record(output_dir).missing
    if not missing:
        return None
    lines = [f"  {push}: {why}" for push, why in missing.items()]
    return "\n".join(
        [
            "Not pushed to the Hub:",
            *lines,
            f"This pushes what is in {output_dir}:",
            f"  luffy-trl push {shlex.quote(str(output_dir))}",
        ]
    )


class PushQueue:
    """
    Pushes one after another on a thread of its own. A failure is recorded and never raised: training goes on.

    A newer push to the same place takes the turn of one that waits. The files of a checkpoint are held by hard links
    until they are pushed, for `save_total_limit` may remove the checkpoint before.

    Args:
        retry_seconds: for how long each push is tried again, where its failure may pass.
    """

    def __init__(self, output_dir: Path, api: HfApi, retry_seconds: float):
        self.output_dir, self.api, self.retry_seconds = output_dir, api, retry_seconds
        self._record: Record | None = None
        self.uploaded: dict[Push, Uploaded] = {}
        self._waiting: dict[Push, Path | None] = {}  # push -> where its files are held
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()  # no more waiting between attempts
        self._holds = 0

    @property
    def record(self) -> Record:
        """Read when it is needed first: a run that pushes nothing looks at none."""
        with self._lock:
            if self._record is None:
                self._record = record_of_run(self.output_dir)
            return self._record

    @property
    def is_used(self) -> bool:
        """Whether anything was to be pushed so far."""
        return self._record is not None

    def add(self, push: Push, directory: Path | None = None, keep_all: bool = False) -> None:
        """
        Args:
            directory: whose files are to be pushed as `push.source`; None: as they are in the output directory then.
            keep_all: a newer push does not take this one's turn.
        """
        try:
            held = None if directory is None else self._hold(directory, push)
        except Exception as error:  # a full disk, a model that is not whole: not here does the run end
            logger.warning(f"Not pushed: {push}: {explain(error)}. The run goes on; it is kept for later.")
            self._note({push: str(explain(error))})
            return
        with self._lock:
            if not keep_all:
                for other in [other for other in self._waiting if same_place(other, push)]:
                    _let_go(self._waiting.pop(other))
                for other in [other for other in self.record.missing if same_place(other, push)]:
                    del self.record.missing[other]
            self._waiting[push] = held
            self._note({push: NOT_YET})
        self._start()

    def set_model(self, push: Push) -> None:
        """Record how the model is pushed in the end, for a run that does not come so far."""
        with self._lock:
            self.record.model = push
        self._note()

    def retry(self) -> None:
        """Put what is missing into the queue again."""
        with self._lock:
            self._waiting |= dict.fromkeys(self.record.missing)
        self._start()

    def finish(self) -> None:
        """Wait until all is pushed or failed, with no new attempts once `retry_seconds` are over."""
        deadline = time.monotonic() + self.retry_seconds
        try:
            # A thread that dies has taken one push at least: others take its place, but not for ever
            for _ in range(1 + len(self._waiting)):
                if (thread := self._start()) is None:
                    return
                thread.join(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
                self._hurry.set()
                thread.join()
        finally:
            self._hurry.clear()

    def _start(self) -> threading.Thread | None:
        """The thread that pushes, started if there is something to push. None: nothing is to be waited for."""
        with self._lock:
            if self._thread is not None or not self._waiting:
                return self._thread
            thread = threading.Thread(target=self._work, name="push-to-hub", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left
                logger.warning(f"Nothing is pushed now: {explain(error)}. The run goes on; it is kept for later.")
                return None
            self._thread = thread
            return thread

    def _work(self) -> None:
        try:
            while (due := self._take()) is not None:
                push, held = due
                try:
                    self._push(push, held)
                except BaseException as error:  # whatever it is, it ends neither the run nor the pushes that wait
                    self._note_failure(push, explain(error))
                finally:
                    _let_go(held)
        finally:  # nobody may wait for a thread that has ended
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _take(self) -> tuple[Push, Path | None] | None:
        """The push whose turn it is, and where its files are held. None: all is done, and this thread ends."""
        with self._lock:
            if not self._waiting:
                self._thread = None  # under the lock: what is added from now on starts a thread of its own
                return None
            push = next(iter(self._waiting))
            return push, self._waiting.pop(push)

    def _push(self, push: Push, held: Path | None) -> None:
        seconds = 0.0 if self._hurry.is_set() else self.retry_seconds
        self.uploaded[push] = push_once_or_again(
            self.api, self.output_dir, push, held, seconds,
            say=lambda message: logger.warning(f"Pushing {push}: {message}"), sleep=self._hurry.wait,
        )  # fmt: skip
        for note in self.uploaded[push].notes:
            logger.warning(note)
        self._note(done=push)

    def _note_failure(self, push: Push, problem: PushError) -> None:
        logger.warning(f"Not pushed: {push}: {problem}. The run goes on; it is kept for later.")
        with self._lock:
            replaced = any(same_place(other, push) for other in self._waiting)
            self._note({} if replaced else {push: str(problem)})

    def _note(self, missing: dict[Push, str] | None = None, done: Push | None = None) -> None:
        """Record, and save the record. What a newer push replaces, done or about to come, is not missing."""
        with self._lock:
            self.record.missing |= missing or {}
            if done is not None:
                for other in [other for other in self.record.missing if same_place(other, done)]:
                    if other not in self._waiting:
                        del self.record.missing[other]
            try:
                self.record.save()
            except OSError as error:
                logger.warning(f"{self.record.path} cannot be written: {explain(error)}")

    def _hold(self, directory: Path, push: Push) -> Path:
        """Hard links to the files that are pushed: they cost no space as long as the checkpoint exists."""
        if push.source != COMPLETIONS:
            check_weights(directory)
        self._holds += 1
        held = self.output_dir / f"{HELD_PREFIX}{os.getpid()}-{self._holds}"
        try:
            for name, path in files_below(directory):
                if is_pushed(name, push.states):
                    (held / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(path, held / name)
        except OSError:
            _let_go(held)
            raise
        return held


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)


def _let_go(held: Path | None) -> None:
    if held is not None:
        shutil.rmtree(held, ignore_errors=True)


def remove_held(output_dir: Path) -> None:
    """Remove what a killed run held."""
    for held in output_dir.glob(f"{HELD_PREFIX}*"):
        shutil.rmtree(held, ignore_errors=True)
