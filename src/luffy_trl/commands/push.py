"""`luffy-trl push OUTPUT_DIR`: push what a run left on disk, and what it could not push itself."""

import argparse
import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from ..hub.errors import PushError, SourceGoneError, explain
from ..hub.files import has_weights, is_pushed
from ..hub.merging import check_adapter, write_merged
from ..hub.queue import Record, same_place
from ..hub.upload import MODEL, Push, Uploaded, branch_of, push_once_or_again
from ..runs.checkpoints import checkpoints, damage


EPILOG = (
    "It needs a token that may write: `hf auth login`, or HF_TOKEN. Pushing again pushes only what differs. Optimizer "
    "states are pushed only where a run with hub_strategy checkpoint or all_checkpoints could not. With --merge --to "
    "nothing is pushed, and no token needed."
)


def main(argv: Sequence[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, description="Push an output directory to the Hub.", epilog=EPILOG
    )
    parser.add_argument("output_dir", type=Path, help="of a finished or interrupted run")
    parser.add_argument("--repo_id", help="OWNER/NAME or NAME; default: the run's, or the directory's name")
    parser.add_argument("--revision", help="branch to push to; default: the run's, or main")
    parser.add_argument("--private", action="store_true", help="if the repository has to be created")
    parser.add_argument("--checkpoint", metavar="N|all", help="push checkpoint N as the branch step-N, or all of them")
    parser.add_argument("--tag", help="name what was pushed")
    parser.add_argument("--merge", action="store_true", help="push the adapter merged into its base")
    parser.add_argument(
        "--to", type=Path, metavar="DIRECTORY", help="with --merge: write the merged model there, and push nothing"
    )
    parser.add_argument(
        "--retry_seconds", type=float, default=300.0, help="how long lost connections are tried again (default: 300)"
    )
    args = parser.parse_args(argv)
    try:
        check(args)
        record = Record(args.output_dir) if args.to is None else None
        asked = pushes_asked_for(args, record)
        if args.merge:
            check_merges(args.output_dir, asked)
    except ValueError as error:
        parser.error(str(error))
    # Its own words are "HTTP Error 500 thrown while ...", for each attempt
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        if record is None:
            write_there(args, asked[0], prog)
            return
        problems = push_all(args, record, asked)
    except KeyboardInterrupt:
        again = "Run the same command again: what was pushed is not pushed twice."
        sys.exit(f"\nInterrupted. {'Nothing was written.' if record is None else again}")
    if problems:
        sys.exit(f"{prog}: error: {len(problems)} not done, see above. {what_to_do(problems)}")


def what_to_do(problems: Sequence[PushError]) -> str:
    """What the person can do about what was not pushed, which depends on whether it may pass by itself."""
    passing = sum(problem.passes for problem in problems)
    if passing == len(problems):
        return "Run the same command again later."
    if passing == 0:
        return "It will not pass by itself: put right what is said there."
    return f"Run the same command again later for {passing} of them; the others will not pass by themselves."


def write_there(args: argparse.Namespace, push: Push, prog: str) -> None:
    """Write the merged model to `args.to`, all of it or nothing."""
    try:
        write_merged(args.output_dir / push.source, args.output_dir, args.to)
    except Exception as error:  # of the adapter, its base, or the disk: nothing was written
        again = " Run the same command again later." if explain(error).passes else ""
        sys.exit(f"{prog}: error: {args.to} was not written: {explain(error)}.{again}")
    names = ", ".join(path.relative_to(args.to).as_posix() for path in sorted(args.to.rglob("*")) if path.is_file())
    print(f"Wrote {'the model' if push.source == MODEL else push.source} (merged) to {args.to}: {names}")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that cannot work."""
    if not args.output_dir.is_dir():
        raise ValueError(f"{args.output_dir}: there is no such directory.")
    if args.checkpoint not in (None, "all") and not args.checkpoint.isdigit():
        raise ValueError(f"--checkpoint {args.checkpoint} is neither a step nor 'all'.")
    if args.checkpoint == "all" and (args.revision or args.tag):
        name = "revision" if args.revision else "tag"
        raise ValueError(f"--{name} names one push, and --checkpoint all makes several. Give one --checkpoint N.")
    if args.to is not None:
        check_target(args)
    if not 0 <= args.retry_seconds < math.inf:
        raise ValueError(f"--retry_seconds {args.retry_seconds} must be 0 or more, and have an end.")


def check_target(args: argparse.Namespace) -> None:
    """Raises ValueError if the merged model cannot be written to `args.to`, or something else is asked for."""
    if not args.merge:
        raise ValueError(f"--to {args.to} is where --merge writes the merged model. Give both, or neither.")
    for name in ("repo_id", "revision", "private", "tag"):
        if getattr(args, name):
            raise ValueError(f"--{name} is of a push, and with --to nothing is pushed. Leave one of them out.")
    if args.checkpoint == "all":
        raise ValueError(f"--to {args.to} takes one model, and --checkpoint all makes several. Give --checkpoint N.")
    if os.path.lexists(args.to):
        raise ValueError(f"--to {args.to} exists. Choose another directory, or remove it.")
    target, output_dir = args.to.resolve(), args.output_dir.resolve()
    if target.is_relative_to(output_dir) and is_pushed((target / "x").relative_to(output_dir).as_posix()):
        raise ValueError(
            f"--to {args.to} lies in {args.output_dir}, so that later pushes would take it along. Choose a directory "
            "elsewhere."
        )


def check_merges(output_dir: Path, pushes: Sequence[Push]) -> None:
    """Raises ValueError for a push of a merged model where there is no adapter to merge."""
    for push in pushes:
        if push.merge and (output_dir / push.source).is_dir():
            try:
                check_adapter(output_dir / push.source)
            except PushError as error:
                raise ValueError(f"--merge: {error}. Without --merge it is pushed as it is.") from error


def complete_checkpoints(output_dir: Path) -> list[str]:
    """Names of the whole checkpoints, oldest first."""
    return [path.name for path in reversed(checkpoints(output_dir)) if damage(path) is None]


def pushes_asked_for(args: argparse.Namespace, record: Record | None) -> list[Push]:
    """The model, or the checkpoints that were named, and, without any choice, all that the run could not push.

    Args:
        record: None where nothing is to be pushed.

    Raises:
        ValueError: if there is nothing to push.
    """
    run = (record and record.model) or Push(MODEL, args.output_dir.absolute().name)
    base = dataclasses.replace(
        run,
        repo_id=args.repo_id or run.repo_id,
        revision=args.revision or run.revision,
        private=True if args.private else run.private,
        merge=args.merge or run.merge,
    )
    known = complete_checkpoints(args.output_dir)
    if args.checkpoint:
        wanted = known if args.checkpoint == "all" else [f"checkpoint-{args.checkpoint}"]
        if not wanted or not set(wanted) <= set(known):
            listed = ", ".join(name.removeprefix("checkpoint-") for name in known) or "none"
            raise ValueError(f"--checkpoint {args.checkpoint}: whole checkpoints in {args.output_dir}: {listed}.")
        return [
            dataclasses.replace(base, source=name, revision=args.revision or branch_of(name), message=f"Upload {name}")
            for name in wanted
        ]
    if not has_weights(args.output_dir) and not known:
        raise ValueError(f"{args.output_dir} holds neither a model nor a whole checkpoint.")
    model = base if has_weights(args.output_dir) else dataclasses.replace(base, source=known[-1])
    if args.repo_id or args.revision or record is None:
        return [model]
    return [model, *(push for push in record.missing if not same_place(push, model))]


def push_all(args: argparse.Namespace, record: Record, pushes: Sequence[Push]) -> list[PushError]:
    """Push one after another, say what happened, and return why the others were not pushed."""
    api = HfApi()
    uploaded: dict[Push, Uploaded] = {}
    problems: list[PushError] = []
    for push in pushes:
        try:
            uploaded[push] = push_once_or_again(
                api, args.output_dir, push, seconds=args.retry_seconds, say=lambda text: print(text, flush=True)
            )
            print(describe(push, uploaded[push]), flush=True)
            forget(record, push)
        except SourceGoneError as error:
            print(f"Cannot be pushed any more: {push}: {error}.", flush=True)
            forget(record, push)
            problems.append(error)
        except Exception as error:  # each is one line; the others are pushed
            print(f"Not pushed: {push}: {explain(error)}.", flush=True)
            problems.append(explain(error))
    if args.tag and pushes[0] in uploaded:
        try:
            tag(api, uploaded[pushes[0]].repo_id, pushes[0].revision or "main", args.tag)
        except Exception as error:
            print(f"Not tagged: {explain(error)}.", flush=True)
            problems.append(explain(error))
    return problems


def describe(push: Push, uploaded: Uploaded) -> str:
    names = ", ".join(uploaded.files)
    state = f"Pushed {push}: {names}" if uploaded.is_new else f"Already there: {push}: {names}"
    return "\n  ".join([state, *uploaded.notes, uploaded.url])


def forget(record: Record, push: Push) -> None:
    """Take the push, and others to its place, from what is missing."""
    left = {other: why for other, why in record.missing.items() if not same_place(other, push)}
    if left == record.missing:
        return
    record.missing = left
    try:
        record.save()
    except OSError as error:
        print(f"{record.path} cannot be written, and still says that this is missing: {explain(error)}.", flush=True)


def tag(api: HfApi, repo_id: str, branch: str, name: str) -> None:
    """Name what the branch holds now. Raises PushError if the name is taken, and whatever the Hub's client raises."""
    refs = api.list_repo_refs(repo_id)
    [head] = [ref.target_commit for ref in refs.branches if ref.name == branch]
    there = {ref.name: ref.target_commit for ref in refs.tags}
    if there.get(name, head) != head:
        raise PushError(f"the tag {name} exists already, for another commit. Choose another name")
    if name not in there:
        api.create_tag(repo_id, tag=name, revision=head)
    print(f"Tagged {repo_id}@{branch} as {name}", flush=True)
