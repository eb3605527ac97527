"""The model card: what TRL's template engine leaves open is filled in here, and once more when the card is pushed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard

from ..reporting.tables_and_curves import plot_curves
from ..runs.recipe import with_values


CARD = "README.md"
CURVES = "curves.png"
EVALUATION = Path("eval") / "results.json"  # of `luffy-trl eval --output_dir OUTPUT_DIR/eval`

NO_ERROR = ("stderr", None)  # of a benchmark of one problem

# Stands for the repository until the card is pushed to one
PLACEHOLDER = "PATH/TO/THIS/DIRECTORY"
EMPTY_LINES = re.compile(r"\n{3,}")
ADAPTER_ONLY = re.compile(r"<!-- adapter -->.*?<!-- /adapter -->\n*", re.DOTALL)

CARD_PANELS = {
    "reward": ("Mean reward", "linear"),
    "entropy": ("Mean entropy of a token", "linear"),
    "prob": ("Mean probability of a token", "linear"),
}

PACKAGES = (
    "luffy_trl", "trl", "transformers", "torch", "datasets", "tokenizers", "accelerate", "peft", "deepspeed", "vllm",
    "bitsandbytes",
)  # fmt: skip


@dataclass
class CardFacts:
    """What only the caller of the trainer knows. Everything is optional.

    Attributes:
        data: a sentence on data that the card cannot link to.
        recipe: YAML that repeats the run.
        command: the command line, without secrets.
        changes: a sentence on each thing that was changed, or asked for in vain, when the run was resumed.
        overruled: fields that a checkpoint has set, whatever was asked for, with their values.
    """

    data: str | None = None
    recipe: str | None = None
    command: str | None = None
    changes: Sequence[str] = ()
    overruled: Mapping[str, Any] = field(default_factory=dict)

    def resumed(self, overruled: Mapping[str, Any], changes: Sequence[str]) -> "CardFacts":
        return replace(self, overruled=overruled, changes=changes)


# In the output directory


def complete_card(
    output_dir: Path,
    facts: CardFacts,
    log_history: Sequence[Mapping[str, float]],
    curves: Mapping[str, str],
    prompting: str,
    is_adapter: bool,
) -> None:
    """Fill in what TRL's call of the template left open, and draw the curves beside it.

    Args:
        log_history: of the trainer's state.
        curves: name of each curve -> what the names of its metrics begin with in the log.
        prompting: Python lines that go from `tokenizer` and `model` to a completion.
    """
    path = output_dir / CARD
    text = path.read_text(encoding="utf-8")
    picture = f"## Curves\n\n![Reward, entropy and probability over the optimizer steps]({CURVES})"
    sections = {
        "data": f" {facts.data}" if facts.data else "",
        "prompting": prompting,
        "curves": picture if draw_curves(output_dir / CURVES, log_history, curves) else "",
        "recipe": recipe_section(facts),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    for name, section in sections.items():
        text = text.replace(f"<!-- {name} -->", section)
    if not is_adapter:
        text = ADAPTER_ONLY.sub("", text)
    card = ModelCard(EMPTY_LINES.sub("\n\n", text))
    if is_adapter:
        card.data["library_name"] = "peft"
    card.save(path)


def draw_curves(path: Path, log_history: Sequence[Mapping[str, float]], prefixes: Mapping[str, str]) -> bool:
    """What was logged over the steps, one picture. False, and no picture, without two points."""
    logged = [line for line in log_history if any(f"{prefix}entropy" in line for prefix in prefixes.values())]
    if len(logged) < 2:
        return False
    curves = {}
    for name, prefix in prefixes.items():
        values = {metric: [line.get(f"{prefix}{metric}", math.nan) for line in logged] for metric in CARD_PANELS}
        if not all(math.isnan(value) for value in values["entropy"]):
            curves[name] = {"step": [line["step"] for line in logged], **values}
    plot_curves(path, curves, CARD_PANELS, f"{' and '.join(prefixes).capitalize()} during training")
    return True


def recipe_section(facts: CardFacts) -> str:
    parts = []
    if facts.recipe:
        recipe = with_values(facts.recipe, facts.overruled) if facts.overruled else facts.recipe
        parts.append(
            "With this as `recipe.yaml`, `train.py --config recipe.yaml` repeats the run (of a path on the machine it "
            f"ran on only the last name is given):\n\n```yaml\n{recipe.strip()}\n```"
        )
    if facts.command:
        parts.append(f"The command was\n\n```bash\n{facts.command}\n```")
    if facts.changes:
        lines = "\n".join(f"- {change}" for change in facts.changes)
        parts.append(f"The run was resumed with something changed, and no single command repeats it:\n\n{lines}")
    return "\n\n".join(parts)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional one
            continue
    return found


def prompting(prompt: Any, template_options: Mapping[str, Any], max_new_tokens: int, temperature: float) -> str:
    """Python lines for the card, after the kind of a training prompt: a system message is kept, nothing else of it.

    Args:
        prompt: a row's `prompt`, text or messages.
        template_options: what else the chat template was given.
    """
    if isinstance(prompt, list):
        system = [message for message in prompt if message["role"] in ("system", "developer")]
        messages = [*system, {"role": "user", "content": "YOUR QUESTION"}]
        options = "".join(f", {name}={value!r}" for name, value in template_options.items())
        make = (
            f"messages = {messages!r}\n"
            "inputs = tokenizer.apply_chat_template(\n"
            f'    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{options}\n'
            ")"
        )
    else:
        make = 'inputs = tokenizer("TEXT IN THE FORM OF THE TRAINING PROMPTS", return_tensors="pt")'
    return (
        f"{make}\n"
        f"output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=True, "
        f"temperature={temperature})\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].size(1) :], skip_special_tokens=True))'
    )


# On the Hub


def card_for_hub(output_dir: Path, repo_id: str, merged: bool) -> bytes:
    """The directory's card as it is pushed: with the repository's name and the results of an evaluation, if any.

    Raises:
        ValueError: if the results cannot be read.
    """
    text = (output_dir / CARD).read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
    results = read_results(output_dir / EVALUATION)
    text = text.replace("<!-- evaluation -->", evaluation_section(results))
    if merged:
        text = ADAPTER_ONLY.sub("", text)
    card = ModelCard(EMPTY_LINES.sub("\n\n", text))
    if merged:
        card.data["library_name"] = "transformers"
    if results:
        card.data["model_name"] = card.data.get("model_name") or repo_id.split("/")[-1]
        card.data["eval_results"] = index_entries(results)
    return str(card).encode()


def index_entries(results: Mapping[str, Mapping[str, Any]]) -> list[EvalResult]:
    """The results of `read_results` as the card's `model-index` holds them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type="accuracy",
            metric_name=f"accuracy, percent, mean of {result['samples']} samples a problem",
            metric_value=round(100 * result["score"], 2),
        )
        for task, result in results.items()
    ]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> its `score` (0 to 1), `stderr`, `problems`, `samples`; empty without an evaluation."""
    if not path.is_file():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        results = {
            task: {key: result[key] for key in ("score", "stderr", "problems", "samples")}
            for task, result in tasks.items()
        }
        for result in results.values():
            if not all(isinstance(value, int | float) for key, value in result.items() if (key, value) != NO_ERROR):
                raise TypeError(f"{result} are not all numbers")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the results of `luffy-trl eval`: {error!r}") from error
    return results


def evaluation_section(results: Mapping[str, Mapping[str, Any]]) -> str:
    if not results:
        return ""
    lines = ["## Evaluation", "", "| benchmark | accuracy, % | problems | samples each |", "| --- | --- | --- | --- |"]
    for task, result in results.items():
        error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
        lines.append(f"| {task} | {100 * result['score']:.1f}{error} | {result['problems']} | {result['samples']} |")
    return "\n".join([*lines, "", "± is one standard error over problems."])


def completions_card(repo_id: str) -> bytes:
    """TRL's card for a dataset of logged completions."""
    card = DatasetCard.from_template(
        DatasetCardData(pretty_name="Completions of a training run", tags=["trl", "trl-logs", "completions"]),
        template_path=str(files("trl") / "templates" / "completions_dataset_card.md"),
        repo_id=repo_id,
    )
    return str(card).encode()
