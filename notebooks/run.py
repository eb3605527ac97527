"""Run the notebooks from top to bottom, and fail on the first error."""

import argparse
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).parent
TIMEOUT = 900  # seconds for one cell, on a busy machine too


def worth_keeping(output: nbformat.NotebookNode) -> bool:
    """Not progress bars, sliders (a static figure is beside them) and what libraries say about this machine."""
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return False
    return output.get("name") != "stderr" and "[WARNING] [real_accelerator.py" not in output.get("text", "")


def run(path: Path, save: bool) -> None:
    """Raises nbclient's CellExecutionError, which shows the cell and its traceback, if one fails."""
    start = time.perf_counter()
    print(f"{path.name} ...", flush=True)
    notebook = nbformat.read(path, as_version=4)
    work = FOLDER.parent / "outputs" / "notebooks"  # the base is pretrained once for all of them
    work.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, resources={"metadata": {"path": work}}
    )
    client.execute()
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    print(f"{path.name}: {cells} cells in {time.perf_counter() - start:.0f} s", flush=True)
    if save:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if worth_keeping(output)]
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--save", action="store_true", help="keep the outputs in the notebooks")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    paths = args.notebooks or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        run(path, args.save)
    print(f"{len(paths)} notebooks passed")


if __name__ == "__main__":
    main()
