"""Ordering, trimming and packing: the functions by hand, and the trainer's loss with and without them."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from luffy_trl.padding.micro_batches import drop_rows_without_gradient, optimizer_steps, order_by_length, trim
from luffy_trl.padding.packing import Layout
from luffy_trl.tasks.letter_walk import split_walks, to_dataset

from .test_trainer import with_demonstrations


def batch(lengths, width=4, **extra):
    """Rows (prompt tokens, completion tokens), padded to `width` on both sides; a row's id is in every token."""
    rows = torch.arange(1, len(lengths) + 1).unsqueeze(1)
    prompt_mask = torch.tensor([[0] * (width - p) + [1] * p for p, _ in lengths])
    completion_mask = torch.tensor([[1] * c + [0] * (width - c) for _, c in lengths])
    return {
        "prompt_ids": rows * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": rows * completion_mask,
        "completion_mask": completion_mask,
        "advantages": rows.squeeze(1).float(),
        "num_items_in_batch": torch.tensor(9),
        **extra,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4, 2, 2), [(0, 2), (2, 4)]),
        ((4, 4, 4), [(0, 4)]),
        ((4, 1, 2), [(0, 1), (1, 3), (3, 4)]),  # one micro-batch of the step under way is missing
        ((2, 4, 4), [(0, 2)]),  # the step goes on with the next generation
        ((1, 1, 1), [(0, 1)]),
    ],
)
def test_optimizer_steps(arguments, expected):
    assert [(r.start, r.stop) for r in optimizer_steps(*arguments)] == expected


def test_rows_are_ordered_by_length_as_a_whole():
    first, second = batch([(1, 1), (4, 4)]), batch([(2, 1), (1, 3)])
    second["advantages"] += 10
    ordered = order_by_length([first, second])
    assert [b["advantages"].tolist() for b in ordered] == [[2, 12], [11, 1]]
    assert ordered[0]["completion_mask"].sum(1).tolist() == [4, 3]
    assert [int(b["num_items_in_batch"]) for b in ordered] == [9, 9]


