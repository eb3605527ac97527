"""`luffy-trl prepare-data`: its flags, what about them is wrong before anything is loaded, and the push at the end."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.filters import NGRAM_SIZE
from ..data.prepare import prepare
from ..data.writing import check_output, finish_killed
from ..rewards.completions import THOUGHT_MODES
from .datasets_out import check_push, positive, push_dataset, rows_or_share


def main(argv: Sequence[str], prog: str) -> None:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        prepare(args, argv)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. Nothing was written to {args.output_dir}")
    if args.push_to_hub:
        push_dataset(args, "prepared by luffy-trl prepare-data")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} SOURCE --output_dir DIRECTORY --tokenizer MODEL [--benchmarks ...] [options]",
        description="Filter a dataset of problems and demonstrations, and write it in the columns that the trainer "
        "reads. Elliott/Openr1-Math-46k-8192, open-r1/OpenR1-Math-220k and copies of them are recognised.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="Hub id, .parquet, .jsonl, .json, .csv, .tsv or .arrow file, or a directory of such files",
    )
    add("--config", help="configuration of a Hub dataset that has several")
    add("--split", default="train", help="default: train")
    add("--streaming", action="store_true", help="read as it is needed, without a download of everything first")
    add("--max_rows", type=positive, metavar="N", help="read the first N rows only")
    add("--num_proc", type=positive, metavar="N", help="processes; default: one per core, fewer for few rows")

    group = parser.add_argument_group("columns of your own (a prompt is a text or messages)")
    group.add_argument("--prompt_column", metavar="NAME")
    group.add_argument("--demonstration_column", metavar="NAME", help="a demonstration, or a list of several")
    group.add_argument("--solution_column", metavar="NAME", help="the gold answer")
    group.add_argument("--conversational", action="store_true", help="make messages of prompts that are texts")

    group = parser.add_argument_group("prompts")
    system = group.add_mutually_exclusive_group()
    system.add_argument(
        "--system_prompt", metavar="TEXT", help="in place of the dataset's own; default: its own stays"
    )
    system.add_argument("--no_system_prompt", action="store_const", const="", dest="system_prompt", help="take it out")

    _add_filters(parser.add_argument_group("filters"))

    group = parser.add_argument_group("splits")
    group.add_argument("--test_size", type=rows_or_share, metavar="N",
                       help="rows of a test split, or a share of all, below 1; it shares no problem with the training "
                       "split, nor --ngram_size words in a row; default: no test split")  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="of the choice of the test split; default: 0")

    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", required=True, type=Path, metavar="DIRECTORY")
    group.add_argument("--overwrite", action="store_true", help="replace what prepare-data wrote there before")
    group.add_argument("--push_to_hub", metavar="REPO_ID", help="also upload it; a new repository is private")
    group.add_argument("--public", action="store_true", help="make that new repository public")
    return parser


def _add_filters(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--benchmarks", nargs="+", default=[], metavar="PATH_OR_HUB_ID",
                       help="drop problems that are in these; default: none, and the result says so")  # fmt: skip
    group.add_argument("--ngram_size", type=int, default=NGRAM_SIZE, metavar="WORDS",
                       help="how many words in a row, shared with a benchmark, count as being in it; 0: whole "
                       f"problems only; default: {NGRAM_SIZE}")  # fmt: skip
    group.add_argument("--tokenizer", metavar="MODEL", help="the model that will be trained, to count tokens")
    group.add_argument("--max_tokens", type=positive, default=8192, metavar="N",
                       help="longest demonstration, EOS included; default: 8192, as in the paper")  # fmt: skip
    group.add_argument("--no_length", action="store_true", help="do not count tokens")
    verify = group.add_mutually_exclusive_group()
    verify.add_argument("--no_verify", action="store_true", help="do not judge demonstrations against the gold answer")
    verify.add_argument("--trust_source", action="store_true", help="take the source's own verdicts (OpenR1)")
    group.add_argument("--thought", choices=THOUGHT_MODES,
                       help="a </think> before the answer is required (default for recognised datasets), optional "
                       "(default for your columns) or unused")  # fmt: skip
    group.add_argument("--no_deduplicate", action="store_true", help="keep problems that are there twice")
    group.add_argument("--max_demonstrations", type=positive, metavar="N",
                       help="of each prompt, the first ones; default: all. With 1 the column is `completion`, "
                       "which SFTTrainer takes too, instead of `demonstrations`")  # fmt: skip

    group.add_argument("--keep_without_demonstration", action="store_true",
                       help="keep problems that have no demonstration, or none left; they come last")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for what can be known to fail before anything is loaded."""
    own = [args.prompt_column, args.demonstration_column, args.solution_column]
    needed = [args.prompt_column, args.solution_column] if args.keep_without_demonstration else own
    if any(own) and not all(needed):
        raise ValueError(
            "--prompt_column, --demonstration_column and --solution_column go together: give all three "
            "(with --keep_without_demonstration the prompt's and the solution's may do)."
        )
    if args.tokenizer is None and not args.no_length:
        raise ValueError("--tokenizer is missing: which model will be trained? (--no_length leaves out the limit.)")
    if args.ngram_size < 0:
        raise ValueError(f"--ngram_size {args.ngram_size} must be 0 or more.")
    for sentence in finish_killed(args.output_dir):
        print(sentence, flush=True)
    check_output(args.output_dir, args.overwrite)
    check_push(args)
