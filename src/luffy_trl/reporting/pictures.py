"""The page's panels as PNGs, for a paper or a README."""

import math
from collections.abc import Sequence
from pathlib import Path

from .logs import Run
from .page import Filled, look


MOST_INSIDE, COLUMNS = 6, 2
LINE_STYLES = {"": "-", "6 4": "--", "2 3": ":", "8 3 2 3": "-."}


def write_pictures(directory: Path, runs: Sequence[Run], panels: Filled) -> list[Path]:
    """One PNG a panel; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    paths = []
    for panel, series in panels:
        # a legend of many lines goes below the curves, in columns
        below = math.ceil(len(series) / COLUMNS) if len(series) > MOST_INSIDE else 0
        figure, ax = plt.subplots(figsize=(5, 3.2 + 0.17 * below), constrained_layout=True)
        for one in series:
            color, dashes = look(one, len(runs))
            name = f"{runs[one.run].name}: {one.label}" if len(runs) > 1 else one.label
            marker = "o" if len(one.points) == 1 else None
            label = name.replace("$", r"\$").lstrip("_")  # neither mathematics nor hidden
            ax.plot(*zip(*one.points, strict=True), label=label, color=color, ls=LINE_STYLES[dashes], marker=marker)
        ax.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
        ax.grid(alpha=0.3)
        if below:
            figure.legend(loc="outside lower center", ncols=COLUMNS, fontsize="x-small")
        else:
            ax.legend(fontsize="small")
        paths.append(directory / f"{panel.key}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths
