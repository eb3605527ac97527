"""`luffy-trl env`: one command for a bug report, without what is no one's business."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from luffy_trl.commands import env
from luffy_trl.commands.cli import main


SECRET = "hf_PlantedTokenThatMustNotLeak0123456789"


def told(capsys) -> dict[str, str]:
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("- ") for line in lines)
    return dict(line.removeprefix("- ").split(": ", 1) for line in lines)


@pytest.fixture
def accelerate_config(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "home" / "default_config.yaml"
    path.parent.mkdir()
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.setattr(env, "default_config_file", str(path))
    return path


def test_it_tells_versions_and_hardware(capsys, accelerate_config):
    facts = told(capsys)
    assert facts["python"] == platform.python_version()
    for package in ("trl", "transformers", "torch", "accelerate", "datasets", "huggingface_hub", "peft", "deepspeed"):
        assert facts[package] == version(package)
    assert "vllm" in facts["not installed"].split(", ")
    assert facts["CPUs"] == str(os.cpu_count())
    assert facts["GPUs"] == ", ".join(env.gpus()) or facts["GPUs"] == "none"
    assert facts["CUDA of torch"] == str(torch.version.cuda)
    [size, unit] = facts["memory"].split()
    assert (int(size) > 0, unit) == (True, "GiB")
    assert facts["accelerate's default config"] == "none"


def test_accelerates_configuration_is_shown_without_secrets_and_home(capsys, accelerate_config, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-key-of-this-machine")
    accelerate_config.write_text(
        f"num_processes: 8\ndistributed_type: MULTI_GPU\ntpu_env: [a-key-of-this-machine]\nhub_token: {SECRET}\n"
        f"main_training_function: {SECRET}\ndeepspeed_config_file: {accelerate_config.parent}/zero3.json\n"
    )
    shown = told(capsys)["accelerate's default config"]
    assert "num_processes: 8" in shown
    assert "distributed_type: MULTI_GPU" in shown
    assert "~/zero3.json" in shown
    assert SECRET not in shown
    assert "a-key-of-this-machine" not in shown
    assert str(accelerate_config.parent) not in shown


@pytest.mark.parametrize("content", [b"[", b"\xff\xfe\x00", b"a: !!python/object/apply:os.getcwd []"])
def test_a_configuration_that_cannot_be_read_is_said(content, capsys, accelerate_config):
    accelerate_config.write_bytes(content)
    assert "~/default_config.yaml cannot be read: " in told(capsys)["accelerate's default config"]


def test_it_takes_no_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["env", "--all"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --all" in capsys.readouterr().err
