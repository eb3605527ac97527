"""Whether a model keeps the sequences of a packed row apart: two short sequences, packed and padded.

Attention does where its mask looks at positions or at boundaries. Layers that carry a state along the row, linear
attention, state spaces and convolutions, do where their kernel is told the boundaries and reads them. Which of this
holds depends on the model, the attention implementation and the kernels that are installed, so it is tried.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .dealing import Rows


# Of the two sequences: together shorter than any model's window. A prompt of one token shows what a convolution takes
# from the sequence before
PROMPT_LENGTHS, COMPLETION_LENGTHS = (6, 1), (8, 10)

# Means over tokens, as shares of the log-probs' spread, about 1 to 4 in a trained model. In float32 equal numbers
# differ by 1e-6 of it. In half precision padded and packed rows differ by 0.01 to 0.02 from rounding and by 0.3 and
# more where positions are wrong; what another neighbour in the row changes is exactly 0 but for experts, whose
# kernels round otherwise with other numbers of tokens, and 0.03 and more where anything leaks.
TOLERANCES = {"single": (1e-4, 1e-4), "half": (0.05, 0.01)}
LEAST_SPREAD = 0.1  # of the log-probs of an untrained model: less would ask for more digits than there are


@dataclass(frozen=True)
class Agreement:
    """Of a packed row with the padded rows.

    Attributes:
        holds: whether they are equal but for rounding.
        difference: the largest one between two log-probs that should be equal.
        refusal: the model's own words, where it takes no packed row without a kernel that is not installed.
    """

    holds: bool
    difference: float
    refusal: str | None = None


def probe(token_ids: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two sequences of different lengths, padded, and the same with another first one: ids, ids, mask, each (2, S).

    Args:
        token_ids: to draw from, always the same ones.
    """
    prompt, completion = max(PROMPT_LENGTHS), max(COMPLETION_LENGTHS)
    drawn = torch.randint(len(token_ids), (3, prompt + completion), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(token_ids)[drawn].to(device)  # (3, S)
    mask = torch.zeros(2, prompt + completion, dtype=torch.long, device=device)
    for row, (before, after) in enumerate(zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)):
        mask[row, prompt - before : prompt + after] = 1
    return ids[:2], ids[[2, 1]], mask


def shared_probe(token_ids: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Two sequences with a prompt in common, padded: ids and mask (2, S), and their lengths."""
    ids, _, mask = probe(token_ids, device)
    prompt = max(PROMPT_LENGTHS)
    ids[1, :prompt], mask[1, :prompt] = ids[0, :prompt], 1
    return ids, mask, Rows([prompt] * 2, list(COMPLETION_LENGTHS), groups=[0, 0])


def compare_shared(padded: torch.Tensor, shared: torch.Tensor, mask: torch.Tensor, precision: str) -> Agreement:
    """The agreement of log-probs (2, T) of `shared_probe`'s rows, padded and with their prompt once."""
    return compare(padded, shared, [], mask, precision)


def compare(
    padded: torch.Tensor, packed: torch.Tensor, others: Sequence[torch.Tensor], mask: torch.Tensor, precision: str
) -> Agreement:
    """The agreement of a probe's log-probs, each (2, T).

    Args:
        padded: of the padded rows.
        packed: of the packed row.
        others: pairs of packed rows (2, 2, T) that differ in the first sequence only.
        mask: (2, T), True on tokens.
        precision: key of `TOLERANCES`.
    """
    mask = mask.bool()
    spread = max(padded[mask].std().item(), LEAST_SPREAD)
    between = (packed - padded)[mask].abs()  # (tokens,)
    leaked = [(one - other)[1][mask[1]].abs() for one, other in others]
    for_padding, for_neighbours = TOLERANCES[precision]
    return Agreement(
        holds=between.mean().item() <= for_padding * spread
        and all(change.mean().item() <= for_neighbours * spread for change in leaked),
        difference=max(change.max().item() for change in (between, *leaked)),
    )


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode; each module is put back as it was."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextmanager
def no_trace(device: torch.device) -> Iterator[None]:
    """Nothing in here has a gradient, draws from the generators that training draws from, or stays in a cache."""
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        # Autocast would give what follows the weights that it cast in here, without their gradient
        torch.clear_autocast_cache()
