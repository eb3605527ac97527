"""`luffy-trl compare`: several methods on the same data, from the same base, for as many steps or tokens."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from trl import ModelConfig

from ..comparing import ComparisonError
from ..comparing.methods import chosen, known_methods
from ..comparing.plan import Plan, PlannedRun, Recipe, TestSet, field_names
from ..comparing.results import Measured, chosen_rates, result, table, write
from ..comparing.stages import GREEDY, SAMPLED, USAGE_STATUS, Commands, Processes, StageError
from ..runs.lock import alone_in
from ..runs.written import ENVIRONMENT, written_fields
from .comparable import (
    HELD_OUT,
    StageArguments,
    as_fields,
    check_data,
    check_fields,
    check_flags,
    parsed_stage,
    read_test_sets,
    taken_budget,
)
from .inputs import EMBEDDED_TASK, LuffyScriptArguments, base_model, load_dataset_splits
from .sft import LuffySFTConfig


WAYS = (SAMPLED, GREEDY)


def main(argv: Sequence[str] | None = None, prog: str = "luffy-trl compare") -> None:
    parser = build_parser(prog)
    args, overrides = parser.parse_known_args(argv)
    try:
        with alone_in(_made(args.output_dir)):
            Comparison(args, overrides).run()
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. What was finished is in {args.output_dir}; the same command goes on from there.")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --config RECIPE.yaml --methods NAME ... [--seeds N ...] --output_dir DIR [--FIELD VALUE ...]",
        description="Train and evaluate several methods on the same data from the same base. Flags that are not "
        "listed here are fields of the recipe, for all methods. A comparison that was killed goes on where it was.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, help="the recipe that all methods share, as for train.py")
    add("--methods", nargs="+", required=True, metavar="NAME", help=f"of {', '.join(known_methods())}; or your own")
    add("--methods_file", type=Path, metavar="FILE", help="YAML with methods of your own (docs/compare.md)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="a run of each method for each (default: 0)")
    add("--output_dir", type=Path, required=True, help="a directory a run, results.md, results.json and a report")
    add(
        "--accelerate_config",
        metavar="FILE",
        help="train with `accelerate launch --config_file FILE` (default: one process)",
    )
    add("--workers", type=int, default=1, metavar="N", help="commands at a time (default: 1)")

    amount = parser.add_argument_group("how much, and at what rate")
    add = amount.add_argument
    add(
        "--token_budget", type=int, metavar="N", help="end a run after so many tokens (default: after max_steps alone)"
    )
    add(
        "--learning_rates",
        nargs="+",
        type=float,
        metavar="X",
        help="choose each method's own among these (default: the recipe's for all)",
    )
    add("--rate_seeds", nargs="+", type=int, metavar="N", help="seeds by which rates are chosen, none of --seeds")

    tests = parser.add_argument_group("evaluation, by luffy-trl eval")
    add = tests.add_argument
    add("--test_sets", nargs="+", default=[], metavar="NAME=DATA", help=f"beside {HELD_OUT}, the recipe's test split")
    add("--answers", nargs="+", choices=WAYS, default=list(WAYS), help="default: both")
    add("--n_samples", type=int, default=1, metavar="K", help="sampled answers a problem (default: 1)")
    add("--eval_args", default="", metavar="FLAGS", help="more flags of luffy-trl eval, in quotes: '--backend vllm'")
    return parser


class Comparison:
    """Everything a user can get wrong is checked when it is made, before a run.

    Raises:
        ValueError: naming the flag, the method or the field.
    """

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str]):
        check_flags(args)
        self.args = args
        self.methods = chosen(args.methods, known_methods(args.methods_file))
        recipe = written_fields(args.config) | as_fields(overrides)
        os.environ.update(recipe.pop(ENVIRONMENT, None) or {})  # for all commands; it may hold secrets
        for name in ("output_dir", "seed"):
            recipe.pop(name, None)
        check_fields(recipe)
        for method in self.methods:
            for number, stage in enumerate(method.stages, start=1):
                check_fields(stage.fields, f"{method.name}, stage {number}: ")
        budget = taken_budget(recipe, args.token_budget)
        recipe, base, tests = self._prepared(recipe)
        sft_fields = field_names(LuffyScriptArguments, LuffySFTConfig, ModelConfig)
        self.plan = Plan(recipe, base, args.output_dir, budget, sft_fields)
        evaluate = args.eval_args.split()
        self.commands = Commands(self.plan, tests, args.answers, args.accelerate_config, evaluate, args.n_samples)
        check_data(recipe, self._stages())

    def _prepared(self, recipe: Recipe) -> tuple[Recipe, str, list[TestSet]]:
        """The recipe, its base and its test sets; the embedded task's base and data are made once for all runs."""
        args, base, dataset = self.args, recipe.get("model_name_or_path"), recipe.get("dataset_name")
        is_embedded = dataset in (None, EMBEDDED_TASK)
        if base is None and not is_embedded:
            raise ComparisonError("model_name_or_path must be in the recipe, or a flag: the base of all methods.")
        if base is not None and dataset is None:
            raise ComparisonError(f"dataset_name must be in the recipe, or a flag: what is {base} to be trained on?")
        if is_embedded:
            data = args.output_dir / "data"
            if not (data / "dataset_dict.json").is_file():
                splits = load_dataset_splits(EMBEDDED_TASK, LuffyScriptArguments(), seed=0)
                DatasetDict(splits).save_to_disk(str(data))
            rewards = recipe.get("reward_funcs") or ["letter_walk_reward"]
            recipe = recipe | {"dataset_name": str(data), "reward_funcs": rewards}
        base = base_model(base, str(args.output_dir), seed=0)
        tests = [TestSet(HELD_OUT, str(recipe["dataset_name"]), recipe.get("dataset_test_split"))]
        return recipe, str(base), tests + read_test_sets(args.test_sets)

    def _stages(self) -> list[StageArguments]:
        """Those that differ in more than what an earlier stage hands on, of the first seed."""
        found: dict[str, StageArguments] = {}
        for run in self.plan.runs(self.methods, [self.args.seeds[0]], {}):
            for number, stage in enumerate(run.stages):
                recipe = self.plan.stage_recipe(run, number) | {"model_name_or_path": self.plan.base}
                parsed = parsed_stage(recipe, stage.command, f"{run.name}, stage {number + 1}")
                found.setdefault(f"{stage.command} {dict(stage.fields)}", parsed)
        return list(found.values())

    def run(self) -> None:
        rates: dict[str, float] = {}
        if self.args.learning_rates:
            trials = self.plan.trials(self.methods, self.args.rate_seeds, self.args.learning_rates)
            rates = chosen_rates(self._all(trials, "Choosing rates"), HELD_OUT)
            print(f"Rates: {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}", flush=True)
        results = self._all(self.plan.runs(self.methods, self.args.seeds, rates), "Comparing")
        tests = [test.name for test in self.commands.tests]
        rows = table(results, self.methods, tests, self.args.answers)
        print(f"\n{write(results, rows, self._facts(), self.args.output_dir)}\n")
        print("Right answers in percent, the mean over seeds ± their standard deviation.")
        print(f"Table: {self.args.output_dir / 'results.md'}   Numbers: results.json{self._report()}")

    def _facts(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
        packages = ("luffy_trl", "trl", "transformers", "torch")
        versions = {name: version(name) for name in packages}
        return {"device": device, "versions": versions, "recipe": self.plan.recipe}

    def _report(self) -> str:
        """Write the curves of all runs on one page. Returns where it is, nothing where only the base was evaluated."""
        from .report import MOST_COMPLETIONS, PAGE, report

        runs = self.plan.runs(self.methods, self.args.seeds, {})
        trained = [Path(run.model("")) for run in runs if run.stages]
        if not trained:
            return ""
        folder = self.args.output_dir / "report"
        report(trained, folder, MOST_COMPLETIONS, None)
        return f"   Report: {folder / PAGE}"

    # Runs, several at a time

    def _all(self, runs: Sequence[PlannedRun], what: str) -> list[Measured]:
        todo = [run for run in runs if not self._is_done(run)]
        print(f"{what}: {len(runs)} runs, {len(runs) - len(todo)} of them finished before", flush=True)
        failed: list[str] = []
        processes = Processes()
        with ThreadPoolExecutor(self.args.workers) as pool:
            futures = {pool.submit(self._one, run, processes): run for run in todo}
            try:
                for number, (run, error) in enumerate(_as_they_end(futures), start=1):
                    print(f"{number:>4} of {len(todo)}  {run.key}{'' if error is None else ': failed'}", flush=True)
                    if error is not None:
                        failed.append(f"{run.key}: {error}")
                    if error is not None and error.status == USAGE_STATUS:
                        break
            finally:
                for future in futures:
                    future.cancel()
                processes.stop()
        if failed:
            more = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
            raise ComparisonError(f"{failed[0]}.{more} The same command tries again what failed.")
        return [result(run, self.commands) for run in runs]

    def _is_done(self, run: PlannedRun) -> bool:
        return all(step.took() is not None for step in self.commands.steps(run))

    def _one(self, run: PlannedRun, processes: Processes) -> None:
        for step in self.commands.steps(run):
            if step.took() is None:
                processes.run(step)


def _as_they_end(futures: Mapping[Future, PlannedRun]) -> Iterator[tuple[PlannedRun, StageError | None]]:
    """Runs with what they failed of. Waits in short turns, so that Ctrl-C is heard."""
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in ended:
            error = future.exception()
            if error is not None and not isinstance(error, StageError):
                raise error
            yield futures[future], error


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory
