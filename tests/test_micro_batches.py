"""Micro-batches by a budget of tokens: the dealing by hand, and a step's gradients against TRL's micro-batches."""

import random

import pytest
import torch

from luffy_trl.padding.dealing import Rows, deal
from luffy_trl.padding.packing import Layout

from .test_padding import APART, OF_MICRO_BATCHES, SHAPE, assert_same_steps, make_rows, some_right


# By hand


def make_lengths(groups: int = 6, group_size: int = 4, longest: int = 60, seed: int = 0) -> Rows:
    rng = random.Random(seed)
    prompts = [length for length in (rng.randint(1, 20) for _ in range(groups)) for _ in range(group_size)]
    completions = [min(longest, int(rng.lognormvariate(2.5, 0.7))) for _ in prompts]
    return Rows(prompts, completions, [i // group_size for i in range(len(prompts))])


def test_what_rows_cost():
    lengths = Rows([3, 3, 2], [5, 1, 4], [0, 0, 1])
    assert lengths.tokens("padded") == 3 * (3 + 5)
    assert lengths.tokens("packed") == 8 + 4 + 6
    # the first two tokens of the prompt of three are there once, its last one for each row
    assert lengths.tokens("shared") == 2 + (1 + 5) + (1 + 1) + 6


@pytest.mark.parametrize("form", ["padded", "packed", "shared"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [40, 100, 1000])
def test_every_row_is_dealt_once_and_within_the_budget(form, seed, budget):
    lengths = make_lengths(seed=seed)
    chosen = [row for row in range(len(lengths)) if row % 5]
    parts = deal(lengths, chosen, budget, form)
    assert sorted(row for part in parts for row in part) == chosen
    for part in parts:
        assert len(part) == 1 or lengths.of(part).tokens(form) <= budget
    costs = [lengths.of(part).tokens(form) for part in parts]
    assert costs == sorted(costs, reverse=True)
    for at_least in (len(parts), len(parts) + 2, len(chosen)):
        more = deal(lengths, chosen, budget, form, min(at_least, len(chosen)))
        assert len(more) == min(at_least, len(chosen))
        assert sorted(row for part in more for row in part) == chosen


def test_packed_rows_are_as_few_micro_batches_as_their_sum_and_even():
    lengths = make_lengths(groups=32, group_size=8)
    total = lengths.tokens("packed")
    parts = deal(lengths, range(len(lengths)), budget=total // 10 + 60, form="packed")
    costs = [lengths.of(part).tokens("packed") for part in parts]
    assert len(parts) == 10
    assert max(costs) <= 1.02 * min(costs)


def test_rows_of_a_prompt_stay_together():
    lengths = Rows([100] * 16, [10] * 16, [i % 4 for i in range(16)])
    parts = deal(lengths, range(16), budget=300, form="shared")
    assert sorted(lengths.of(part).groups for part in parts) == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4] or all(
        len(set(lengths.of(part).groups)) <= 2 for part in parts
    )
    assert [lengths.of(part).tokens("shared") for part in parts] == [2 * (99 + 4 * 11)] * 2


def test_a_layout_by_hand():
    # P = 3, T = 4: rows (a b c | r r r), (a b c | s s), (x y | t t)
    lengths = Rows([3, 3, 2], [3, 2, 2], [7, 7, 8])
    ids = torch.tensor([[1, 2, 3, 11, 12, 13, 0], [1, 2, 3, 21, 22, 0, 0], [0, 8, 9, 31, 32, 0, 0]])
    layout = Layout.of(lengths, 3, 4, shared=True, device=torch.device("cpu"))
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


@pytest.fixture
def rows():
    return make_rows()


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
def test_a_budget_changes_no_gradient(make_trainer, rows, loss_type, packed):
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


def test_the_last_steps_call_runs_all_of_a_steps_micro_batches(make_trainer, rows):
    trainer = make_trainer(rows, tokens_per_micro_batch=300, **SHAPE)
    steps_of(trainer)
    due = trainer._buffered_inputs
    assert [len(batches) > 0 for batches in due] == [False, True, False, True]
    for batches in (due[1], due[3]):
        assert sum(len(batch["advantages"]) for batch in batches) == 8
        assert sum(batch["share"] for batch in batches) == pytest.approx(2)
    assert trainer._metrics["train"]["micro_batches"] == [len(due[1]), len(due[3])]


@pytest.mark.parametrize("options", [
    {"num_demonstrations": 0},
    {"temperature": 0.7},
    {"gradient_checkpointing": True},
    {"mask_truncated_completions": True},
    {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    {"demonstration_average": "sequence", "loss_type": "grpo"},
    {
        "demonstration_average": "token", "demonstration_loss": "chord_phi", "advantage_baseline": "on_policy",
        "demonstration_weight": 0.5, "rollout_weight": "complement", "loss_type": "dapo",
    },
])  # fmt: skip
def test_a_budget_changes_no_gradient_with(make_trainer, rows, options):
    options = {"model_init_kwargs": {"dtype": torch.float64}, "beta": 0.1, **SHAPE, **options}
    theirs, _ = steps_of(make_trainer(rows, trim_padding=False, **options))
    trainer = make_trainer(rows, tokens_per_micro_batch=150, **options)
    ours, _ = steps_of(trainer)
    assert_same_steps(ours, theirs)
    assert any(batch["layout"].is_shared for due in trainer._buffered_inputs for batch in due)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_rows_without_advantage_are_left_out_of_a_budget(make_trainer, rows, loss_type, packed):
    options = {"loss_type": loss_type, "reward": some_right, "model_init_kwargs": {"dtype": torch.float64}, **SHAPE}
    theirs, _ = steps_of(make_trainer(rows, **options))
    trainer = make_trainer(
        rows, tokens_per_micro_batch=80, skip_zero_advantages=True, packed_forward=packed, **options
    )
    ours, _ = steps_of(trainer)
    assert_same_steps(ours, theirs)
    assert sum(len(batch["advantages"]) for due in trainer._buffered_inputs for batch in due) < 16


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("options", APART)
def test_demonstrations_that_need_no_advantage_stay_in_a_budget(make_trainer, rows, options, skip):
    options = {"reward": some_right, "model_init_kwargs": {"dtype": torch.float64}, **SHAPE, **options}
    whole = make_trainer(rows, **options)
    dealt = make_trainer(rows, tokens_per_micro_batch=80, skip_zero_advantages=skip, **options)
    theirs, _ = steps_of(whole)
    ours, _ = steps_of(dealt)
    assert_same_steps(ours, theirs)
    assert (sum(len(batch["advantages"]) for due in dealt._buffered_inputs for batch in due) < 16) is skip
    means, expected = dealt._means.take(), whole._means.take()
    for name in OF_MICRO_BATCHES:
        assert means[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("options", [
    {"steps_per_generation": 2, "gradient_accumulation_steps": 4},  # a step of two generations
    {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
    {"steps_per_generation": 3, "gradient_accumulation_steps": 2},  # generations that end within a step
    {"steps_per_generation": 2, "gradient_accumulation_steps": 8},  # an epoch ends with a shorter step
])  # fmt: skip
def test_a_run_with_a_budget_is_the_run_without(make_trainer, walks, options):
    def run(**more):
        torch.manual_seed(0)
        trainer = make_trainer(
            walks.select(range(12)), per_device_train_batch_size=4, max_steps=4, beta=0.1,
            lr_scheduler_type="constant", model_init_kwargs={"dtype": torch.float64}, **options, **more,
        )  # fmt: skip
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line], trainer

    expected, theirs = run()
    log, ours = run(tokens_per_micro_batch=200)
    assert len(log) == len(expected) == 4
    for line, expected_line in zip(log, expected, strict=True):
        assert line.get("reward") == expected_line.get("reward")
        for key in ("loss", "grad_norm", "off_policy/prob"):
            assert line[key] == pytest.approx(expected_line[key], rel=1e-5, abs=1e-7), key
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_row_longer_than_the_budget_is_said(make_trainer, rows, caplog):
    trainer = make_trainer(rows, tokens_per_micro_batch=30, share_prompts=False, **SHAPE)
    with caplog.at_level("WARNING", logger="luffy_trl"):
        steps_of(trainer)
    [said] = {record.message for record in caplog.records if "tokens_per_micro_batch" in record.message}
    assert "are longer than tokens_per_micro_batch=30: each has a micro-batch to itself" in said
    for due in trainer._buffered_inputs:
        for batch in due:
            assert len(batch["advantages"]) == 1 or len(batch["layout"].source) <= 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch=0 must be 1 or more"),
        ({"tokens_per_micro_batch": 9, "trim_padding": False}, "cannot be combined with trim_padding=False"),
        ({"tokens_per_micro_batch": 9, "loss_type": "bnpo", "beta": 0.1}, "'bnpo' and beta=0.1.*loss_type='dapo'"),
        (
            {
                "tokens_per_micro_batch": 9, "loss_type": "bnpo", "demonstration_loss": "sft",
                "advantage_baseline": "on_policy",
            },
            "loss_type='bnpo', demonstration_loss='sft' and demonstration_average='joint'",
        ),
        (
            {
                "tokens_per_micro_batch": 9, "num_iterations": 2, "steps_per_generation": 3,
                "gradient_accumulation_steps": 2,
            },
            "each iteration cuts a generation into other optimizer steps",
        ),
        ({"share_prompts": True}, "share_prompts=True needs tokens_per_micro_batch"),
        (
            {"share_prompts": True, "tokens_per_micro_batch": 9, "packed_forward": False},
            "share_prompts=True cannot be combined with packed_forward=False",
        ),
    ],
)  # fmt: skip
def test_what_a_budget_cannot_do_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_budget_is_reason_enough_to_trim(config):
    assert config(num_demonstrations=0, tokens_per_micro_batch=100).trim_padding
    assert not config(num_demonstrations=0).trim_padding
