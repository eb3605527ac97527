"""The demo: GRPO, LUFFY and SFT from one base, on the embedded task, on a CPU in about a minute."""

import json
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, logging

from ..comparing.methods import Method, chosen, known_methods
from ..reporting.tables_and_curves import plot_curves, text_table
from ..runs.seeds import check_seed
from ..tasks.letter_walk import MAX_COMPLETION_LENGTH, STEP_BY_STEP, distinct_walks, split_walks, to_dataset
from ..tasks.letter_walk_base import accuracy, load_or_pretrain
from ..tasks.probe import Probe
from .comparison import make_trainer
from .inputs import before_training, check_output_dir
from .report import MOST_COMPLETIONS, PAGE, report


EASIER, TRAINED, HARDER = 3, 5, 7  # letters of a walk
LEARNING_RATE = 1e-4  # of every method; 3e-4 works for RL too, 1e-3 destroys the model
TEST_SIZE = 512
TRAINED_METHODS = ("grpo", "luffy", "sft")
PROBE_SIZE, PROBE_EVERY, LOG_EVERY, PRINT_EVERY = 128, 5, 5, 20
DEMO_PANELS = {
    "reward": ("reward of sampled answers", "linear"),
    "entropy": ("entropy of sampled tokens (nats)", "linear"),
    "demonstration": ("probability of a whole demonstration", "log"),
}
READING = (
    "This shows that on-policy RL stays where it is when no rollout ever earns a reward, while one demonstration in\n"
    "each group is enough for the same trainer to learn; it does not show that LUFFY beats SFT, which is as good and\n"
    "cheaper where, as here, every demonstration is right and there is one right way to answer."
)


def _print_step(name: str, step: int, values: dict[str, float]) -> None:
    if step % PRINT_EVERY == 0:
        print(
            f"     {name:<5}  step {step:>3}   reward {values['reward']:.3f}   entropy {values['entropy']:.3f}   "
            f"demonstration {values['demonstration']:.0e}",
            flush=True,
        )


def run_demo(output_dir: str | Path, seed: int = 0, steps: int = 100) -> dict[str, dict[str, float]]:
    """Pretrain the base (once), train each method, print the table; leaves everything in `output_dir`.

    Returns:
        Per method, the held-out accuracy at each difficulty and the seconds its training took.

    Raises:
        UsageError: a ValueError, for a seed or a directory that cannot be used, before anything is done.
    """
    with before_training():
        check_seed(seed)
        check_output_dir(str(output_dir))
    output_dir = Path(output_dir)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    print(f"1/3  The base: a tiny Qwen2 that can walk step by step, but answers at once (seed {seed})", flush=True)
    base = load_or_pretrain(output_dir / f"base-seed{seed}", seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    splits = split_walks(test_size=TEST_SIZE + PROBE_SIZE, length=TRAINED, seed=seed)
    tests = {
        EASIER: list(islice(distinct_walks(seed, EASIER), TEST_SIZE)),
        TRAINED: splits["test"][:TEST_SIZE],
        HARDER: list(islice(distinct_walks(seed, HARDER), TEST_SIZE)),
    }

    def measure(model: PreTrainedModel) -> dict[str, float]:
        return {f"accuracy_{length}": accuracy(model, tokenizer, walks) for length, walks in tests.items()}

    base_model, curves = AutoModelForCausalLM.from_pretrained(base), {}
    results: dict[str, dict[str, float]] = {"base": measure(base_model)}
    print(
        f"     accuracy {accuracy(base_model, tokenizer, tests[TRAINED], STEP_BY_STEP):.3f} when told to go step by "
        f"step, {results['base'][f'accuracy_{TRAINED}']:.3f} otherwise",
        flush=True,
    )

    print(f"2/3  Training GRPO, LUFFY and SFT from it, {steps} steps each", flush=True)
    for method in chosen(TRAINED_METHODS, known_methods()):
        told = partial(_print_step, method.label)
        callback = Probe(tokenizer, splits["test"][TEST_SIZE:], PROBE_EVERY, report=told)
        model, seconds = _train(method, base, to_dataset(splits["train"]), output_dir, seed, steps, callback)
        results[method.label] = measure(model) | {"seconds": seconds}
        curves[method.label] = callback.curves

    print("3/3  The saved LUFFY model, loaded again", flush=True)
    loaded = measure(AutoModelForCausalLM.from_pretrained(output_dir / "luffy"))
    if any(loaded[key] != results["LUFFY"][key] for key in loaded):
        raise RuntimeError(f"The saved model answers differently: {loaded} instead of {results['LUFFY']}.")

    plot_curves(output_dir / "curves.png", curves, DEMO_PANELS, f"Letter walk, {TRAINED} letters, seed {seed}")
    (output_dir / "results.json").write_text(
        json.dumps({"seed": seed, "steps": steps, "results": results, "curves": curves}, indent=1)
    )
    print(f"\n{results_table(results)}\n\n{reading_of(results)}\n")
    page = _report(output_dir)
    print(f"Report: {page}   Curves: {output_dir / 'curves.png'}")
    print(f"Model and card: {output_dir / 'luffy'}   Numbers: {output_dir / 'results.json'}")
    return results


def _train(
    method: Method, base: Path, dataset: datasets.Dataset, output_dir: Path, seed: int, steps: int, probe: Probe
) -> tuple[PreTrainedModel, float]:
    """The model that a method makes of the base, saved with its card, and the seconds of its training."""
    directory, [stage] = output_dir / method.name, method.stages
    is_rl = stage.command == "train"
    kept: dict[str, Any] = {"log_completions": True, "num_completions_to_print": 0} if is_rl else {}
    trainer = make_trainer(
        stage, base, dataset, directory, seed, steps, LEARNING_RATE, [probe], MAX_COMPLETION_LENGTH,
        logging_steps=LOG_EVERY, **kept,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start - probe.seconds
    trainer.save_model()
    trainer.create_model_card(model_name=f"letter-walk-{method.label}")
    trainer.save_state()  # the logs, for the report
    return trainer.model, seconds


def _report(output_dir: Path) -> Path:
    """The page of this demo's runs, without those of an earlier one in the same directory."""
    directories = [output_dir / name for name in TRAINED_METHODS]
    report(directories, output_dir / "report", MOST_COMPLETIONS, latest=True)
    return output_dir / "report" / PAGE


def reading_of(results: dict[str, dict[str, float]]) -> str:
    """What the table shows, which is nothing yet where a run was too short for it."""
    grpo, luffy, sft = (results[name][f"accuracy_{TRAINED}"] for name in ("GRPO", "LUFFY", "SFT"))
    if grpo < 0.1 and luffy > 0.9 and sft > 0.9:
        return READING
    return "This run shows nothing yet: with 100 steps, the default, LUFFY and SFT answer right and GRPO does not."


def results_table(results: dict[str, dict[str, float]]) -> str:
    header = [
        "accuracy on held-out walks",
        f"{EASIER} letters",
        f"{TRAINED} (trained)",
        f"{HARDER} letters",
        "train s",
    ]
    rows = []
    for name, result in results.items():
        accuracies = [f"{result[f'accuracy_{length}']:.3f}" for length in (EASIER, TRAINED, HARDER)]
        rows.append([name, *accuracies, f"{result['seconds']:.0f}" if "seconds" in result else "-"])
    return text_table(header, rows)
