"""The command `luffy-trl`. Heavy imports wait until a command needs them."""

import argparse
import atexit
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ..runs.quiet import quiet_libraries, quiet_progress_bars


# name: (module beside this one, function of (argv, prog) there, what it does)
COMMANDS = {
    "train": ("cli", "train", "train a model (the same as `accelerate launch train.py`, on one process)"),
    "sft": ("cli", "sft", "fine-tune on the demonstrations with TRL's SFTTrainer, the baseline"),
    "push": ("push", "main", "push an output directory to the Hub, or what a run could not push"),
    "prepare-model": ("prepare_model", "main", "extend a model's window, and give it a chat template"),
    "prepare-data": ("prepare_data", "main", "filter a dataset, and write it as the trainer reads it"),
    "make-demonstrations": (
        "make_demonstrations",
        "main",
        "have stronger models solve problems; keep what is right",
    ),
    "eval": ("eval", "main", "evaluate a model on the paper's benchmarks, or on problems of your own"),
    "compare": ("compare", "main", "train and evaluate several methods on the same data, one table at the end"),
    "report": ("report", "main", "write one page of curves and completions from runs' output"),
    "env": ("env", "main", "print versions, hardware and configuration, for a bug report"),
    "demo": ("cli", "demo", "compare GRPO, LUFFY and SFT on the embedded task, on a CPU"),
}


FLAG = re.compile(r"--[A-Za-z][\w-]*")
# What a shell reports for a process that Ctrl-C ended
INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> None:
    quiet_libraries()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="luffy-trl", description="LUFFY: reinforcement learning with demonstrations in the group, on TRL."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, _, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    command = parser.parse_args(argv[:1]).command
    module, function, _ = COMMANDS[command]
    getattr(import_module(f"{__package__}.{module}"), function)(underscored(argv[1:]), f"luffy-trl {command}")


def underscored(argv: Sequence[str]) -> list[str]:
    """Arguments with the names of flags as help and messages show them: --some-flag is --some_flag. Values stay."""
    flags = argv[: argv.index("--")] if "--" in argv else argv
    shown = []
    for argument in flags:
        name, equals, value = argument.partition("=")
        shown.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if FLAG.fullmatch(name) else argument)
    return [*shown, *argv[len(flags) :]]


# model: steps and output_dir, unless others are given
DEMOS = {"letter_walk": (100, "outputs/demo"), "smollm2": (60, "outputs/demo-lm")}


def demo(argv: Sequence[str], prog: str) -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compare GRPO, LUFFY and SFT on the embedded task; or train a real model, and read its answers.",
    )
    add = parser.add_argument
    add("--model", choices=DEMOS, default="letter_walk", help="the embedded task's, a minute (default), or SmolLM2's "
        "135M parameters, some ten minutes")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data, the runs and the embedded task's base (default: 0)")
    add("--steps", type=int, help="optimizer steps of RL (default: 100; smollm2: 60)")
    add("--output_dir", help="default: outputs/demo; smollm2: outputs/demo-lm")
    args = parser.parse_args(argv)
    default_steps, default_dir = DEMOS[args.model]
    steps, output_dir = args.steps if args.steps is not None else default_steps, args.output_dir or default_dir
    if steps < 1:
        parser.error(f"--steps {steps} must be 1 or more")
    try:
        from .demo import run_demo
        from .demo_lm import run_lm_demo
        from .inputs import UsageError

        (run_demo if args.model == "letter_walk" else run_lm_demo)(output_dir, seed=args.seed, steps=steps)
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. What was finished, if anything, is in {output_dir}")
    except UsageError as error:
        parser.error(str(error))


def _interruptible(function: Callable) -> Callable:
    """Ctrl-C ends the command with one line, while libraries are being imported too."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            print(f"\nInterrupted {interrupt or 'before the training began'}.", file=sys.stderr)
            sys.exit(INTERRUPTED_STATUS)

    return wrapper


@_interruptible
def train(argv: Sequence[str] | None = None, prog: str = "train.py") -> None:
    quiet_libraries()
    from ..config import LuffyConfig
    from .inputs import check_arguments
    from .train import run

    _start(argv, prog, "Train a model with LUFFY.", LuffyConfig, check_arguments, run)


@_interruptible
def sft(argv: Sequence[str] | None, prog: str) -> None:
    from .sft import LuffySFTConfig, check_sft_arguments, run_sft

    _start(argv, prog, "Fine-tune a model on the demonstrations.", LuffySFTConfig, check_sft_arguments, run_sft)


def _start(
    argv: Sequence[str] | None, prog: str, summary: str, config_class: type, check: Callable, run: Callable
) -> None:
    """Parse TRL-style arguments, `--config FILE.yaml` and a flag for every field, and run the training."""
    from ..runs.stopping import STOPPED_STATUS, RunStopped
    from .inputs import UsageError

    quiet_progress_bars()
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    try:
        trainer = run(*_parse(argv, prog, summary, config_class, check))
    except UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as stopped:
        print(f"\n{stopped} The same command with --resume_from_checkpoint auto goes on from there.", file=sys.stderr)
        _end(STOPPED_STATUS)
    trainer.accelerator.end_training()
    _end(0)


def _end(status: int) -> None:
    """End this process with the status; one of several without taking the interpreter apart.

    Threads of gloo now and then abort an interpreter that shuts down. The launcher would take that for a failed run,
    and kill the main process, which may be in the middle of its last upload.
    """
    from accelerate import PartialState

    if PartialState().num_processes > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status != 0:
        sys.exit(status)


def _parse(argv: list[str], prog: str, summary: str, config_class: type, check: Callable) -> tuple[Any, Any, Any, str]:
    from trl import ModelConfig, TrlParser

    from ..runs.recipe import shown_command
    from ..runs.redaction import known_secrets
    from .inputs import LuffyScriptArguments, check_output_dir
    from .packages import check_launcher
    from .recipes import apply_recipe

    parser = TrlParser(
        (LuffyScriptArguments, config_class, ModelConfig),
        prog=prog,
        usage=f"{prog} [--config RECIPE.yaml] [--FIELD VALUE ...]",
        description=f"{summary} Flags override the recipe; --help lists every field.",
        allow_abbrev=False,
    )
    for action in parser._actions:  # the other spelling is understood, and not shown
        action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    if argv[-1:] == ["--config"]:
        parser.error("--config needs a file: --config recipes/letter_walk.yaml")
    # Before the config is built, whose first complaint would be about something else
    config = argv.index("--config") if "--config" in argv else len(argv)
    _, unknown = parser.parse_known_args(argv[:config] + argv[config + 2 :])
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = [match for flag in unknown for match in difflib.get_close_matches(flag.split("=")[0], known, n=1)]
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    try:
        check_launcher()
        if "--config" in argv:
            apply_recipe(parser, argv[config + 1])
        arguments = argv[:config] + argv[config + 2 :]
        script_args, training_args, model_args = parser.parse_args_into_dataclasses(arguments)
        check(script_args, model_args)
        check_output_dir(training_args.output_dir)
    except (ValueError, OSError, ImportError) as error:
        hint = " Without a GPU, add --use_cpu --bf16 False." if "use_cpu" in str(error) else ""
        parser.error(" ".join(str(error).split()) + hint)
    command = shown_command([*prog.split(), *argv], known_secrets(training_args.hub_token))
    return script_args, training_args, model_args, command
