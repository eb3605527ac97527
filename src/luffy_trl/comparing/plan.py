"""From a recipe, methods and seeds to runs: each a directory, and in it a recipe of its own for every stage."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ComparisonError
from .methods import BASE_MODEL, Method, Stage, stage_steps


Recipe = dict[str, Any]
MODEL, MERGED = "model", "merged"  # folders within a stage's: its output, and an adapter's with its base
# Fields of `sft` that a recipe of `train` does not mean: it looks at no reward, and its losses are others
NOT_FOR_SFT = {"reward_funcs", "loss_type"}
DEFAULT_ROWS, DEFAULT_GROUP = 8, 8  # per_device_train_batch_size and num_generations of TRL


@dataclass(frozen=True)
class TestSet:
    """Problems that models are evaluated on; `split` None: that of `luffy-trl eval`."""

    name: str
    dataset: str
    split: str | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One training of a method; BASE_MODEL without stages.

    Attributes:
        learning_rate: None: the recipe's, or the stages' own.
    """

    name: str
    stages: tuple[Stage, ...]
    seed: int
    learning_rate: float | None
    directory: Path

    @property
    def key(self) -> str:
        rate = "" if self.learning_rate is None else f", rate {self.learning_rate:g}"
        return f"{self.name}, seed {self.seed}{rate}" if self.stages else self.name

    def stage_directory(self, number: int) -> Path:
        return self.directory / f"stage-{number + 1}-{self.stages[number].command}"

    def model(self, base: str) -> str:
        """Where the trained model is."""
        return str(self.stage_directory(len(self.stages) - 1) / MODEL) if self.stages else base


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        recipe: fields that all runs share.
        base: the model that all start from.
        token_budget: tokens of a run; None: as many optimizer steps.
        sft_fields: names of the fields that `sft` knows: others of the recipe are `train`'s alone.
    """

    recipe: Recipe
    base: str
    output_dir: Path
    token_budget: int | None
    sft_fields: frozenset[str]

    def runs(self, methods: Sequence[Method], seeds: Sequence[int], rates: Mapping[str, float]) -> list[PlannedRun]:
        """Seed by seed, so that a table is there early.

        Args:
            rates: of the methods whose rate was chosen.
        """
        runs = [PlannedRun(BASE_MODEL, (), 0, None, self.output_dir / "runs" / BASE_MODEL)]
        for seed in seeds:
            for method in methods:
                directory = self.output_dir / "runs" / method.name / f"seed-{seed}"
                runs.append(PlannedRun(method.name, method.stages, seed, rates.get(method.name), directory))
        return runs

    def trials(self, methods: Sequence[Method], seeds: Sequence[int], rates: Sequence[float]) -> list[PlannedRun]:
        """Runs by which a method's rate is chosen."""
        root = self.output_dir / "rates"
        return [
            PlannedRun(method.name, method.stages, seed, rate, root / method.name / f"rate-{rate:g}" / f"seed-{seed}")
            for seed in seeds
            for method in methods
            for rate in rates
        ]

    def stage_recipe(self, run: PlannedRun, number: int) -> Recipe:
        """The recipe of one stage, for `train` or `sft`.

        Raises:
            ComparisonError: if the steps or a batch cannot be shared out.
        """
        stage = run.stages[number]
        recipe = self.recipe | self._amount(run, number)
        if stage.command == "sft":
            recipe = self._for_sft(recipe)
        recipe |= stage.fields
        if run.learning_rate is not None:
            recipe["learning_rate"] = run.learning_rate
        return recipe | {
            "output_dir": str(run.stage_directory(number) / MODEL),
            "seed": run.seed,
            "model_name_or_path": self.start(run, number),
            "resume_from_checkpoint": "auto",
        }

    def start(self, run: PlannedRun, number: int) -> str:
        """The model from which a stage starts: an adapter is merged before."""
        if number == 0:
            return self.base
        return str(run.stage_directory(number - 1) / (MERGED if self.is_adapter(run, number - 1) else MODEL))

    def is_adapter(self, run: PlannedRun, number: int) -> bool:
        """Whether that is what a stage saves."""
        return is_true(self.written(run, number).get("use_peft"))

    def written(self, run: PlannedRun, number: int) -> Recipe:
        """The recipe with the fields of a stage over it, as they were written."""
        return self.recipe | dict(run.stages[number].fields)

    def _amount(self, run: PlannedRun, number: int) -> Recipe:
        """Steps of a stage, and tokens."""
        if self.recipe.get("max_steps", -1) == -1:
            raise ComparisonError(
                "max_steps must be in the recipe, or a flag: methods are compared after as many optimizer steps."
            )
        steps = _count(self.recipe, "max_steps")
        own = stage_steps(run.stages, steps)[number]
        if own < 1:
            raise ComparisonError(f"{run.name}: of max_steps {steps} no step is left for stage {number + 1}.")
        if self.token_budget is None:
            return {"max_steps": own}
        return {"max_steps": own, "token_budget": max(1, round(self.token_budget * run.stages[number].share))}

    def _for_sft(self, recipe: Recipe) -> Recipe:
        """As many demonstrations a step as the others have prompts. What only `train` knows is left out."""
        rows = _count(recipe, "per_device_train_batch_size", DEFAULT_ROWS)
        accumulated = _count(recipe, "gradient_accumulation_steps", 1)
        group = _count(recipe, "num_generations", DEFAULT_GROUP)
        prompts = rows * accumulated // group
        if prompts < 1:
            raise ComparisonError(
                f"A step has {rows * accumulated} rows a process, less than a group of {group}: SFT's would have none."
            )
        at_once = max(size for size in range(1, min(rows, prompts) + 1) if prompts % size == 0)
        batch = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": prompts // at_once}
        known = self.sft_fields - NOT_FOR_SFT
        return {name: value for name, value in recipe.items() if name in known} | batch


def _count(recipe: Recipe, name: str, default: int | None = None) -> int:
    value: Any = recipe.get(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or not number.is_integer():
        raise ComparisonError(f"{name}: {value!r} must be a whole number of 1 or more.")
    return int(number)


def is_true(value: Any) -> bool:
    """Of a field of a recipe, or a flag's text."""
    return str(value).lower() in ("true", "yes", "1", "on")


def field_names(*dataclass_types: type) -> frozenset[str]:
    return frozenset(field.name for of_type in dataclass_types for field in dataclasses.fields(of_type) if field.init)
