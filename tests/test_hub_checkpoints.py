"""Checkpoints from the Hub: what is read of them, and that nothing in them runs."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from luffy_trl.runs.checkpoints import damage, find_checkpoint
from luffy_trl.runs.untrusted import is_allowed


class Runs:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def in_cache(tmp_path, monkeypatch) -> Path:
    """Where the checkpoint of `me/run` lies in the Hub's cache."""
    cache = tmp_path / "cache"
    refs = cache / "models--me--run" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache / "models--me--run" / "snapshots" / "abc" / "last-checkpoint"


@pytest.fixture
def trained(in_cache, make_trainer, tmp_path) -> Path:
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "one")).train()
    shutil.copytree(tmp_path / "one" / "checkpoint-1", in_cache)
    (in_cache / "training_args.bin").unlink()
    return in_cache


@pytest.fixture
def repo(in_cache) -> Path:
    """A checkpoint in form, of no model."""
    in_cache.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, in_cache / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({"state": torch.ones(2)}, in_cache / name)
    torch.save({"python": (3, (1, 2), None), "numpy": np.random.get_state()}, in_cache / "rng_state.pth")
    (in_cache / "trainer_state.json").write_text("{}")
    (in_cache / "chat_template.jinja").write_text("")
    return in_cache


def test_a_run_goes_on_from_a_checkpoint_on_the_hub(trained, make_trainer, tmp_path):
    found = Path(find_checkpoint("me/run", tmp_path / "two"))
    assert (found / "optimizer.pt").is_file()
    assert not (found / "chat_template.jinja").exists()
    assert damage(found) is None  # as far as it is read
    assert find_checkpoint(str(found), tmp_path / "two") == str(found)
    trainer = make_trainer(max_steps=2, output_dir=str(tmp_path / "two"))
    trainer.train(resume_from_checkpoint="me/run@main")
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "extra.pt", "latest", "x.pkl",
        ".metadata", "optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata",
        "pytorch_model_fsdp_0/a.json", "global_step1/mp_rank_00_model_states.pt", "global_step1/a.json",
        "optimizer_0/index.npz", "tokenizer.model", "modeling.py", "a/b/index.npz", ".hidden/index.npz", "a/.b.json",
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_not_there_to_be_read(repo, tmp_path, name):
    assert not is_allowed(name)
    path = repo / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    found = Path(find_checkpoint("me/run", tmp_path / "two"))
    assert not (found / name).exists()
    assert not (tmp_path / "ran").exists()


def plain_pickle(value) -> bytes:
    return pickle.dumps(value)


def torch_zip(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def legacy_torch(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def other_zip(value) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
    return stream.getvalue()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"])
@pytest.mark.parametrize("form", [plain_pickle, torch_zip, legacy_torch, other_zip])
def test_a_state_that_would_run_code_is_refused(repo, tmp_path, name, form):
    (repo / name).write_bytes(form({"state": [Runs(tmp_path / "ran")]}))
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint me/run: {name} holds something else than tensors"):
        find_checkpoint("me/run", tmp_path / "two")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"not a pickle", b"\x80\x02(" * 100])
def test_a_state_that_is_none_is_refused(repo, tmp_path, content):
    (repo / "optimizer.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer\.pt holds something else"):
        find_checkpoint("me/run", tmp_path / "two")


def test_a_checkpoint_whose_states_are_pickles_alone_is_refused(repo, tmp_path):
    (repo / "optimizer.pt").unlink()
    (repo / "global_step1").mkdir()
    (repo / "global_step1" / "states.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"has no optimizer\.pt: a checkpoint of DeepSpeed or FSDP holds pickles"):
        find_checkpoint("me/run", tmp_path / "two")


def test_a_damaged_download_is_refused(repo, tmp_path):
    size = (repo / "model.safetensors").stat().st_size
    (repo / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": size + 1, "merges.txt": 3}}))
    with pytest.raises(ValueError, match=r"me/run is damaged: model\.safetensors is not there, or has not the size"):
        find_checkpoint("me/run", tmp_path / "two")


def test_a_trainer_state_that_is_none_is_one_sentence(trained, make_trainer, tmp_path):
    (trained / "manifest.json").unlink()
    trainer = make_trainer(max_steps=2, output_dir=str(tmp_path / "two"))
    for state in ("", "[]", "{}", '{"global_step": "1"}', '{"nothing": 1}', "[" * 10**5):
        (trained / "trainer_state.json").write_text(state)
        with pytest.raises(ValueError, match=r"trainer_state\.json (cannot be read|is no state of a trainer)"):
            trainer.train(resume_from_checkpoint="me/run")
