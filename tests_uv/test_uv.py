"""The scripts of `examples/` as `uv run` starts them, from an empty directory: `make test-uv`.

The wheel in `dist` stands in for the git repository that the scripts name; all else comes from the package index.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_examples import SCRIPTS, SHORT
from tests.test_train_script import build_text_model


ROOT = Path(__file__).parents[1]
UV = Path(sys.prefix).with_name(f"{Path(sys.prefix).name}-uv") / "bin" / "uv"
# The tested torch, of which pip finds a build for CPUs where there is one: the newest brings gigabytes of CUDA
CONSTRAINED = '# [tool.uv]\n# constraint-dependencies = ["torch==2.13.0"]\n#\n# [tool.uv.sources]'
FOUND_BY_PIP = os.environ.get("PIP_FIND_LINKS", "").split()


def uv_run(script: Path, directory: Path, *arguments) -> str:
    places = [ROOT / "dist", *FOUND_BY_PIP]
    copy = directory / script.name
    copy.write_text(script.read_text().replace("# [tool.uv.sources]", CONSTRAINED))
    links = [part for place in places for part in ("--find-links", place)]
    command = [UV, "run", "--no-sources", "--python", sys.executable, *links, copy, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=directory, env=environment, capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_names_is_all_it_needs(script, tmp_path):
    assert "usage" in uv_run(script, tmp_path, "--help")


def test_a_script_trains(tmp_path):
    build_text_model(["What is 7 * 8? 7 * 8 = 56."] * 4, tmp_path / "model")
    output = ["--output_dir", "out", *SHORT]
    uv_run(ROOT / "examples" / "luffy_own_table.py", tmp_path, "--model", "model", *output)
    [line] = [
        line for line in json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"] if "loss" in line
    ]
    assert line["off_policy/reward"] == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
