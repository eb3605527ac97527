"""Tiny models, tokenizers and datasets, made on the spot: CPU, float32, no network."""

import os
import signal


# Before any Hugging Face import: nothing in the tests may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# The models are tiny: a second thread hardly helps them, and on a busy machine the threads' waiting is all the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from luffy_trl import LuffyConfig, LuffyTrainer
from luffy_trl.tasks.letter_walk import build_tokenizer, split_walks, to_dataset

from .run_two_processes import letters_reward


# Seconds after which a process that a test has started is taken to be hung: no measure of its speed
HUNG = 1200

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the folder of real problems and traces is not here ({SHARED_DATA})")
    return SHARED_DATA


def pytest_configure():
    # A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # fast tests first


@pytest.fixture(autouse=True)
def every_warning_is_new():
    """What is warned of once a process is warned of once a test."""
    MultiProcessAdapter.warning_once.cache_clear()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def save_tiny_qwen2(directory: Path, tokenizer: PreTrainedTokenizerBase, **options) -> Path:
    """A randomly initialised Qwen2 of two layers with this tokenizer, saved there."""
    torch.manual_seed(0)
    small = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**(small | options))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tokenizer) -> Path:
    """Of the letter walk, with peaked distributions: ratios and clips that matter."""
    return save_tiny_qwen2(
        tmp_path_factory.mktemp("tiny-model"),
        tokenizer,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    """Any text, byte by byte, with ChatML's tokens for turns; EOS is `<|endoftext|>`, as in Qwen's base models."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], eos_token=special[0], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    return tokenizer


@pytest.fixture(scope="session")
def chat_model_dir(tmp_path_factory, chat_tokenizer) -> Path:
    """Reads any text; without a chat template."""
    return save_tiny_qwen2(tmp_path_factory.mktemp("chat-model"), chat_tokenizer, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def acting_model(tmp_path_factory) -> Path:
    """Calls the letter chain's tool now and then."""
    from .acting_model import save_acting_model

    return save_acting_model(tmp_path_factory.mktemp("acting-model"))


# What `speaking_model` says
SAID = "1 + 1 = 2\n</think>\n\nThe answer is \\boxed{2}"


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory) -> Path:
    """A tiny model that has learned to say the same to everything, and says it most of the time at T = 0.6."""
    from .test_train_script import build_text_model

    directory = tmp_path_factory.mktemp("speaking-model")
    torch.manual_seed(0)
    build_text_model([SAID] * 4, directory)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    said = tokenizer(SAID, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        prompt = torch.randint(len(tokenizer), (8, 5 + step % 20))
        opening = tokenizer("assistant\n<think>\n", return_tensors="pt")["input_ids"].expand(8, -1)
        answer = torch.cat([said, torch.tensor([[tokenizer.eos_token_id]])], dim=1).expand(8, -1)
        ids = torch.cat([prompt, opening, answer], dim=1)
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - answer.shape[1], -100, ids)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def walks() -> Dataset:
    """16 letter walks, each with a demonstration."""
    return to_dataset(split_walks(train_size=16, test_size=1, length=4)["train"])


# Of a run of seconds on a CPU: fields of LuffyConfig, and flags of `train.py`
SMALL_RUN = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
}

MakeTrainer = Callable[..., LuffyTrainer]


@pytest.fixture
def config(tmp_path) -> Callable[..., LuffyConfig]:
    def make(**overrides) -> LuffyConfig:
        options = {
            **SMALL_RUN,
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return LuffyConfig(**(options | overrides))

    return make


@pytest.fixture
def make_trainer(config, tiny_model_dir, walks, tokenizer) -> MakeTrainer:
    """A LuffyTrainer on the tiny model; keyword arguments go to LuffyConfig."""

    def make(dataset: Dataset = walks, reward=letters_reward, trainer_options: dict | None = None, **overrides):
        return LuffyTrainer(
            str(tiny_model_dir),
            reward,
            config(**overrides),
            train_dataset=dataset,
            processing_class=tokenizer,
            **(trainer_options or {}),
        )

    return make
