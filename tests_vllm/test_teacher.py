"""`luffy-trl make-demonstrations --teacher_backend vllm` with a real vLLM, on its CPU build: `make test-vllm`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from luffy_trl.data.loading import load_splits
from luffy_trl.tasks.letter_walk import build_tokenizer, split_walks


REWARD = "def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make(model: Path, directory: Path) -> str:
    """In a process of its own, which is not one of a distributed run."""
    command = [
        *(sys.executable, "-m", "luffy_trl", "make-demonstrations", "--dataset_name", "problems.jsonl"),
        *("--teacher_backend", "vllm", "--teacher_model_name_or_path", str(model), "--dtype", "float32"),
        *("--vllm_options", '{"max_model_len": 64, "enforce_eager": true}', "--student", str(model), "--logprobs"),
        *("--reward_funcs", "my_rewards.reward", "--num_samples", "3", "--max_tokens", "40", "--temperature", "0.7"),
        *("--output_dir", "out", "--chunk_size", "5"),
    ]
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in distributed}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    ran = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_a_teacher_in_vllm_answers_and_its_log_probs_are_those_at_temperature_1(model, tmp_path):
    walks = split_walks(train_size=5, test_size=1)["train"]
    rows = [{"prompt": walk.prompt(), "solution": walk.answer} for walk in walks]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    printed = make(model, tmp_path)
    lines = (tmp_path / "out" / "_answers").glob("*.jsonl")
    answers = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    assert len(answers) == 15
    assert {answer["finish"] for answer in answers} <= {"stop", "length"}
    assert len({answer["text"] for answer in answers}) > 10
    assert all(answer["completion_tokens"] == len(answer["token_ids"]) <= 40 for answer in answers)
    assert "demonstrations have their teacher's log-probs" in printed

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), build_tokenizer()
    compared = 0
    for row in load_splits(str(tmp_path / "out"), "out")["train"]:
        if row["completion_logps"] is not None:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
            assert row["completion_logps"] == pytest.approx(expected.tolist(), abs=1e-3)
            compared += 1
    assert compared > 1
