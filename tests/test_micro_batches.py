"""Micro-batches by a budget of tokens: the dealing by hand, and a step's gradients against TRL's micro-batches."""

import random

import pytest
import torch

from luffy_trl.padding.dealing import Rows, deal
from luffy_trl.padding.packing import Layout

from .test_padding import SHAPE, assert_same_steps, rows  # noqa: F401 - a fixture


# By hand


def make_rows(groups: int = 6, group_size: int = 4, longest: int = 60, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    prompts = [length for length in (rng.randint(1, 20) for _ in range(groups)) for _ in range(group_size)]
    completions = [min(longest, int(rng.lognormvariate(2.5, 0.7))) for _ in prompts]
    return Rows(prompts, completions, [i // group_size for i in range(len(prompts))])


def test_what_rows_cost():
    rows = Rows([3, 3, 2], [5, 1, 4], [0, 0, 1])
    assert rows.tokens("padded") == 3 * (3 + 5)
    assert rows.tokens("packed") == 8 + 4 + 6
    # the first two tokens of the prompt of three are there once, its last one for each row
    assert rows.tokens("shared") == 2 + (1 + 5) + (1 + 1) + 6


@pytest.mark.parametrize("form", ["padded", "packed", "shared"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_every_row_is_dealt_once_and_within_the_budget(form, seed, budget):
    rows = make_rows(seed=seed)
    chosen = [row for row in range(len(rows)) if row % 5]
    parts = deal(rows, chosen, budget, form)
    assert sorted(row for part in parts for row in part) == chosen
    for part in parts:
        assert len(part) == 1 or rows.of(part).tokens(form) <= budget
    costs = [rows.of(part).tokens(form) for part in parts]
    assert costs == sorted(costs, reverse=True)
    for at_least in (len(parts), len(parts) + 2, len(chosen)):
        more = deal(rows, chosen, budget, form, min(at_least, len(chosen)))
        assert len(more) == min(at_least, len(chosen))
        assert sorted(row for part in more for row in part) == chosen


def test_packed_rows_are_as_few_micro_batches_as_their_sum_and_even():
    rows = make_rows(groups=32, group_size=8)
    total = rows.tokens("packed")
    parts = deal(rows, range(len(rows)), budget=total // 10 + 60, form="packed")
    costs = [rows.of(part).tokens("packed") for part in parts]
    assert len(parts) == 10
    assert max(costs) <= 1.02 * min(costs)


def test_rows_of_a_prompt_stay_together():
    rows = Rows([100] * 16, [10] * 16, [i % 4 for i in range(16)])
    parts = deal(rows, range(16), budget=300, form="shared")
    assert sorted(rows.of(part).groups for part in parts) == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4] or all(
        len(set(rows.of(part).groups)) <= 2 for part in parts
    )
    assert [rows.of(part).tokens("shared") for part in parts] == [2 * (99 + 4 * 11)] * 2


def test_a_layout_by_hand():
    # P = 3, T = 4: rows (a b c | r r r), (a b c | s s), (x y | t t)
    rows = Rows([3, 3, 2], [3, 2, 2], [7, 7, 8])
    ids = torch.tensor([[1, 2, 3, 11, 12, 13, 0], [1, 2, 3, 21, 22, 0, 0], [0, 8, 9, 31, 32, 0, 0]])
    layout = Layout.of(rows, 3, 4, shared=True, device=torch.device("cpu"))
    packed = layout.pack(ids)
    assert packed.tolist() == [[1, 2, 3, 11, 12, 13, 3, 21, 22, 8, 9, 31, 32]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 0, 1, 2, 3]]
    assert layout.labels(packed).tolist() == [[-100] * 3 + [11, 12, 13, -100, 21, 22, -100, -100, 31, 32]]
    assert [(span.length, span.prefix) for span in layout.spans] == [(2, None), (4, 0), (3, 0), (4, None)]
    assert layout.unpack(packed).tolist() == [[11, 12, 13, 0], [21, 22, 0, 0], [31, 32, 0, 0]]
    alone = Layout.of_masks(ids > 0, 4)
    assert alone.pack(ids).tolist() == [[1, 2, 3, 11, 12, 13, 1, 2, 3, 21, 22, 8, 9, 31, 32]]
    assert not alone.is_shared
    assert alone.boundaries()["cu_seq_lens_q"].tolist() == [0, 6, 11, 15]


# Through the trainer: as in test_padding, one generation of 4 prompts x 4, four micro-batches, two optimizer steps


def steps_of(trainer, steps=2, calls=2, seed=0):
    """Loss and gradients of each optimizer step of one generation, from the same weights, and the forward passes."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = calls
    torch.manual_seed(seed)
    generation = [row for row in trainer.train_dataset for _ in range(4)]
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters())
    generate = trainer._generate_and_score_completions

    def generate_and_move(inputs):
        """The policy that is trained is another one than the one that was sampled."""
        output = generate(inputs)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        passes.clear()
        return output

    trainer._generate_and_score_completions = generate_and_move
    passes = []
    hook = trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    results = []
    for step in range(steps):
        trainer.model.zero_grad()
        loss = 0.0
        for _ in range(calls):
            loss += trainer.training_step(trainer.model, generation, None).item()
        trainer.state.global_step = step + 1
        results.append((loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}))
    hook.remove()
    return results, passes


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_budget_changes_no_gradient(make_trainer, rows, loss_type, packed):  # noqa: F811
    beta = 0.0 if loss_type == "bnpo" else 0.1
    options = {"loss_type": loss_type, "beta": beta, "model_init_kwargs": {"dtype": torch.float64}, **SHAPE}
    theirs, theirs_passes = steps_of(make_trainer(rows, trim_padding=False, **options))
    few, few_passes = steps_of(make_trainer(rows, tokens_per_micro_batch=4000, packed_forward=packed, **options))
    many, many_passes = steps_of(make_trainer(rows, tokens_per_micro_batch=80, packed_forward=packed, **options))
    assert_same_steps(few, theirs)
    assert_same_steps(many, theirs)
    assert [len(theirs_passes), len(few_passes)] == [4, 2]
    assert len(many_passes) > 4
    assert sum(many_passes) < sum(theirs_passes)
