"""The demo: GRPO, LUFFY and SFT from one base, on the embedded task, on a CPU in about a minute."""

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    logging,
)
from trl import SFTConfig, SFTTrainer

from .config import LuffyConfig
from .report import plot_curves, text_table
from .tasks.letter_walk import (
    MAX_COMPLETION_LENGTH,
    STEP_BY_STEP,
    Walk,
    distinct_walks,
    letter_walk_reward,
    split_walks,
    to_dataset,
)
from .tasks.letter_walk_base import accuracy, load_or_pretrain
from .trainer import LuffyTrainer


EASIER, TRAINED, HARDER = 3, 5, 7  # letters of a walk
PROMPTS_PER_STEP, GROUP_SIZE = 8, 8
LEARNING_RATE = 1e-4  # of every method; 3e-4 works for RL too, 1e-3 destroys the model
TEST_SIZE = 512
PROBE_SIZE, PROBE_EVERY, PRINT_EVERY = 128, 5, 20
PANELS = {
    "reward": ("reward of sampled answers", "linear"),
    "entropy": ("entropy of sampled tokens (nats)", "linear"),
    "demonstration": ("probability of a whole demonstration", "log"),
}
READING = (
    "This shows that on-policy RL stays where it is when no rollout ever earns a reward, while one demonstration in\n"
    "each group is enough for the same trainer to learn; it does not show that LUFFY beats SFT, which is as good and\n"
    "cheaper where, as here, every demonstration is right and there is one right way to answer."
)


class Probe(TrainerCallback):
    """Measures the policy on held-out walks every few steps, the same way for every method.

    reward: mean over one sampled answer a walk. entropy: mean over the sampled tokens. demonstration: the geometric
    mean, over walks, of the probability of the whole demonstration.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, walks: list[Walk]):
        self.name = name
        self.tokenizer = tokenizer
        self.walks = walks
        self.seconds = 0.0  # spent on measuring, not on training
        self.curves: dict[str, list[float]] = {"step": [], **{metric: [] for metric in PANELS}}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self._measure(model, state)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % PROBE_EVERY == 0 or state.global_step == state.max_steps:
            self._measure(model, state)

    def _measure(self, model, state):
        start = time.perf_counter()
        with torch.random.fork_rng(), torch.no_grad():  # leaves the training's random numbers alone
            torch.manual_seed(0)
            values = probe(model, self.tokenizer, self.walks)
        for key, value in {"step": state.global_step, **values}.items():
            self.curves[key].append(value)
        self.seconds += time.perf_counter() - start
        if state.global_step % PRINT_EVERY == 0:
            print(
                f"     {self.name:<5}  step {state.global_step:>3}   reward {values['reward']:.3f}   "
                f"entropy {values['entropy']:.3f}   demonstration {values['demonstration']:.0e}",
                flush=True,
            )


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, walks: list[Walk]) -> dict[str, float]:
    training = model.training
    model.eval()
    prompts = tokenizer([walk.prompt() for walk in walks], return_tensors="pt").to(model.device)
    width = prompts["input_ids"].size(1)  # all prompts have one length
    ids = model.generate(**prompts, max_new_tokens=MAX_COMPLETION_LENGTH, do_sample=True, top_k=0)
    completions = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    reward = sum(letter_walk_reward(completions, [walk.answer for walk in walks])) / len(walks)

    log_probs, mask = completion_log_probs(model, ids, width, tokenizer.pad_token_id)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[mask].mean().item()

    # walks of one length: no padding
    demonstrations = [walk.prompt() + walk.demonstration + tokenizer.eos_token for walk in walks]
    ids = tokenizer(demonstrations, return_tensors="pt")["input_ids"].to(model.device)
    log_probs, _ = completion_log_probs(model, ids, width, tokenizer.pad_token_id)
    logps = log_probs.gather(-1, ids[:, width:, None]).squeeze(-1)  # (B, T)
    model.train(training)
    return {"reward": reward, "entropy": entropy, "demonstration": logps.sum(-1).mean().exp().item()}


def completion_log_probs(
    model: PreTrainedModel, ids: torch.Tensor, prompt_width: int, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the whole vocabulary at each completion position `(B, T, V)`, and which are no padding `(B, T)`."""
    logits = model(input_ids=ids, attention_mask=(ids != pad_token_id).long()).logits
    return logits[:, prompt_width - 1 : -1].log_softmax(-1), ids[:, prompt_width:] != pad_token_id


