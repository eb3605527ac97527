"""`luffy-trl eval`: from a model to the paper's two tables. Heavy imports wait until the arguments are read."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..evaluation import EvaluationError, LeftToOthersError, ScoringError
from ..evaluation.templates import FROM_DATA, OWN, TEMPLATES
from ..hub.errors import PushError
from ..rewards.completions import THOUGHT_MODES


if TYPE_CHECKING:
    from ..evaluation.publishing import Publisher
    from ..evaluation.run import Evaluation

# The paper's sampling
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.6, 1.0, 8192
DTYPES = ("auto", "bfloat16", "float16", "float32")

THOUGHT_HELP = (
    "what is graded: the response after </think>, where there is none nothing (required) or all of it (optional), or "
    "always all of it (unused; default: optional)"
)

DESCRIPTION = (
    "Evaluate a model on the paper's benchmarks, six of mathematics and three out of distribution, or on problems of "
    "your own."
)
# Of the benchmarks alone, and of problems of one's own alone
BENCHMARK_FLAGS = ("tasks", "data_files", "thought")
PROBLEM_FLAGS = (
    "dataset_config", "dataset_split", "reward_funcs", "reward_weights", "solved_reward", "solved_threshold",
)  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str = "luffy-trl eval") -> None:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    try:
        check(args)
        publisher = _publisher(args)
        evaluation = _evaluation(args)
        try:
            print(evaluation.run())
            if publisher is not None:
                print(publisher.publish())
        except LeftToOthersError:
            print(f"{evaluation.kept()} Other processes are at work there: the last of them writes the results.")
        except KeyboardInterrupt:
            sys.exit(f"\nInterrupted. {evaluation.kept()} The same command goes on from there.")
        finally:
            evaluation.close()
    except ScoringError as error:
        if args.processes == 1:
            parser.error(str(error))
        print(error)  # no failure, for which a launcher would kill the one that scores
    except EvaluationError as error:
        parser.error(str(error))
    except PushError as error:
        again = "The same command publishes them, and makes no sample anew."
        sys.exit(f"{prog}: error: the results are in {args.output_dir}, but not on the Hub: {error}. {again}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted before any sample was made.")


def _publisher(args: argparse.Namespace) -> "Publisher | None":
    if args.push_to_hub is None:
        return None
    from ..evaluation.publishing import Publisher

    return Publisher(args)


def _evaluation(args: argparse.Namespace) -> "Evaluation":
    """Everything a user can get wrong is checked here, but for what needs the loaded model."""
    from ..evaluation.launching import stand_alone
    from ..evaluation.loading import model_arguments
    from ..evaluation.run import Evaluation

    args.processes = stand_alone(args.device, args.tensor_parallel_size)
    model_args = model_arguments(args)
    if args.dataset_name is None:
        from ..evaluation.benchmarks import Benchmarks

        return Evaluation(args, model_args, Benchmarks(args), args.processes)
    from .own_problems import load_own_problems

    return Evaluation(args, model_args, load_own_problems(args, model_args), args.processes)


def build_parser(prog: str) -> argparse.ArgumentParser:
    usage = (
        f"{prog} --model MODEL --output_dir DIR [--tasks NAME ...] [--data_files FILE ...] "
        "[--dataset_name DATA --reward_funcs NAME ...] [--FLAG VALUE ...]"
    )
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="Hub id or local directory")
    add("--adapter", metavar="DIR", help="local directory of a LoRA adapter on --model")
    add("--output_dir", required=True, help="samples, results.json and results.md; a killed run goes on from there")
    add("--name", help="of the model in the tables (default: --model's last part)")

    data = parser.add_argument_group("benchmarks")
    add = data.add_argument
    add("--tasks", nargs="+", metavar="NAME", help="tasks or groups (default: both groups, or what the files hold)")
    add("--data_files", nargs="+", metavar="FILE", help="read problems from local files in the original code's schema")
    add("--thought", choices=THOUGHT_MODES, help=THOUGHT_HELP)

    _add_own_problems(parser)
    amount = parser.add_argument_group("how much")
    add = amount.add_argument
    add("--limit", type=int, metavar="N", help="only the first N problems of each set")
    add("--n_samples", type=int, metavar="K",
        help="samples a problem: of your own (default: 1), or where the paper has avg@32 (default: 32)")  # fmt: skip

    add("--k", nargs="+", type=int, default=[], metavar="K", help="also pass@k and maj@k, of all these samples")

    prompt = parser.add_argument_group("prompt and sampling")
    add = prompt.add_argument
    add("--template", choices=TEMPLATES, default=OWN, help="default: own, the model's chat template")
    add("--system_prompt", metavar="TEXT", help=f"with --template own; {FROM_DATA!r}: that of the local files")
    add("--temperature", type=float, default=TEMPERATURE, help=f"0 is greedy, one sample (default: {TEMPERATURE})")
    add("--top_p", type=float, default=TOP_P, help=f"default: {TOP_P}")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help=f"default: {MAX_NEW_TOKENS}")
    add("--seed", type=int, default=0, help="of the sampling (default: 0)")

    backend = parser.add_argument_group("back end")
    add = backend.add_argument
    add(
        "--backend", choices=("hf", "vllm"), default="hf", help="lm-eval's Hugging Face or vLLM back end (default: hf)"
    )
    add("--dtype", choices=DTYPES, default="auto", help="default: auto, that of the saved model")
    add("--batch_size", help="a number or auto (default: 8 for hf, auto for vllm)")
    add("--chunk_size", type=int, help="samples made, then kept, at a time (default: 64 for hf, 2048 for vllm)")
    add("--tensor_parallel_size", type=int, default=1, help="GPUs a model is spread over; vllm only (default: 1)")
    add("--device", help="hf only (default: cuda if there is one, else cpu)")
    add("--model_args", default="", metavar="KEY=VALUE,...", help="more arguments of lm-eval's HFLM or VLLM")

    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="ROWS", help="'paper', or output directories of other evaluations"
    )
    parser.add_argument(
        "--push_to_hub", nargs="?", const="", metavar="REPO",
        help="add the results to this model repository of the Hub (default: --model's)",
    )  # fmt: skip
    return parser


def _add_own_problems(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("problems of your own, in the columns that train.py reads")
    add = own.add_argument
    add(
        "--dataset_name",
        metavar="DATA",
        help="a file, a directory or a Hub id, or letter_walk, the embedded task under --seed",
    )
    add("--dataset_config", metavar="NAME", help="configuration of a Hub dataset that has several")
    add("--dataset_split", metavar="NAME", help="default: test, or the only one")
    add("--reward_funcs", nargs="+", metavar="NAME", help="of train.py, or dotted paths; each gets a column")
    add("--reward_weights", nargs="+", type=float, metavar="W", help="of each in the total (default: 1)")
    add("--solved_reward", metavar="NAME", help="which of them says what is solved, or total (default: as train.py)")
    add("--solved_threshold", type=float, metavar="X", help="from what value of it on (default: 1)")


def check(args: argparse.Namespace) -> None:
    """What can be said without loading anything.

    Raises:
        EvaluationError: naming the flag.
    """
    if find_spec("lm_eval") is None:
        raise EvaluationError("it needs lm-evaluation-harness: pip install 'luffy_trl[eval]'.")
    _check_kind_of_problems(args)
    if args.backend == "vllm" and find_spec("vllm") is None:
        raise EvaluationError("--backend vllm needs vLLM: pip install 'luffy_trl[vllm]'.")
    for flag in ("limit", "n_samples", "max_new_tokens", "chunk_size", "tensor_parallel_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise EvaluationError(f"--{flag} {value} must be 1 or more.")
    if any(k < 1 for k in args.k):
        raise EvaluationError(f"--k {min(args.k)} must be 1 or more.")
    if not args.temperature >= 0:
        raise EvaluationError(f"--temperature {args.temperature} must be 0 or more.")
    if not 0 < args.top_p <= 1:
        raise EvaluationError(f"--top_p {args.top_p} must be above 0 and at most 1.")
    if (
        args.batch_size is not None
        and args.batch_size != "auto"
        and not (args.batch_size.isdecimal() and int(args.batch_size))
    ):
        raise EvaluationError(f"--batch_size {args.batch_size} must be 1 or more, or auto.")
    if args.backend == "hf" and args.tensor_parallel_size > 1:
        raise EvaluationError(
            "--tensor_parallel_size needs --backend vllm. With hf, --model_args parallelize=True spreads the layers."
        )
    if args.backend == "vllm" and args.device is not None:
        raise EvaluationError("--device is hf's: choose vLLM's GPUs with CUDA_VISIBLE_DEVICES.")
    if args.system_prompt is not None and args.template != OWN:
        raise EvaluationError(
            f"--system_prompt cannot be combined with --template {args.template}, which is complete."
        )
    if args.system_prompt == FROM_DATA and args.dataset_name:
        raise EvaluationError("--system_prompt data: the system messages of --dataset_name are always used.")
    if args.system_prompt == FROM_DATA and not args.data_files:
        raise EvaluationError("--system_prompt data needs --data_files, whose prompts have a system message.")


def _check_kind_of_problems(args: argparse.Namespace) -> None:
    flags: tuple[str, ...]
    if args.dataset_name is None:
        flags, says = PROBLEM_FLAGS, "needs --dataset_name, the problems of your own"
    else:
        flags, says = BENCHMARK_FLAGS, "is about the benchmarks, and cannot be combined with --dataset_name"
    for flag in flags:
        if getattr(args, flag) is not None:
            raise EvaluationError(f"--{flag} {says}.")
    args.thought = args.thought or "optional"
