"""`luffy-trl make-demonstrations`: its flags, what about them is wrong before anything is asked, and its ends."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.filters import NGRAM_SIZE
from ..rewards.signatures import FORM
from ..runs.quiet import quiet_progress_bars
from ..runs.stopping import STOPPED_STATUS
from .datasets_out import positive, push_dataset, rows_or_share


WHAT_IT_DOES = (
    "Have stronger models solve a dataset's problems, keep the right solutions as demonstrations, and write them as "
    "the trainer reads them. Every answer is kept: a run that was stopped goes on where it was."
)
DTYPES_OF_WEIGHTS = ("auto", "bfloat16", "float16", "float32")


def main(argv: Sequence[str], prog: str) -> None:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    quiet_progress_bars()
    try:
        from ..runs.lock import alone_in
        from .teachers import check

        check(args)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with alone_in(args.output_dir):
            _make(args, argv)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted before anything was asked.")
    if args.push_to_hub:
        from ..teaching.output import STAY_HERE

        push_dataset(args, "made by luffy-trl make-demonstrations", STAY_HERE)


def _make(args: argparse.Namespace, argv: Sequence[str]) -> None:
    from ..teaching.run import summary
    from ..teaching.servers import ServerGoneError
    from .teachers import making

    made = making(args, argv)
    try:
        account = made.run()
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. {made.asking.kept()} The same command goes on from there.")
    except ServerGoneError as gone:
        print(f"\n{gone} {made.asking.kept()} The same command goes on from there.", file=sys.stderr)
        sys.exit(STOPPED_STATUS)
    print(f"\n{summary(account, sum(server.missed for server in made.servers))}")
    if made.split:
        print(made.split[0].upper() + made.split[1:])
    print(f"Dataset, card and rejected.jsonl: {args.output_dir}")
    if account.solved:
        print(
            f"Train on it with: luffy-trl train --dataset_name {args.output_dir} --reward_funcs "
            f"{' '.join(args.reward_funcs or ['letter_walk_reward'])} ...",
            flush=True,
        )


def build_parser(prog: str) -> argparse.ArgumentParser:
    usage = (
        f"{prog} --dataset_name DATA --teacher_url URL --teacher_model NAME --reward_funcs NAME --output_dir DIR "
        "[--FLAG VALUE ...]"
    )
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=WHAT_IT_DOES, allow_abbrev=False)
    _add_data(parser)
    _add_teachers(parser)
    _add_sampling(parser)
    _add_grading(parser)
    _add_student(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="the dataset, and every answer; goes on there")
    add("--test_size", type=rows_or_share, metavar="N",
        help="problems of a test split, or a share of all, below 1, which no teacher is asked; it shares no problem "
        "with the training split, nor --ngram_size words in a row (default: no test split)")  # fmt: skip
    add("--ngram_size", type=int, default=NGRAM_SIZE, metavar="WORDS", help=f"default: {NGRAM_SIZE}")
    add("--push_to_hub", metavar="REPO_ID", help="also upload the dataset; a new repository is private")
    add("--public", action="store_true", help="make that new repository public")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("problems").add_argument
    add("--dataset_name", required=True, metavar="DATA", help="as for train: a Hub id, a file, a directory")
    add("--dataset_config", metavar="NAME", help="configuration of a Hub dataset that has several")
    add("--dataset_split", default="train", metavar="NAME", help="default: train")
    add("--prompt_column", metavar="NAME", help="the problem: a text or messages; default: found by its name")
    add("--solution_column", metavar="NAME", help="the gold answer; default: found by its name")
    add("--system_prompt", metavar="TEXT", help="before each problem, in place of its own: for teachers and policy")
    add("--teacher_system_prompt", metavar="TEXT", help="for the teachers alone: the dataset keeps its prompts")
    add("--limit", type=positive, metavar="N", help="the first N problems only")


def _add_teachers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("teachers behind an OpenAI-compatible server").add_argument
    add("--teacher_url", nargs="+", default=[], metavar="URL", help="such as http://localhost:8000/v1; several")
    add("--teacher_model", nargs="+", default=[], metavar="NAME", help="what each server calls its model")
    add("--teacher_key_variable", nargs="+", default=[], metavar="VARIABLE",
        help="environment variable with the key; one, or one a server (default: OPENAI_API_KEY)")  # fmt: skip
    add("--concurrency", type=positive, default=32, metavar="N", help="requests at a time, each server (default: 32)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds without a word (default: 600)")
    add("--max_retries", type=int, default=6, metavar="N",
        help="of a request that fails with 429, 5xx, a broken connection or a timeout, with growing pauses "
        "(default: 6)")  # fmt: skip
    add("--extra_body", type=_object, default={}, metavar="JSON",
        help='more fields of a request, such as \'{"top_k": 20}\'; null leaves one of ours out')  # fmt: skip

    add = parser.add_argument_group("teachers in this process").add_argument
    add("--teacher_model_name_or_path", nargs="+", default=[], metavar="MODEL", help="a directory or Hub id; several")
    add("--teacher_backend", choices=("transformers", "vllm"), default="transformers", help="default: transformers")
    add("--batch_size", type=positive, default=8, metavar="N", help="answers at a time, transformers (default: 8)")
    add("--chunk_size", type=positive, default=512, metavar="N",
        help="answers made, then kept, at a time, vllm (default: 512)")  # fmt: skip
    add("--vllm_options", type=_object, default={}, metavar="JSON",
        help='more arguments of vLLM\'s LLM, such as \'{"tensor_parallel_size": 2}\'')  # fmt: skip
    add("--dtype", choices=DTYPES_OF_WEIGHTS, default="auto", help="of local models (default: auto, as saved)")
    add("--device", help="of Transformers models (default: cuda if there is one, else cpu)")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--num_samples", type=positive, default=4, metavar="N", help="answers a problem and teacher (default: 4)")
    add("--temperature", type=float, default=1.0, help="0 is greedy, one answer a problem (default: 1)")
    add("--top_p", type=float, default=1.0, help="default: 1")
    add("--max_tokens", type=positive, default=8192, help="of an answer; a longer one is rejected (default: 8192)")
    add("--seed", type=int, default=0, help="of the sampling, and of the choice of the test split (default: 0)")


def _add_grading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("which answers are right, and which of them are kept").add_argument
    add("--reward_funcs", nargs="+", metavar="NAME", help=f"as for train: names, or the dotted path of {FORM}")
    add("--reward_weights", nargs="+", type=float, metavar="W", help="of their sum (default: 1 each)")
    add("--solved_reward", metavar="NAME", help="as in LuffyConfig: the reward that decides, or total")
    add("--solved_threshold", type=float, default=1.0, help="from what value on an answer is right (default: 1)")
    add("--select", choices=("all", "shortest", "probable"), default="all",
        help="which right answers of a problem: all, the shortest, or the most probable under --student "
        "(default: all)")  # fmt: skip
    add("--max_demonstrations", type=positive, metavar="N",
        help="of a problem, at most (default: no limit with --select all, else 1). With 1 the column is `completion`, "
        "otherwise `demonstrations`")  # fmt: skip


def _add_student(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the policy that will be trained").add_argument
    add("--student", metavar="MODEL", help="a directory or Hub id: answers must fit its chat template and tokens")
    add("--logprobs", action="store_true",
        help="keep the teacher's log-probs as completion_logps, where its tokens are --student's")  # fmt: skip


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object, such as {{"top_k": 20}}')
    return value
