"""The README's example runs as printed, but for the model's name and the CPU, and its figures are the repository's."""

import re
import runpy
from pathlib import Path

import pytest

from luffy_trl.commands.demo import READING
from luffy_trl.shaping import SHAPINGS

from .test_train_script import build_text_model


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.splitlines()) <= 23
    build_text_model(["What is 7 * 8? 7 * 8 = 56. The answer is \\boxed{56}"] * 4, tmp_path / "model")
    example = example.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "model"))
    example = example.replace("LuffyConfig(", "LuffyConfig(use_cpu=True, bf16=False, max_completion_length=64, ")
    example = example.replace("max_steps=10", "max_steps=2, logging_steps=1")
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(tmp_path / "example.py"))["trainer"]
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[0]["off_policy/reward"] == 1.0


def test_links_and_names_are_real():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in SHAPINGS:
        assert f"`{name}`" in README
    for path in re.findall(r"(?:recipes|accelerate_configs)/\w+\.yaml", README):
        assert (ROOT / path).exists(), path


def test_the_demos_output_is_of_this_demo():
    assert READING in README
