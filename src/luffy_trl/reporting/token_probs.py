"""Probabilities of shown tokens under a saved model: not the policy that wrote them, which is gone, and said so."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..demonstrations import rendered_prompt
from ..quiet import quiet_progress_bars
from . import ReportError
from .completions import Completion, KeptStep


# Forward passes are the cost: completions of each run, and tokens of each with its prompt
MOST_COLORED, MOST_TOKENS = 32, 2048


def color_tokens(kept: list[list[KeptStep]], model_dir: str) -> str:
    """Fill in `tokens` of the last kept step's first completions of each run; returns what to say beside them.

    Raises:
        ReportError: if the model or its tokenizer cannot be loaded.
    """
    quiet_progress_bars()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    except (OSError, ValueError) as error:
        raise ReportError(f"--model {model_dir} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ReportError(f"--model {model_dir}: its tokenizer does not tell where in a text its tokens are.")
    for steps in kept:
        rows = [(group.prompt, row) for step in steps[-1:] for group in step.groups for row in group.completions]
        for prompt, row in rows[:MOST_COLORED]:
            text = rendered_prompt(tokenizer, prompt, {})
            prompt_ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
            _color(row, prompt_ids, model, tokenizer)
    return (
        f"Tokens of the last step's first {MOST_COLORED} completions are coloured by their probability under "
        f"{model_dir}, not under the policy at that step. From certain to improbable:"
    )


@torch.no_grad()
def _color(row: Completion, prompt_ids: list[int], model, tokenizer) -> None:
    encoded = tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"][: max(MOST_TOKENS - len(prompt_ids), 0)]
    if not ids or not prompt_ids:
        return
    logits = model(torch.tensor([prompt_ids + ids]), logits_to_keep=len(ids) + 1).logits[0, :-1]  # (T, V)
    probs = logits.float().softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    spans = encoded["offset_mapping"][: len(ids)]
    row.tokens = [(row.text[a:b], float(f"{p:.3g}")) for (a, b), p in zip(spans, probs, strict=True)]
    rest = row.text[spans[-1][1] :]
    if rest:
        row.tokens.append((f" [... {len(rest):,} characters left out ...]", None))
