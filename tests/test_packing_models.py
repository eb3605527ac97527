"""Packing on models of many families: used where packed rows equal padded ones, and nowhere else.

Random models of two layers, with weights that are large enough for what leaks to show. Their kernels are
torch's here, which read no boundaries: linear attention, state spaces and convolutions leak on a CPU whatever they are
told, and must be found out. What is right is measured: packed against padded rows, other ones than the check's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl import GRPOConfig, GRPOTrainer

from luffy_trl.padding.config import PaddingFreeConfig
from luffy_trl.padding.mixin import PaddingFreeMixin
from luffy_trl.padding.packing import Layout, accepted
from luffy_trl.padding.packing_check import Agreement

from .conftest import SMALL_RUN
from .run_two_processes import letters_reward
from .test_padding import SHAPE, assert_same_steps, step_gradients


class PaddingFreeTrainer(PaddingFreeMixin, GRPOTrainer):
    pass


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DELTA_RULE = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}

# Config options by family, "sdpa" where there is no other word; what is "packed" equals padded rows
PACKED: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": EXPERTS,
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo3": {"sliding_window": 5},
    "cohere2": {"sliding_window": 5},
    "glm4": {},
    "granite": {},
    "granitemoe": EXPERTS,
    "gptj": GPT,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
LEAKING: dict[str, dict[str, Any]] = {
    # masks that do not look at positions
    "gpt_oss": {"sliding_window": 5, **EXPERTS},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    # linear attention
    "qwen3_next": {"shared_expert_intermediate_size": 16, **DELTA_RULE, **EXPERTS},
    "qwen3_5_text": {"rope_parameters": MROPE, **DELTA_RULE},
    "olmo_hybrid": DELTA_RULE,
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        **EXPERTS,
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8, **EXPERTS},
    # convolutions
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **EXPERTS},
    # state spaces, alone or beside attention
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        **EXPERTS,
    },
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
        **MAMBA,
        **EXPERTS,
    },
    "zamba2": {
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8},
    # these take in the padding to their left, too
    "recurrent_gemma": {"attention_window_size": 16, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    # TRL gives a padded row of these the positions of its padding: neither row is the other's equal
    "gpt2": GPT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 5},
    "gpt_bigcode": GPT,
}
ONLY_EAGER = {"gemma2", "gptj", "gpt_oss", "bloom", "mpt", "gpt_neo", "mamba", "mamba2", "falcon_mamba"}


def make_model(family: str, attention: str | None = None, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL | (PACKED | LEAKING)[family] | options)
    attention = attention or ("eager" if family in ONLY_EAGER else "sdpa")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def make_vision_language_model() -> PreTrainedModel:
    torch.manual_seed(0)
    text = SMALL | {"rope_parameters": MROPE}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = CONFIG_MAPPING["qwen2_5_vl"](text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")


@pytest.fixture
def make(tmp_path, tokenizer) -> Callable[..., PaddingFreeTrainer]:
    """A trainer of the model on prompts of several lengths; keyword arguments go to its config."""

    def make(model: PreTrainedModel, trainer_class=PaddingFreeTrainer, peft_config=None, **options):
        common = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
        config_class = PaddingFreeConfig if trainer_class is PaddingFreeTrainer else GRPOConfig
        args = config_class(**(SMALL_RUN | common | options))
        prompts = Dataset.from_dict({"prompt": ["Da:", "Db" * 5 + ":", "C" * 3, "Dd+1+2:"]})
        return trainer_class(model, letters_reward, args, prompts, processing_class=tokenizer, peft_config=peft_config)

    return make


def rows() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask of four padded rows, and the width of their completions."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 30, (4, 21), generator=generator)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate([(2, 9), (7, 3), (1, 12), (5, 7)]):
        mask[row, 9 - prompt : 9 + completion] = 1
    return ids * mask, mask, 12


@torch.no_grad()
def largest_difference(trainer: PaddingFreeTrainer) -> float:
    """Of the trainer's packed forward pass from TRL's padded one, in log-probs; infinite if the model refuses it."""
    ids, mask, width = rows()
    trainer.model.eval()
    trainer._attend_apart()  # as before the check
    padded = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, ids, mask, width)[0]
    try:
        packed = trainer._packed_forward(trainer.model, ids, mask, width)[0]
    except ValueError as error:
        assert "can't keep packed sequences apart without" in str(error)  # noqa: PT017 - of newer Transformers
        return math.inf
    return (packed - padded)[mask[:, -width:].bool()].abs().max().item()


def is_refused(make, model: PreTrainedModel, **options) -> bool:
    trainer = make(model, **options)
    trainer.args.packed_forward = True
    trainer._packs = trainer._packing_is_on()
    try:
        trainer._check_packing()
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("family", [*PACKED, *LEAKING])
def test_the_verdict_is_what_is_measured(make, family):
    difference = largest_difference(make(make_model(family)))
    assert difference < 1e-4 if family in PACKED else difference > 0.01
    asked = partial(make, make_model(family), packed_forward=True)
    if difference < 1e-4:
        assert asked()._packs
    else:
        with pytest.raises(ValueError, match=f"packed_forward=True cannot be used: .* \\({family}, "):
            asked()


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "mixtral", "lfm2", "bamba"])
@pytest.mark.parametrize(("dtype", "attention"), [(torch.bfloat16, "sdpa"), (torch.float16, "eager")])
def test_the_verdict_in_half_precision(make, family, dtype, attention):
    assert is_refused(make, make_model(family, attention).to(dtype)) == (family in LEAKING)


def test_the_verdict_under_autocast(make):
    assert not is_refused(make, make_model("qwen2"), bf16=True)
    assert is_refused(make, make_model("lfm2"), bf16=True)


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_the_verdict_on_an_adapter(make, family):
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    assert is_refused(make, make_model(family), peft_config=lora) == (family in LEAKING)


def test_the_verdict_on_text_for_a_model_of_images(make):
    # its attention on a CPU does not see positions of two dimensions restart
    difference = largest_difference(make(make_vision_language_model()))
    assert is_refused(make, make_vision_language_model()) == (difference > 0.01)


def test_the_refusal_names_model_attention_and_difference(make):
    # which newer Transformers do not refuse by themselves
    with pytest.raises(ValueError, match=r"True cannot be used.*\(jamba, 'sdpa' attention\).*by up to \d.*are padded"):
        make(make_model("jamba"), packed_forward=True)


def test_what_a_model_says_of_packed_rows_is_passed_on(make, monkeypatch):
    # what newer Transformers do where a kernel is missing
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    forward = Qwen2MLP.forward

    def refusing(self, states):
        if len(states) == 1:
            raise ValueError("`scan` can't keep packed sequences apart.\nInstall `ssm`.")
        return forward(self, states)

    monkeypatch.setattr(Qwen2MLP, "forward", refusing)
    said = (
        r"^packed_forward=True cannot be used: this model \(qwen2, 'sdpa' attention\) refuses packed rows: `scan` "
        r"can't keep packed sequences apart\. Install `ssm`\. Leave it out, and rows are padded\.$"
    )
    with pytest.raises(ValueError, match=said):
        make(make_model("qwen2"), packed_forward=True)
    trainer = packs_by_default(make(make_model("qwen2")))
    trainer._check_packing()
    assert not trainer._packs


# By default: on with flash attention, until the check. There is none on a CPU, so only its name is given


@pytest.mark.parametrize(
    ("name", "is_on"),
    [
        ("sdpa", False),
        ("eager", False),
        ("flex_attention", True),
        ("flash_attention_2", True),
        ("flash_attention_3", True),
        ("kernels-community/flash-attn2", True),
        ("kernels-community/flash-attn3", True),
        ("kernels-community/vllm-flash-attn3", True),
        ("kernels-community/flash-attn2@v1:flash_attn", True),
    ],
)
def test_packing_is_on_with_flash_and_flex_attention_alone(make, name, is_on):
    trainer = make(make_model("qwen2"))
    trainer.model.config._attn_implementation = name
    assert trainer._packing_is_on() == is_on


def packs_by_default(trainer: PaddingFreeTrainer) -> PaddingFreeTrainer:
    """As it would be after construction with flash attention."""
    trainer._packs = True
    return trainer


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3", "lfm2", "bamba", "minimax", "recurrent_gemma", "gpt2"])
def test_a_step_by_default_is_grpos(make, family, caplog):
    # float32: sampled tokens could change with rounding, and a step is compared from the same tokens on
    options = {"trim_padding": False, **SHAPE}
    theirs, _ = step_gradients(make(make_model(family), **options), perturbed=False)
    with caplog.at_level("WARNING", logger="luffy_trl"):
        trainer = packs_by_default(make(make_model(family), **options))
        ours, _ = step_gradients(trainer, perturbed=False)
    assert_same_steps(ours, theirs, tolerance=1e-4)
    assert trainer._packs == (family in PACKED)
    said = [record.message for record in caplog.records if "packed_forward is off" in record.message]
    assert len(said) == (family in LEAKING)
    assert all(f"({family}, 'sdpa' attention)" in message for message in said)


@pytest.mark.parametrize("asked", [True, None])
def test_the_check_leaves_no_trace(make, asked):
    model = make_model("lfm2" if asked is None else "qwen2", attention_dropout=0.5)
    frozen = list(model.modules())[3]
    trainer = make(model)
    trainer.args.packed_forward, trainer._packs = asked, True
    model.train()
    frozen.training = False
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    trainer._check_packing()
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert trainer._packs == (asked is True)  # dropout is no difference


def test_the_check_runs_once(make, monkeypatch):
    trainer = packs_by_default(make(make_model("qwen2")))
    runs = []
    monkeypatch.setattr(trainer, "_try_packing", lambda: runs.append(1) or (Agreement(True, 0.0),) * 2)
    trainer.train()
    assert runs == [1]
    trainer = make(make_model("qwen2"))  # padded: nothing to check
    monkeypatch.setattr(trainer, "_try_packing", lambda: runs.append(1))
    trainer.train()
    assert runs == [1]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_process_decides_for_all(make, monkeypatch, elsewhere):
    trainer = packs_by_default(make(make_model("qwen2")))
    monkeypatch.setattr(
        "luffy_trl.padding.forward.gather_object",
        lambda own: [*own, (elsewhere, 0.3, elsewhere, 0.3)],  # another process's verdict
    )
    trainer._check_packing()
    assert trainer._packs == elsewhere


# What is passed


def test_boundaries_are_transformers_own():
    from transformers import DataCollatorWithFlattening

    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    expected = collate([{"input_ids": [5] * length} for length in (3, 1, 4)])
    ours = Layout.of_masks(mask.bool(), 2).boundaries()
    assert ours.keys() == expected.keys() - {"input_ids", "labels", "position_ids"}
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name])


def test_a_kernel_that_reads_boundaries_is_given_them(make, monkeypatch):
    # what causal-conv1d does with seq_idx, and torch's stand-in does not
    from transformers.models.lfm2 import modeling_lfm2

    whole = modeling_lfm2.causal_conv1d_fn

    def by_sequence(states, *args, seq_idx=None, **kwargs):
        if seq_idx is None:
            return whole(states, *args, **kwargs)
        lengths = seq_idx[0].unique(return_counts=True)[1].tolist()
        return torch.cat([whole(part, *args, **kwargs) for part in states.split(lengths, dim=-1)], dim=-1)

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", by_sequence)
    trainer = make(make_model("lfm2"), packed_forward=True)
    assert largest_difference(trainer) < 1e-5


@pytest.mark.parametrize("module", ["qwen3_next", "qwen3_5"])
def test_linear_attention_is_given_boundaries(make, monkeypatch, module):
    # what flash-linear-attention does with cu_seqlens, and causal-conv1d with seq_idx
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_next import modeling_qwen3_next

    modeling = {"qwen3_next": modeling_qwen3_next, "qwen3_5": modeling_qwen3_5}[module]
    rule, convolve = modeling.torch_chunk_gated_delta_rule, modeling.causal_conv1d_fn

    def by_sequence(query, key, value, g, beta, cu_seqlens=None, seq_idx=None, **kwargs):
        lengths = [query.size(1)] if cu_seqlens is None else cu_seqlens.diff().tolist()
        parts = zip(*(x.split(lengths, dim=1) for x in (query, key, value, g, beta)), strict=True)
        outputs = [rule(q, k, v, g=g, beta=b, **kwargs)[0] for q, k, v, g, b in parts]
        return torch.cat(outputs, dim=1), None

    def convolved_by_sequence(states, *args, seq_idx=None, **kwargs):
        lengths = [states.size(-1)] if seq_idx is None else seq_idx[0].unique(return_counts=True)[1].tolist()
        return torch.cat([convolve(part, *args, **kwargs) for part in states.split(lengths, dim=-1)], dim=-1)

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", by_sequence)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", convolved_by_sequence)
    family = {"qwen3_next": "qwen3_next", "qwen3_5": "qwen3_5_text"}[module]
    trainer = make(make_model(family), packed_forward=True)
    assert largest_difference(trainer) < 1e-4


def test_a_leak_in_training_alone_is_found(make, monkeypatch):
    # fused kernels of state spaces run in training only
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    forward = Qwen2MLP.forward

    def leaking(self, states):
        return forward(self, states + 0.1 * states.cumsum(1) if self.training and len(states) == 1 else states)

    monkeypatch.setattr(Qwen2MLP, "forward", leaking)
    assert is_refused(make, make_model("qwen2"))


def test_a_small_leak_in_half_precision_is_found(make, monkeypatch):
    # smaller than what rounding makes of a padded row
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: forward(self, x + 0.02 * x.cumsum(1) * (len(x) == 1)))
    assert is_refused(make, make_model("qwen2").to(torch.bfloat16))


def test_a_forward_without_keyword_arguments_gets_what_it_takes():
    def takes_all(input_ids, **kwargs): ...

    def takes_positions(input_ids, position_ids=None): ...

    arguments = {"position_ids": 1, "seq_idx": 2}
    assert accepted(takes_all, arguments) == arguments
    assert accepted(takes_positions, arguments) == {"position_ids": 1}
