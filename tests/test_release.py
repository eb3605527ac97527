"""What a wheel of this repository would hold, and that its version is said in one place."""

import subprocess
import sys
import zipfile
from pathlib import Path

import luffy_trl


ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_all_files_of_the_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"luffy_trl-{luffy_trl.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src"
    expected = {
        str(path.relative_to(package))
        for path in (package / "luffy_trl").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= names
    for needed in (
        "py.typed",
        "hub/model_card.md",
        "reporting/report.html",
        "evaluation/paper.yaml",
        "evaluation/tasks/aime24.yaml",
    ):
        assert f"luffy_trl/{needed}" in names


def test_the_version_is_written_once():
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    assert f'__version__ = "{luffy_trl.__version__}"' in (ROOT / "src" / "luffy_trl" / "__init__.py").read_text()
