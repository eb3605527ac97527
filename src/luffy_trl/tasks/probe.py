"""What a policy makes of held-out walks: measured during training, the same way for every method."""

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .letter_walk import MAX_COMPLETION_LENGTH, Walk, letter_walk_reward


RARE = 0.01  # a demonstration token is rare if the base gives it less


class Probe(TrainerCallback):
    """Measures the policy on held-out walks of one length, every few steps.

    reward: mean over one sampled answer a walk. entropy: mean over the sampled tokens, in nats. demonstration: the
    geometric mean, over walks, of the probability of the whole demonstration. rare: the geometric mean of the
    probabilities of those demonstration tokens that the untrained policy found less probable than `RARE`; NaN if
    there are none. length: mean tokens of the sampled answers, EOS included.

    Args:
        report: called after each measurement with the step and the values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        walks: list[Walk],
        every: int,
        max_new_tokens: int = MAX_COMPLETION_LENGTH,
        report: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self.tokenizer = tokenizer
        self.walks = walks
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.report = report
        self.steps_before = 0  # steps of earlier phases, where training has several
        self.seconds, self.cpu_seconds = 0.0, 0.0  # spent on measuring, not on training
        self.curves: dict[str, list[float]] = {}
        self._rare: torch.Tensor | None = None  # (B, T)

    def on_train_begin(self, args, state, control, model, **kwargs):
        if not self.curves:  # the second phase of two begins where the first ended
            self._measure(model, state)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, state)

    def _measure(self, model, state):
        start, cpu_start = time.perf_counter(), time.process_time()
        with torch.random.fork_rng(), torch.no_grad():  # leaves the training's random numbers alone
            torch.manual_seed(0)
            values, demonstration_logps = probe(model, self.tokenizer, self.walks, self.max_new_tokens)
        if self._rare is None:
            self._rare = demonstration_logps.exp() < RARE
        values["rare"] = demonstration_logps[self._rare].mean().exp().item()
        for key, value in {"step": self.steps_before + state.global_step, **values}.items():
            self.curves.setdefault(key, []).append(value)
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu_start
        if self.report is not None:
            self.report(self.steps_before + state.global_step, values)


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, walks: list[Walk], max_new_tokens: int
) -> tuple[dict[str, float], torch.Tensor]:
    """The metrics of [`Probe`] but the rare tokens', and the demonstrations' log-probabilities `(B, T)`."""
    training = model.training
    model.eval()
    prompts = tokenizer([walk.prompt() for walk in walks], return_tensors="pt").to(model.device)
    width = prompts["input_ids"].size(1)  # all prompts have one length
    ids = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=True, top_k=0)
    completions = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    reward = sum(letter_walk_reward(completions, [walk.answer for walk in walks])) / len(walks)

    log_probs, mask = completion_log_probs(model, ids, width, tokenizer.pad_token_id)
    entropy = -(log_probs.exp() * log_probs).sum(-1)[mask].mean().item()

    # walks of one length: no padding
    demonstrations = [walk.prompt() + walk.demonstration + tokenizer.eos_token for walk in walks]
    demonstration_ids = tokenizer(demonstrations, return_tensors="pt")["input_ids"].to(model.device)
    log_probs, _ = completion_log_probs(model, demonstration_ids, width, tokenizer.pad_token_id)
    logps = log_probs.gather(-1, demonstration_ids[:, width:, None]).squeeze(-1)  # (B, T)
    model.train(training)
    return {
        "reward": reward,
        "entropy": entropy,
        "length": mask.sum(1).float().mean().item(),
        "demonstration": logps.sum(-1).mean().exp().item(),
    }, logps


def completion_log_probs(
    model: PreTrainedModel, ids: torch.Tensor, prompt_width: int, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the whole vocabulary at each completion position `(B, T, V)`, and which are no padding `(B, T)`."""
    logits = model(input_ids=ids, attention_mask=(ids != pad_token_id).long()).logits
    return logits[:, prompt_width - 1 : -1].log_softmax(-1), ids[:, prompt_width:] != pad_token_id
