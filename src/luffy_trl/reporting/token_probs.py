"""Probabilities of shown tokens under a saved model: not the policy that wrote them, which is gone, and said so."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..demonstrations.rendering import rendered_prompt
from ..runs.quiet import quiet_progress_bars
from . import ReportError
from .completions import Completion, KeptStep


# Forward passes are the cost: completions of each run, and tokens of each with its prompt
MOST_COLORED, MOST_TOKENS = 32, 2048


def color_tokens(kept: list[list[KeptStep]], model_dir: str) -> str:
    """Fill in `tokens` of the last kept step's first completions of each run; returns what to say beside them.

    Raises:
        ReportError: if the model or its tokenizer cannot be loaded, or is not made for these prompts.
    """
    quiet_progress_bars()
    tokenizer, model = _load(model_dir)
    # positions beyond the window have no embedding, or were never trained; state-space models have no window
    window = getattr(model.config.get_text_config(), "max_position_embeddings", MOST_TOKENS)
    most = min(MOST_TOKENS, window)
    without_room = trajectories = 0
    for steps in kept:
        rows = [(group.prompt, row) for step in steps[-1:] for group in step.groups for row in group.completions]
        # The text of a trajectory is for a reader, and not what its template makes of it
        trajectories += sum(row.is_trajectory for _, row in rows)
        rows = [(prompt, row) for prompt, row in rows if not row.is_trajectory]
        for prompt, row in rows[:MOST_COLORED]:
            prompt_ids = _prompt_ids(tokenizer, prompt, model_dir)
            without_room += len(prompt_ids) >= most
            try:
                _color(row, prompt_ids, model, tokenizer, most)
            except IndexError as error:  # an embedding's
                raise ReportError(
                    f"--model {model_dir} has no embedding for a token or a position of a completion: is the "
                    "tokenizer beside it its own?"
                ) from error
    note = (
        f"Tokens of the last step's first {MOST_COLORED} completions are coloured by their probability under "
        f"{model_dir}, not under the policy at that step; {most:,} tokens with the prompt are looked at. "
    )
    if trajectories:
        note += f"{trajectories} completions of several turns are not coloured. "
    if without_room:
        note += f"{without_room} completions are not coloured: their prompts leave no room. "
    return note + "From certain to improbable:"


def _load(model_dir: str) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    except Exception as error:  # of a missing, foreign or damaged file, the libraries' errors are of every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ReportError(f"--model {model_dir} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ReportError(f"--model {model_dir}: its tokenizer does not tell where in a text its tokens are.")
    return tokenizer, model


def _prompt_ids(tokenizer: Any, prompt: Any, model_dir: str) -> list[int]:
    if not isinstance(prompt, str) and not tokenizer.chat_template:
        raise ReportError(
            f"--model {model_dir} has no chat template, and the prompts are conversations: give the model that was "
            "trained on them."
        )
    try:
        text = rendered_prompt(tokenizer, prompt, {})
    except Exception as error:  # a template is a program, and the prompts may be anyone's
        reason = " ".join(str(error).split())
        raise ReportError(f"--model {model_dir}: its chat template refuses a prompt: {reason}") from error
    return tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]


@torch.no_grad()
def _color(row: Completion, prompt_ids: list[int], model: Any, tokenizer: Any, most: int) -> None:
    encoded = tokenizer(row.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"][: max(most - len(prompt_ids), 0)]
    if not ids or not prompt_ids:
        return
    logits = model(torch.tensor([prompt_ids + ids]), logits_to_keep=len(ids) + 1).logits[0, :-1]  # (T, V)
    probs = logits.float().softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    row.tokens, rest = pieces(row.text, [end for _, end in encoded["offset_mapping"][: len(ids)]], probs)
    if rest and len(ids) < len(encoded["input_ids"]):
        rest = f" [... {len(rest):,} characters left out ...]"
    if rest:
        row.tokens.append((rest, None))


def pieces(text: str, ends: list[int], probs: list[float]) -> tuple[list[tuple[str, float | None]], str]:
    """The text cut where its tokens end, each piece with its probability, and what is behind the last token.

    Together they are the text, whatever the tokenizer calls its tokens' spans: spaces that it counts to no token go
    with the next one. Tokens that are bytes of one character are one piece, whose probability is their product.
    """
    found: list[tuple[str, float]] = []
    done = 0
    for end, prob in zip(ends, probs, strict=True):
        if found and end <= done:
            found[-1] = (found[-1][0], found[-1][1] * prob)
        else:
            found.append((text[done:end], prob))
            done = max(done, end)
    return [(piece, float(f"{prob:.3g}")) for piece, prob in found], text[done:]