def run_demo(output_dir: str | Path, seed: int = 0, steps: int = 100) -> dict[str, dict[str, float]]:
    """Pretrain the base (once), train each method, print the table; leaves everything in `output_dir`.

    Returns:
        Per method, the held-out accuracy at each difficulty and the seconds its training took.
    """
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

    base_model = AutoModelForCausalLM.from_pretrained(base)
    results: dict[str, dict[str, float]] = {"base": measure(base_model)}
    print(
        f"     accuracy {accuracy(base_model, tokenizer, tests[TRAINED], STEP_BY_STEP):.3f} when told to go step by "
        f"step, {results['base'][f'accuracy_{TRAINED}']:.3f} otherwise",
        flush=True,
    )

    print(f"2/3  Training GRPO, LUFFY and SFT from it, {steps} steps each", flush=True)
    curves = {}
    for name in ("GRPO", "LUFFY", "SFT"):
        probe_callback = Probe(name, tokenizer, splits["test"][TEST_SIZE:])
        trainer = _trainer(name, base, to_dataset(splits["train"]), output_dir, seed, steps, probe_callback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start - probe_callback.seconds
        trainer.save_model()
        trainer.create_model_card(model_name=f"letter-walk-{name}")
        results[name] = measure(trainer.model) | {"seconds": seconds}
        curves[name] = probe_callback.curves

    print("3/3  The saved LUFFY model, loaded again", flush=True)
    loaded = measure(AutoModelForCausalLM.from_pretrained(output_dir / "luffy"))
    if any(loaded[key] != results["LUFFY"][key] for key in loaded):
        raise RuntimeError(f"The saved model answers differently: {loaded} instead of {results['LUFFY']}.")

    plot_curves(output_dir / "curves.png", curves, PANELS, f"Letter walk, {TRAINED} letters, seed {seed}")
    (output_dir / "results.json").write_text(
        json.dumps({"seed": seed, "steps": steps, "results": results, "curves": curves}, indent=1)
    )
    print(f"\n{results_table(results)}\n\n{READING}\n")
    print(
        f"Curves: {output_dir / 'curves.png'}   Model and card: {output_dir / 'luffy'}   Numbers: results.json there"
    )
    return results


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


def _trainer(name: str, base: Path, train_dataset, output_dir: Path, seed: int, steps: int, callback: Probe):
    common: dict[str, Any] = {
        "output_dir": str(output_dir / name.lower()),
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    tokenizer = AutoTokenizer.from_pretrained(base)
    if name == "SFT":
        trainer = SFTTrainer(
            str(base),
            # one demonstration a prompt, as many prompts a step as the others
            args=SFTConfig(per_device_train_batch_size=PROMPTS_PER_STEP, **common),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            callbacks=[callback],
        )
    else:
        args = LuffyConfig(
            num_generations=GROUP_SIZE,
            num_demonstrations=1 if name == "LUFFY" else 0,  # 0 is TRL's GRPO, bit for bit
            per_device_train_batch_size=PROMPTS_PER_STEP * GROUP_SIZE,
            max_completion_length=MAX_COMPLETION_LENGTH,
            **common,
        )
        trainer = LuffyTrainer(
            str(base), letter_walk_reward, args, train_dataset=train_dataset, processing_class=tokenizer,
            callbacks=[callback],
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer
