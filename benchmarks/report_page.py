"""A report of 10,000 logged steps and 5,000 completions in a headless Chromium: size, and time until all is drawn.

The page's last line writes the milliseconds since it was opened (performance.now()) into an attribute, and Chromium
prints the document as it then is (--dump-dom). The completions are longer than the 4,000 characters that are shown.

    python benchmarks/report_page.py [--chromium chromium]
"""

import argparse
import json
import math
import re
import statistics
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from tqdm import trange

from luffy_trl.commands.report import PAGE, report
from luffy_trl.reporting.panels import PANELS


STEPS, KEPT_STEPS, ROWS = 10_000, 50, 100  # 50 x 100 completions
REPEATS = 5


def write_run(directory: Path) -> None:
    metrics = [metric for panel in PANELS for metric, _ in panel.metrics]
    history = [
        {"step": step, **{m: math.exp(-step / 3000) + 0.1 * math.sin(step * (i + 1)) for i, m in enumerate(metrics)}}
        for step in range(1, STEPS + 1)
    ]
    (directory / "completions").mkdir(parents=True)
    state = {"global_step": STEPS, "max_steps": STEPS, "log_history": history}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    for step in trange(STEPS // KEPT_STEPS, STEPS + 1, STEPS // KEPT_STEPS, desc="Completions", unit="file"):
        rows = {
            "step": step,
            "prompt": [f"Problem {i // 10} of step {step}" for i in range(ROWS)],
            "completion": [f"{i}: so x < {step} & we go on. " * 200 for i in range(ROWS)],
            "reward": [float(i % 3 == 0) for i in range(ROWS)],
            "demonstration": [i % 10 == 9 for i in range(ROWS)],
            "advantage": 0.5,
        }
        pd.DataFrame(rows).to_parquet(directory / "completions" / f"completions_{step:05d}.parquet")


def load_ms(chromium: str, page: Path) -> int:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    run = subprocess.run([chromium, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    ready = re.search(r'data-ready-ms="(\d+)"', run.stdout)
    if ready is None:
        raise RuntimeError(f"The page's script did not reach its end: {run.stderr[-2000:]}")
    return int(ready[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="chromium", help="the browser's command (default: chromium)")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        write_run(Path(folder) / "run")
        print(report([Path(folder) / "run"], Path(folder), ROWS * KEPT_STEPS, None))
        page = Path(folder) / PAGE
        size = page.stat().st_size / 1e6
        times = [load_ms(args.chromium, page) for _ in trange(REPEATS, desc="Drawing the page", unit="time")]
    print(f"{STEPS:,} steps, {ROWS * KEPT_STEPS:,} completions, {size:.1f} MB: drawn after {times} ms, ", end="")
    print(f"median {statistics.median(times):.0f}")


if __name__ == "__main__":
    main()
