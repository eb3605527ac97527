"""The notebooks as they are kept; `make notebooks` runs them."""

import re
import tomllib
from pathlib import Path

import nbformat
import pytest


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_four():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_keeps_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    text = path.read_text()
    assert f"colab.research.google.com/github/{repository.removeprefix('https://github.com/')}/blob/main/" in text
    assert f"/blob/main/notebooks/{path.name}" in notebook.cells[0].source
    assert f"git+{repository}" in text

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= 35 for cell in code)
    assert all(cell.execution_count for cell in code), "run `python notebooks/run.py --save`"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_between_notebooks_are_real(path):
    for link in re.findall(r"\]\(([\w.]+\.ipynb)\)", path.read_text()):
        assert (path.parent / link).exists()
