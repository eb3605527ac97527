"""Kernels, precision, memory and speed on a GPU: `make test-gpu`, under ten minutes.

What it found lies in `benchmarks/results/gpu.json` then. Without a GPU every test is skipped.
"""

import importlib.util
import json
import math
import os
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(Path(__file__).parent)]

from checks import measured_against_counted, packed_against_padded  # noqa: E402
from recorded import LARGE, SMALL, Workload  # noqa: E402


pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="There is no GPU here: what only a GPU can show is not checked."
)
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
# Two prompts of four rows: lengths up to 512 for gradients, up to 8,192 for the large model
ROWS = Workload(prompts=2, group_size=4, micro_batch=4, divide=16)
STEP = Workload(prompts=4, group_size=8, micro_batch=4, divide=1)
FLASH = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2")


@pytest.fixture(scope="module")
def found():
    """What the tests found, by name; written when all have run."""
    results: dict[str, dict] = {"attention": {}, "update_phase": {}, "vllm": {}}
    yield results
    versions = {}
    for name in ("torch", "transformers", "trl", "flash-attn", "kernels", "vllm", "luffy_trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    record = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(0),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "versions": versions,
        **results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{RESULTS.relative_to(ROOT)}")


@pytest.fixture(autouse=True)
def exact_products():
    """float32 is float32; nothing of the last test's stays."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.empty_cache()


def here(attention: str) -> str:
    """The kernel, or a skip that says what is missing."""
    if attention in ("sdpa", "flex_attention"):
        return attention
    if "/" in attention:
        if importlib.util.find_spec("kernels") is None:
            pytest.skip(f"{attention} needs the package kernels, which is not installed.")
        from kernels import get_kernel

        try:
            get_kernel(attention)
        except Exception as error:  # of the network, of the cache, or of no build for this GPU
            pytest.skip(f"{attention} cannot be had here: {type(error).__name__}: {error}")
        return attention
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attention]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{attention} needs the package {package}, which is not installed.")
    return attention


def best_kernel() -> str:
    installed = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if installed else "sdpa"


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("packed", "sdpa"),
        ("packed", "flex_attention"),
        ("shared prompts", "sdpa"),
        ("shared prompts, flex", "flex_attention"),
    ],
)
def test_packed_equals_padded_in_float32(found, name, attention):
    apart = packed_against_padded(name, here(attention), "cuda", torch.float32, ROWS, SMALL)
    found["attention"][f"{name}, {attention}, float32"] = apart
    assert apart["packed"] < 1e-4


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("packed", "sdpa"),
        ("packed", "flex_attention"),
        *(("packed", attention) for attention in FLASH),
        *(("budget", attention) for attention in FLASH),
        ("shared prompts", "sdpa"),
        ("shared prompts, flex", "flex_attention"),
    ],
)
def test_packed_is_as_near_as_padded_in_bfloat16(found, name, attention):
    apart = packed_against_padded(name, here(attention), "cuda", torch.bfloat16, ROWS, SMALL)
    found["attention"][f"{name}, {attention}, bfloat16"] = apart
    assert apart["packed"] < 1.5 * apart["padded"] + 1e-3


@pytest.mark.parametrize("name", ["TRL", "trimmed", "budget", "shared prompts"])
def test_peak_memory_and_speed_are_as_counted(found, name):
    attention = "sdpa" if name == "shared prompts" else best_kernel()
    step = measured_against_counted(name, attention, "cuda", STEP, LARGE)
    found["update_phase"][name] = step
    # What is not counted: copies that a kernel makes, and what the allocator cannot hand out again
    assert 0.6 < step["peak_memory_bytes"] / step["counted_peak_memory_bytes"] < 1.6
    assert step["mfu"] is None or 0.02 < step["mfu"] < 1.0


def test_vllm_samples_from_the_policy(found, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed.")
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29518",
    }
    from datasets import Dataset
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from luffy_trl import LuffyConfig, LuffyTrainer
    from luffy_trl.tasks.letter_walk import build_tokenizer, split_walks, to_dataset

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {**SMALL, "num_hidden_layers": 2, "max_position_embeddings": 128}
    config = Qwen2Config(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = to_dataset(split_walks(train_size=8, test_size=1)["train"]).to_list()
    rows = [{**row, "demonstrations": [row.pop("completion")]} for row in rows]
    args = LuffyConfig(
        output_dir=str(tmp_path / "out"), num_generations=4, per_device_train_batch_size=16, max_completion_length=20,
        max_steps=2, learning_rate=1e-3, logging_steps=1, bf16=True, report_to="none", save_strategy="no",
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.2, vllm_max_model_length=64,
    )  # fmt: skip

    def reward(completions, **kwargs):
        return [len(set(text)) / 20 for text in completions]

    trainer = LuffyTrainer(str(tmp_path / "model"), reward, args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    found["vllm"] = {"logp_differences": [line["sampling/sampling_logp_difference/mean"] for line in lines]}
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert max(found["vllm"]["logp_differences"]) < 0.05