# How image features lie in TRL's batch, for rows of 1, 2, 1 and 1 images; each feature is the number of its row
OWNERS = torch.tensor([0, 1, 1, 2, 3])
LAYOUTS = {
    # patches by a grid, as Qwen's: 2 and 4 an image in turn
    "grid": lambda: {
        "pixel_values": OWNERS.repeat_interleave(torch.tensor([2, 4, 2, 4, 2])).view(-1, 1),
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 2], [1, 2, 2], [1, 1, 2]]),
    },
    "positions": lambda: {"pixel_values": OWNERS.view(-1, 1), "image_position_ids": OWNERS.view(-1, 1)},  # Gemma's
    "flat": lambda: {"pixel_values": OWNERS.view(-1, 1), "image_sizes": OWNERS.view(-1, 1)},  # LLaVA's
    # one row a row of the batch, padded, as Idefics'
    "padded": lambda: {
        "pixel_values": torch.arange(4).view(-1, 1, 1),
        "pixel_attention_mask": torch.arange(4).view(-1, 1),
    },
    "tiles": lambda: {  # InternVL's
        "pixel_values": OWNERS.repeat_interleave(2).view(-1, 1),
        "num_tiles": [2, 4, 2, 2],
    },
    "shapes": lambda: {  # LFM2-VL's
        **dict.fromkeys(
            ("pixel_values", "pixel_attention_mask", "spatial_shapes"), OWNERS.repeat_interleave(2).view(-1, 1)
        ),
        "num_tiles": [2, 4, 2, 2],
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rows_image_features_go_where_the_row_goes(layout):
    whole = batch([(1, 1), (1, 4), (1, 2), (1, 3)], num_images=[1, 2, 1, 1], **LAYOUTS[layout]())
    split = split_pixel_values_by_grid(whole)
    ordered = order_by_length(split_tensor_dict(split, 2))
    for rows, micro_batch in zip(([1, 3], [2, 0]), map(unsplit_pixel_values_by_grid, ordered), strict=True):
        assert (micro_batch["advantages"] - 1).tolist() == rows
        assert micro_batch["num_images"] == [[1, 2, 1, 1][row] for row in rows]
        for key, value in LAYOUTS[layout]().items():
            if key == "num_tiles":
                assert micro_batch[key] == [value[row] for row in rows]
            elif key != "image_grid_thw":
                of_rows = [value[value.flatten() == row] for row in rows]
                assert torch.equal(micro_batch[key], torch.cat(of_rows)), key
        if layout == "grid":
            assert int(micro_batch["image_grid_thw"].prod(1).sum()) == len(micro_batch["pixel_values"])


def test_what_is_as_wide_as_prompt_and_completion_is_cut_on_both_sides():
    full = batch([(1, 2), (2, 3)], mm_token_type_ids=torch.arange(16).view(2, 8))
    assert trim(full)["mm_token_type_ids"].tolist() == [[2, 3, 4, 5, 6], [10, 11, 12, 13, 14]]


def test_trim_keeps_every_token():
    full = batch([(1, 2), (2, 3)], old_per_token_logps=torch.ones(2, 4), importance_sampling_ratio=torch.ones(2, 1))
    cut = trim(full)
    assert cut["prompt_ids"].tolist() == [[0, 1], [2, 2]]
    assert cut["completion_ids"].tolist() == [[1, 1, 0], [2, 2, 2]]
    assert cut["old_per_token_logps"].shape == (2, 3)
    assert cut["importance_sampling_ratio"].shape == (2, 1)
    assert full["completion_ids"].shape == (2, 4)  # the original is left alone
    assert trim(full, multiple_of=4)["prompt_ids"].shape == (2, 4)
    assert trim(full, multiple_of=3)["completion_ids"].shape == (2, 3)


def test_trim_of_rows_that_are_masked_out():
    cut = trim(batch([(2, 0), (1, 0)]))
    assert cut["completion_ids"].shape == (2, 1)


def test_pack_and_unpack():
    ids = torch.tensor([[0, 5, 6, 7], [8, 9, 0, 0], [0, 0, 0, 0]])
    layout = Layout.of_masks(ids != 0, 2)
    packed = layout.pack(ids)
    assert packed.tolist() == [[5, 6, 7, 8, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert layout.unpack(packed).tolist() == [[6, 7], [0, 0], [0, 0]]


def test_rows_without_advantage_are_dropped_and_micro_batches_say_what_is_left_of_them():
    first, second = batch([(1, 1)] * 3), batch([(1, 1)] * 3)
    first["advantages"], second["advantages"] = torch.tensor([0.0, 3.0, 0.0]), torch.tensor([6.0, 9.0, 0.0])
    first["num_items_in_batch"] = second["num_items_in_batch"] = torch.tensor(12)
    dropped = drop_rows_without_gradient([first, second], ["num_items_in_batch", "of another trainer"])
    assert [b["advantages"].tolist() for b in dropped] == [[3.0, 6.0], [9.0]]
    assert [b["completion_ids"][:, 0].tolist() for b in dropped] == [[2, 1], [2]]
    assert [b["share"] for b in dropped] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert [b["num_items_in_batch"].item() for b in dropped] == [pytest.approx(8), pytest.approx(4)]


def test_rows_that_are_trained_without_advantage_stay():
    first, second = batch([(1, 1)] * 3), batch([(1, 1)] * 3)
    for b in (first, second):
        b["advantages"], b["is_trained"] = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, False, True])
    dropped = drop_rows_without_gradient([first, second], [])
    assert [b["advantages"].tolist() for b in dropped] == [[1.0, 0.0], [1.0, 0.0]]
    assert [b["is_trained"].all().item() for b in dropped] == [True, True]


def test_a_step_without_any_advantage_still_has_its_forward_passes():
    batches = [batch([(1, 1)] * 3) for _ in range(2)]
    for b in batches:
        b["advantages"] = torch.zeros(3)
    assert [len(b["advantages"]) for b in drop_rows_without_gradient(batches, [])] == [1, 1]


# Through the trainer: one generation of 4 prompts x 4, four micro-batches, two optimizer steps

SHAPE = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2}


def make_rows() -> Dataset:
    """Prompts and demonstrations of many lengths; two prompts have no demonstration."""
    walks = to_dataset(split_walks(train_size=4, test_size=1, length=3)["train"])
    rows = with_demonstrations(walks, [["a" * 15], [], ["b#b"], None])
    return rows.map(lambda row, i: {"prompt": row["prompt"] * (1 + i)}, with_indices=True)


