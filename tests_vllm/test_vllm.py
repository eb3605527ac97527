"""Training with a real vLLM in the same process (`vllm_mode="colocate"`), on its CPU build: `make test-vllm`."""

import os


# One process of a distributed run, as vLLM's colocate mode expects
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

import math

import pytest
import torch
import vllm.model_executor.layers.utils
from transformers import Qwen2Config, Qwen2ForCausalLM

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.tasks.letter_walk import build_tokenizer, split_walks, to_dataset


PROMPTS, GROUP = 4, 4
STEPS = 4


def keep_linear_weights(layer, remove_weight):
    """vLLM's CPU build packs linear weights when it loads them and drops the originals: they cannot be updated then.
    On a GPU they stay, as here."""
    layer.cpu_linear = torch.nn.functional.linear


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")

    rows = to_dataset(split_walks(train_size=2 * PROMPTS, test_size=1)["train"]).to_list()
    for i, row in enumerate(rows):  # every other prompt has no demonstration
        row["demonstrations"] = [row.pop("completion")] if i % 2 == 0 else []
    args = LuffyConfig(
        output_dir=str(directory / "out"), num_generations=GROUP, per_device_train_batch_size=PROMPTS * GROUP,
        max_completion_length=20, max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_max_model_length=64,
    )  # fmt: skip

    def reward(completions, **kwargs):
        return [len(set(text)) / 20 for text in completions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.model_executor.layers.utils, "dispatch_cpu_unquantized_gemm", keep_linear_weights)
        from datasets import Dataset

        return LuffyTrainer(str(directory / "model"), reward, args, train_dataset=Dataset.from_list(rows))


def logp_differences(trainer) -> list[float]:
    """Per step, the mean difference between vLLM's log-probs of its samples and the policy's."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
    return [line["sampling/sampling_logp_difference/mean"] for line in lines]


def test_colocate(trainer, monkeypatch):
    asked, batches = [], []
    generate, score = trainer.vllm_generation.generate, trainer._generate_and_score_completions

    def recording_generate(**kwargs):
        asked.append(len(kwargs["prompts"]))
        return generate(**kwargs)

    def recording_score(inputs):
        batches.append(score(inputs))
        return batches[-1]

    monkeypatch.setattr(trainer.vllm_generation, "generate", recording_generate)
    monkeypatch.setattr(trainer, "_generate_and_score_completions", recording_score)
    trainer.train()

    # only rollouts reach vLLM: two of the four prompts of a step have a demonstration
    assert asked == [PROMPTS * GROUP - 2] * STEPS

    for batch in batches:
        is_demonstration = batch["off_policy_mask"].any(1)
        assert is_demonstration.sum() == 2
        # neutral in the correction for vLLM's other numerics, and the only rows that are
        assert (batch["importance_sampling_ratio"][is_demonstration] == 1).all()
        assert (batch["importance_sampling_ratio"][~is_demonstration] != 1).any()
        assert batch["sampling_per_token_logps"][batch["off_policy_mask"]].isnan().all()

    # after each step vLLM samples from the new weights: bf16 against float32 is all that is between them
    in_sync = logp_differences(trainer)
    assert max(in_sync) < 0.1

    # and the check would notice: without the sync it drifts
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    trainer.train()
    assert logp_differences(trainer)[-1] > 3 * max(in_sync)
