"""Rows that share a prompt, and packed rows by sdpa and flex attention: the same log-probs and gradients as padded."""

import pytest
import torch
from trl import GRPOTrainer

from luffy_trl.padding.attention import block_mask
from luffy_trl.padding.dealing import Rows
from luffy_trl.padding.packing import Layout

from .test_micro_batches import steps_of
from .test_packing_models import make, make_model  # noqa: F401 - a fixture
from .test_padding import SHAPE, assert_same_steps, make_rows


WIDTH = 12


def grouped_rows() -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Ids and mask of six padded rows, of which three and two have their prompt in common, and their lengths."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 30, (6, 9 + WIDTH), generator=generator)
    rows = Rows([7, 7, 7, 4, 2, 2], [9, 3, 12, 7, 5, 1], [5, 5, 5, 2, 9, 9])
    mask = torch.zeros_like(ids)
    for row, (prompt, completion, group) in enumerate(zip(rows.prompts, rows.completions, rows.groups, strict=True)):
        ids[row, :9] = ids[rows.groups.index(group), :9]
        mask[row, 9 - prompt : 9 + completion] = 1
    return ids * mask, mask, rows


def padded_and_packed(trainer, shared: bool, with_gradient: bool = True):
    """Log-probs and gradients of the rows, by TRL's padded forward pass and in one row."""
    ids, mask, rows = grouped_rows()
    trainer._attend_apart()
    layout = Layout.of(rows, 9, WIDTH, shared=shared, device=ids.device)
    assert layout.is_shared == shared
    trainer.model.train()
    results = []
    for forward in (
        lambda: GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, WIDTH),
        lambda: trainer._packed_forward(trainer.model, ids, mask, WIDTH, layout=layout),
    ):
        trainer.model.zero_grad()
        with torch.set_grad_enabled(with_gradient):
            logps = forward()[0].masked_fill(mask[:, -WIDTH:] == 0, 0)
        if with_gradient:
            (logps * torch.linspace(-1, 1, WIDTH)).sum().backward()
        grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        results.append((logps.detach(), grads))
    return results


def assert_equal(results) -> None:
    (padded, gradients), (packed, packed_gradients) = results
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 2e-6, name


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {}),
        ("llama", {}),
        ("mistral", {"sliding_window": 5}),  # a window that ends within the shared prompt
        ("gemma3_text", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
        ("phi3", {}),
        ("mixtral", {}),
        ("opt", {"dropout": 0.0}),
    ],
)
def test_sequences_of_a_row_are_padded_rows(make, family, options, shared):  # noqa: F811
    assert_equal(padded_and_packed(make(make_model(family, "sdpa", **options)), shared))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"gradient_checkpointing": False}])
def test_layers_that_are_computed_again_share_the_prompt_again(make, options):  # noqa: F811
    assert_equal(padded_and_packed(make(make_model("qwen2", "sdpa"), **options), shared=True))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_flex_attention_of_a_row_is_padded_rows(make, family, shared):  # noqa: F811
    # On a CPU PyTorch has flex attention's forward pass alone, and compiles it for minutes, not for every mask
    with torch.compiler.set_stance("force_eager"):
        trainer = make(make_model(family, "flex_attention"), packed_forward=True)
        assert trainer._packs
        assert_equal(padded_and_packed(trainer, shared, with_gradient=False))


def test_flex_attentions_mask_shows_a_row_itself_and_its_prompt():
    rows = Rows([3, 3, 2], [1, 2, 1], [7, 7, 8])
    layout = Layout.of(rows, 3, 2, shared=True, device=torch.device("cpu"))
    mask = block_mask(layout)
    places = torch.arange(len(layout.source))
    sees = mask.mask_mod(None, None, places[:, None], places[None, :]).int()
    # a b | c r | c s s | x y t
    assert sees.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
def test_a_step_with_shared_prompts_is_the_step_without(make_trainer, loss_type):
    options = {"loss_type": loss_type, "beta": 0.1, "tokens_per_micro_batch": 400, **SHAPE}
    theirs, apart = steps_of(make_trainer(make_rows(), share_prompts=False, **options))
    ours, shared = steps_of(make_trainer(make_rows(), share_prompts=True, **options))
    assert_same_steps(ours, theirs, tolerance=1e-5)
    assert sum(shared) < 0.75 * sum(apart)


def test_short_prompts_are_not_shared_unless_that_is_asked_for(make_trainer, walks):
    def layouts(**options):
        trainer = make_trainer(
            walks.map(lambda row: {"prompt": row["prompt"][:1]}), tokens_per_micro_batch=400, **SHAPE, **options
        )
        steps_of(trainer)
        return [batch["layout"].is_shared for due in trainer._buffered_inputs for batch in due]

    assert not any(layouts())
    assert not any(layouts(share_prompts=True))  # of one token there is nothing to share


@pytest.mark.parametrize(
    ("family", "attention"),
    [("lfm2", "sdpa"), ("qwen2", "eager"), ("gemma3_text", "flex_attention")],
)
def test_models_whose_rows_cannot_share_a_prompt_are_refused(make, family, attention):  # noqa: F811
    model = make_model(family, attention)
    with pytest.raises(ValueError, match=rf"share_prompts=True cannot be used with this model \({family}, "):
        make(model, tokens_per_micro_batch=100, packed_forward=True, share_prompts=True)


def test_a_model_that_does_not_share_as_it_packs_is_found_out(make, monkeypatch):  # noqa: F811
    from luffy_trl.padding import attention

    # attention that does not look at a span's prompt: packed rows are right, shared ones are not
    monkeypatch.setattr(attention.Span, "prefix", property(lambda self: None, lambda self, value: None), raising=False)
    asked = {"tokens_per_micro_batch": 100}
    with pytest.raises(ValueError, match="share_prompts=True cannot be used: rows of a shared prompt do not equal"):
        make(make_model("qwen2"), share_prompts=True, **asked)
    trainer = make(make_model("qwen2"), **asked)
    trainer._check_packing()
    assert trainer._packs
    assert not trainer._shares