@pytest.fixture
def rows() -> Dataset:
    return make_rows()


def step_gradients(trainer, perturbed=True, seed=0):
    """Loss and gradients of the two optimizer steps of one generation, from the same weights."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    torch.manual_seed(seed)
    generation = [row for row in trainer.train_dataset for _ in range(4)]
    results = []
    shapes = []
    for step in range(2):
        trainer.model.zero_grad()
        loss = 0.0
        for _ in range(2):
            inputs = trainer._prepare_inputs(generation)
            if perturbed and trainer._step == 0:
                generator = torch.Generator().manual_seed(1)
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            shapes.append((*inputs["prompt_ids"].shape, inputs["completion_ids"].size(1)))
            micro_loss = trainer.compute_loss(trainer.model, inputs)
            micro_loss.backward()
            loss += micro_loss.item()
            trainer._step += 1
        trainer.state.global_step = step + 1
        results.append((loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}))
    return results, shapes


def assert_same_steps(ours, theirs, tolerance=1e-6):
    for (loss, gradients), (expected_loss, expected) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance, abs=tolerance)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 10 * tolerance * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_a_steps_loss_does_not_change(make_trainer, rows, loss_type, beta):
    options = {"loss_type": loss_type, "beta": beta, "model_init_kwargs": {"dtype": torch.float64}, **SHAPE}
    theirs, padded = step_gradients(make_trainer(rows, trim_padding=False, **options))
    ours, trimmed = step_gradients(make_trainer(rows, trim_padding=True, **options))
    assert_same_steps(ours, theirs)
    assert len(set(padded)) == 1
    assert sum(b * (p + c) for b, p, c in trimmed) < 0.9 * sum(b * (p + c) for b, p, c in padded)


def test_micro_batches_alone_change_for_bnpo(make_trainer, rows):
    # its mean is over a micro-batch, and other rows share one: trimming alone leaves it as it is
    options = {"loss_type": "bnpo", "num_iterations": 2, "steps_per_generation": 3, "per_device_train_batch_size": 4}
    trainer = make_trainer(rows.select(range(3)), gradient_accumulation_steps=2, **options)
    torch.manual_seed(0)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    generation = [row for row in trainer.train_dataset for _ in range(4)]
    trainer._prepare_inputs(generation)
    # iterations cut the generation into other steps (3 micro-batches, 2 a step): rows stay, padding goes
    assert [len(b["advantages"]) for b in trainer._buffered_inputs] == [4, 4, 4]
    assert len({b["prompt_ids"].size(1) + b["completion_ids"].size(1) for b in trainer._buffered_inputs}) > 1


def some_right(prompts, completions, **kwargs):
    """Of the prompts of `make_rows`: all right, all wrong, or only the demonstration right."""
    return [
        float(len(p) == 30 or (len(p) != 60 and c in ("a" * 15, "b#b")))
        for p, c in zip(prompts, completions, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 6])  # with 6 the micro-batches of a step keep different numbers of rows
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_skipping_rows_without_advantage_changes_no_gradient(make_trainer, rows, loss_type, seed):
    options = {"loss_type": loss_type, "reward": some_right, **SHAPE}
    theirs, _ = step_gradients(make_trainer(rows, **options), seed=seed)
    ours, shapes = step_gradients(make_trainer(rows, skip_zero_advantages=True, **options), seed=seed)
    assert_same_steps(ours, theirs, tolerance=2e-6)
    assert len(shapes) == 4  # every forward pass still happens
    assert sum(b for b, _, _ in shapes) < 16
    assert (seed == 0) == all(shapes[i][0] == shapes[i + 1][0] for i in (0, 2))


# Demonstrations that are trained without an advantage, or averaged apart
APART = [
    {"demonstration_loss": "sft", "advantage_baseline": "on_policy"},
    {"demonstration_loss": "sft", "advantage_baseline": "on_policy", "loss_type": "grpo", "success_gate": 0.0},
    {"demonstration_loss": "sft", "advantage_baseline": "on_policy", "prefix_max": 0.5},
    {
        "demonstration_loss": "chord_phi", "advantage_baseline": "on_policy", "demonstration_average": "token",
        "demonstration_weight": 0.4, "rollout_weight": "complement", "loss_type": "dapo",
    },
    {"demonstration_average": "sequence", "success_gate": 0.0, "loss_type": "dapo"},
    {"demonstration_average": "sequence", "loss_type": "grpo"},
]  # fmt: skip
OF_MICRO_BATCHES = ("off_policy/loss", "groups/push_to_pull")


@pytest.mark.parametrize("options", APART)
def test_demonstrations_that_need_no_advantage_are_not_skipped(make_trainer, rows, options):
    options = {"reward": some_right, "model_init_kwargs": {"dtype": torch.float64}, **SHAPE, **options}
    whole, skipping = make_trainer(rows, **options), make_trainer(rows, skip_zero_advantages=True, **options)
    theirs, _ = step_gradients(whole, seed=0)
    ours, shapes = step_gradients(skipping, seed=0)
    assert_same_steps(ours, theirs)
    assert 4 <= sum(b for b, _, _ in shapes) < 16
    means, expected = skipping._means.take(), whole._means.take()
    for name in OF_MICRO_BATCHES:
        assert means[name] == pytest.approx(expected[name], rel=1e-5), name
    assert expected["off_policy/loss"] != 0


@pytest.mark.parametrize(
    "option",
    [
        {"beta": 0.1},
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5},
        {"loss_type": "bnpo"},
        {"trim_padding": False},
    ],
)
def test_rows_that_others_use_are_not_skipped(config, option):
    [(name, _)] = option.items()
    with pytest.raises(ValueError, match=f"skip_zero_advantages=True cannot be combined with {name}="):
        config(skip_zero_advantages=True, **option)


# Packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded(make_trainer, rows, attention):
    options = {"model_init_kwargs": {"attn_implementation": attention}, "beta": 0.1, **SHAPE}
    theirs, _ = step_gradients(make_trainer(rows, trim_padding=False, **options))
    ours, _ = step_gradients(make_trainer(rows, packed_forward=True, **options))
    assert_same_steps(ours, theirs, tolerance=1e-5)


def test_packing_depends_on_the_positions(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    padded = model(input_ids=ids).logits
    layout = Layout.of_masks(torch.ones_like(ids).bool(), 2)
    packed = layout.pack(ids)
    with_restarts = model(input_ids=packed, position_ids=layout.position_ids, use_cache=False).logits.view_as(padded)
    without = model(input_ids=packed, position_ids=torch.arange(8)[None], use_cache=False).logits.view_as(padded)
    torch.testing.assert_close(with_restarts, padded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without[0], padded[0], rtol=1e-5, atol=1e-5)
    assert (without[1] - padded[1]).abs().max() > 0.01  # the second sequence saw the first


def test_packing_is_off_where_it_would_be_slower(make_trainer, rows):
    assert not make_trainer(rows)._packs
    trainer = make_trainer(rows)
    trainer.model.config._attn_implementation = "flash_attention_2"
    assert trainer._packing_is_on()


# Forward passes of a generation


def test_demonstrations_need_no_old_log_probs(make_trainer, rows, monkeypatch):
    trainer = make_trainer(rows, beta=0.1, **SHAPE)
    trainer.model.train()
    scored = []
    forward = GRPOTrainer._get_per_token_logps_and_entropies

    def counting(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
        scored.append((model is self.ref_model, *input_ids.shape))
        return forward(self, model, input_ids, attention_mask, logits_to_keep, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    output = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(4)])
    for is_reference in (True, False):
        assert sum(n for r, n, _ in scored if r == is_reference) == 14  # of 16 rows two are demonstrations
    assert max(width for *_, width in scored) <= output["prompt_ids"].size(1) + output["completion_ids"].size(1)
    assert (output["old_per_token_logps"][output["off_policy_mask"]] == 0).all()

    trainer.args.trim_padding = False
    full = forward(
        trainer, trainer.model, torch.cat([output["prompt_ids"], output["completion_ids"]], 1),
        torch.cat([output["prompt_mask"], output["completion_mask"]], 1), output["completion_ids"].size(1),
    )[0]  # fmt: skip
    on_policy = output["completion_mask"].bool() & ~output["off_policy_mask"]
    torch.testing.assert_close(
        output["old_per_token_logps"][on_policy], full[on_policy].detach(), rtol=1e-5, atol=1e-5
    )
