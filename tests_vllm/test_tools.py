"""Rollouts that call a tool, sampled by a real vLLM in the same process, beside trajectories: `make test-vllm`."""

import pytest
import vllm.model_executor.layers.utils
from test_vllm import keep_linear_weights  # and what vLLM takes from the environment

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.tasks.letter_chain import Links, build_chain_tokenizer
from tests.acting_model import chain_rows, save_acting_model


GROUP, STEPS = 4, 2


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm-tools")
    # Heads of a size that vLLM's attention has on a CPU
    save_acting_model(directory / "model", hidden_size=64, num_attention_heads=2)
    args = LuffyConfig(
        output_dir=str(directory / "out"), num_generations=GROUP, per_device_train_batch_size=4 * GROUP,
        max_completion_length=24, max_steps=STEPS, learning_rate=1e-3, logging_steps=1, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, shuffle_dataset=False, use_vllm=True,
        vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_max_model_length=64,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.model_executor.layers.utils, "dispatch_cpu_unquantized_gemm", keep_linear_weights)
        return LuffyTrainer(
            str(directory / "model"),
            lambda completions, **kwargs: [float(len(completion)) for completion in completions],
            args,
            train_dataset=chain_rows([True, False] * 4),
            processing_class=build_chain_tokenizer(),
            environment_factory=Links,
        )


def test_rollouts_act_and_trajectories_are_replayed(trainer, monkeypatch):
    batches, score = [], trainer._generate_and_score_completions

    def recording(inputs):
        batches.append(score(inputs))
        return batches[-1]

    monkeypatch.setattr(trainer, "_generate_and_score_completions", recording)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(batches) == STEPS
    tokenizer = trainer.processing_class
    for line, batch in zip(lines, batches, strict=True):
        assert line["groups/guided"] == 0.5
        assert line["off_policy/length"] == 11
        assert line["tools/call_frequency"] > 0
        is_demonstration = batch["off_policy_mask"].any(1)
        acted = ~is_demonstration & (batch["tool_mask"] == 0).logical_and(batch["completion_mask"] == 1).any(1)
        assert is_demonstration.sum() == 2
        assert acted.any()
        # vLLM's log-probs are of what the policy wrote, and agree with the trainer's there
        own = batch["completion_mask"].bool() & batch["tool_mask"].bool() & ~is_demonstration[:, None]
        sampled, ours = batch["sampling_per_token_logps"], batch["old_per_token_logps"]
        assert (sampled - ours)[own].abs().mean() < 0.1
        assert sampled[batch["off_policy_mask"]].isnan().all()
        assert (batch["importance_sampling_ratio"][is_demonstration] == 1).all()
        for ids, mask in zip(batch["completion_ids"][acted], batch["tool_mask"][acted], strict=True):
            given = tokenizer.decode(ids[mask == 0])
            assert given.startswith("=")  # what the tool said, and the opening of the next turn
            assert "|" in given
