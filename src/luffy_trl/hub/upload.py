"""Pushing an output directory to the Hub, from what is on disk alone: which files, and where to.

A [`Push`] says what goes where, and can be kept for later as JSON. Nothing here knows of a trainer.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..reporting.logs import COMPLETIONS
from ..runs.hub_client import bound_silence
from ..runs.redaction import holds_secret, known_secrets
from .card import CARD, CURVES, card_for_hub, completions_card
from .errors import SourceGoneError, with_retries
from .files import REPLACED_TOGETHER, check_weights, files_below, is_pushed, local_base
from .merging import merged


MODEL = "."  # a push's source: the model in the output directory itself


@dataclass(frozen=True)
class Push:
    """What goes where.

    Attributes:
        source: `"."` the model in the output directory, `"checkpoint-10"`, or `"completions"`.
        repo_id: with or without its owner, who is the token's if not given.
        revision: a branch, which is created; None is the main one.
        folder: in the repository, `""` for its top.
        states: with the optimizer's, scheduler's and RNGs' states.
        merge: an adapter merged into its base.
        private: whether a repository that has to be created is; None follows the owner's default.
    """

    source: str
    repo_id: str
    revision: str | None = None
    folder: str = ""
    states: bool = False
    merge: bool = False
    private: bool | None = None
    message: str = "Upload with luffy-trl"

    @property
    def repo_type(self) -> str:
        return "dataset" if self.source == COMPLETIONS else "model"

    def __str__(self) -> str:
        what = {MODEL: "the model", COMPLETIONS: "the completions"}.get(self.source, self.source)
        where = self.repo_id + (f"@{self.revision}" if self.revision else "")
        merged = " (merged)" if self.merge else " (with its optimizer states)" if self.states else ""
        return f"{what}{merged} to {where}{f'/{self.folder}' if self.folder else ''}"


def push_of(fields: Mapping[str, Any]) -> Push:
    """The push that was kept as its fields. Raises ValueError or TypeError if they are not such."""
    push = Push(**fields)
    wrong = [name for name, kind in get_type_hints(Push).items() if not isinstance(getattr(push, name), kind)]
    # Nothing outside the output directory
    if wrong or not (push.source in (MODEL, COMPLETIONS) or re.fullmatch(r"checkpoint-\d+", push.source)):
        raise ValueError(f"no push: {', '.join(wrong) or 'source'}")
    return push


@dataclass(frozen=True)
class Uploaded:
    repo_id: str
    url: str
    commit: CommitInfo
    files: list[str]
    notes: list[str]  # sentences that the person should read
    is_new: bool  # False: all of it was there already


# Once


def push_once_or_again(
    api: HfApi,
    output_dir: Path,
    push: Push,
    directory: Path | None = None,
    seconds: float = 0.0,
    say: Callable[[str], None] = lambda message: None,
    sleep: Callable[[float], bool | None] = time.sleep,
) -> Uploaded:
    """Create the repository and the branch where they are missing, and make one commit of what differs.

    Args:
        directory: where the files of `push.source` lie, if not in `output_dir`.
        seconds: for how long failures that may pass are tried again (see `with_retries`).

    Raises:
        PushError: if it was not pushed.
    """
    directory = output_dir / push.source if directory is None else directory
    if not directory.is_dir():
        raise SourceGoneError(f"{directory} is no longer on disk (save_total_limit removes old checkpoints)")
    if push.merge:
        with merged(directory, output_dir) as whole:
            return with_retries(lambda: upload(api, output_dir, push, whole), seconds, say, sleep)
    return with_retries(lambda: upload(api, output_dir, push, directory), seconds, say, sleep)


def upload(api: HfApi, output_dir: Path, push: Push, directory: Path) -> Uploaded:
    """One attempt. Raises PushError, or whatever the Hub's client raises."""
    bound_silence()
    secrets = known_secrets(api.token if isinstance(api.token, str) else None)
    files, left_out = files_of(output_dir, push, directory, secrets)
    kind = push.repo_type
    repo_id = api.create_repo(push.repo_id, private=push.private, repo_type=kind, exist_ok=True).repo_id
    if push.revision:
        api.create_branch(repo_id, branch=push.revision, repo_type=kind, exist_ok=True)
    before = api.repo_info(repo_id, revision=push.revision, repo_type=kind).sha
    there = api.list_repo_files(repo_id, revision=push.revision, repo_type=kind)

    if push.source == COMPLETIONS:
        files[CARD] = completions_card(repo_id)
    elif CARD in files and not push.folder:
        files[CARD] = card_for_hub(output_dir, repo_id, merged=push.merge)
    prefix = f"{push.folder}/" if push.folder else ""
    added = {prefix + name: content for name, content in files.items()}
    stale = [name for name in _replaced(push, there) if name not in added]
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in added.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=push.message,
        revision=push.revision,
        repo_type=kind,
    )
    notes = [f"{name} was left out: a token, key or password of this machine stands in it." for name in left_out]
    if push.source == MODEL and (base := local_base(directory)) is not None:
        notes.append(f"The adapter's base is the local directory {base}, which others do not have: see --merge.")
    url = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    return Uploaded(repo_id, url, commit, sorted(added), notes, is_new=commit.oid != before)


def _replaced(push: Push, there: list[str]) -> list[str]:
    """Files of the branch that must not stay beside the new ones."""
    if push.repo_type == "dataset":
        return []
    if push.folder:
        return [name for name in there if name.startswith(f"{push.folder}/")]
    if push.source != MODEL and push.revision == branch_of(push.source):  # a checkpoint's own branch: nothing else
        return [name for name in there if name != ".gitattributes"]
    return [name for name in there if any(fnmatch(name, pattern) for pattern in REPLACED_TOGETHER)]


def branch_of(checkpoint: str) -> str:
    """`"checkpoint-10"` is pushed as the branch `"step-10"`."""
    return f"step-{checkpoint.removeprefix('checkpoint-')}"


# Which files


def files_of(
    output_dir: Path, push: Push, directory: Path, secrets: set[str]
) -> tuple[dict[str, Path | bytes], list[str]]:
    """Name in the repository -> file, and the names of those left out because a secret stands in them.

    Raises:
        PushError: if there is no model, or an empty one.
    """
    if push.source == COMPLETIONS:
        files: dict[str, Path | bytes] = {path.name: path for path in sorted(directory.glob("*.parquet"))}
        if not files:
            raise SourceGoneError(f"{directory} holds no completions")
        return files | {CARD: b""}, []
    check_weights(directory)
    found = {name: path for name, path in files_below(directory) if is_pushed(name, push.states)}
    if not push.folder:  # the top of a branch: with the card and its pictures, which lie in the output directory
        found |= {name: output_dir / name for name in (CARD, CURVES) if (output_dir / name).is_file()}
    left_out = [name for name, path in found.items() if path.suffix != ".safetensors" and holds_secret(path, secrets)]
    return {name: path for name, path in found.items() if name not in left_out}, left_out
