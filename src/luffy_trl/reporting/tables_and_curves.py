"""Tables and curves of a comparison between runs."""

from collections.abc import Sequence
from pathlib import Path


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal or a README's code block: first column to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        return "   ".join([row[0].ljust(len(first)), *rest])

    return "\n".join([line(cells[0]), "-" * len(line(cells[0])), *map(line, cells[1:])])


def plot_curves(
    path: str | Path,
    curves: dict[str, dict[str, list[float]]],
    panels: dict[str, tuple[str, str]],
    title: str,
) -> None:
    """Save one picture with a panel per metric and a line per run.

    Args:
        path: where to, a .png.
        curves: run -> {"step": [...], metric: [...], ...}.
        panels: metric -> (its title, "linear" or "log").
        title: of the whole picture.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), constrained_layout=True)
    for ax, (metric, (panel_title, scale)) in zip(axes, panels.items(), strict=True):
        # Thinner and later ones on top, so that lines which coincide all show
        for i, (run, values) in enumerate(curves.items()):
            ax.plot(values["step"], values[metric], label=run, linewidth=3.5 - i, alpha=0.85)
        ax.set(title=panel_title, xlabel="optimizer step", yscale=scale)
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
