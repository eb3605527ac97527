"""What the commands that write a dataset share: the flags of its push, what about them is wrong, and the push."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.publishing import push


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


def rows_or_share(text: str) -> float:
    """A whole number of rows, or a share below 1."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf") or (size >= 1 and size != int(size)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of rows, or a share above 0 and below 1")
    return size


def check_push(args: argparse.Namespace) -> None:
    """Raises ValueError for a push that could only fail."""
    if args.public and not args.push_to_hub:
        raise ValueError("--public is about the repository of --push_to_hub, which is missing.")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise ValueError(f"--push_to_hub {args.push_to_hub}: {error}") from error
        if get_token() is None:
            raise ValueError("--push_to_hub needs an account: log in with `hf auth login`, or set HF_TOKEN.")


def push_dataset(args: argparse.Namespace, made_by: str, left_out: Sequence[str] = ()) -> None:
    """Push what is in the output directory; where that fails, say how to push it again.

    Args:
        made_by: for the commit's message.
        left_out: patterns of files that stay here.
    """
    kept = f"The dataset is complete in {args.output_dir}; push it again with: {_push_command(args, left_out)}"
    print(f"Pushing to {args.push_to_hub} ...", flush=True)
    try:
        url = push(args.output_dir, args.push_to_hub, not args.public, made_by, left_out)
        print(f"Pushed to {url}")
    except ValueError as error:
        sys.exit(f"{error} {kept}")
    except KeyboardInterrupt:
        sys.exit(f"\nThe push was interrupted. {kept}")


def _push_command(args: argparse.Namespace, left_out: Sequence[str]) -> str:
    visibility = [] if args.public else ["--private"]
    excluded = [part for pattern in left_out for part in ("--exclude", pattern)]
    return shlex.join(
        ["hf", "upload", args.push_to_hub, str(args.output_dir), ".", "--repo-type", "dataset", *visibility, *excluded]
    )
