"""`luffy-trl report`: what runs have logged, and what they wrote, on one page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..reporting import ReportError


PAGE = "report.html"
MOST_COMPLETIONS = 5000  # a page of 28 MB at worst (docs/report.md)


def main(argv: Sequence[str] | None = None, prog: str = "luffy-trl report") -> None:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.completions < 0:
        parser.error(f"--completions {args.completions} must be 0 or more.")
    try:
        runs = [Path(run) for run in args.runs]
        print(report(runs, Path(args.output_dir), args.completions, args.model, args.latest))
    except (ReportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The report may be missing or incomplete.")


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write one HTML page and pictures from the logs and kept completions (log_completions) of runs, "
        "finished or still going.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="OUTPUT_DIR",
        help="output_dir of a run, which may hold earlier runs, too; or a directory with such directories in it",
    )
    add("--output_dir", default="outputs/report", help=f"for {PAGE} and the PNGs (default: outputs/report)")
    add(
        "--completions",
        type=int,
        default=MOST_COMPLETIONS,
        metavar="N",
        help="show at most so many, of evenly spread steps of all runs, but at least one of each "
        f"(default: {MOST_COMPLETIONS}; 0: none)",
    )
    add("--latest", action="store_true", help="of each output_dir the latest run alone, no earlier ones")
    add(
        "--model",
        metavar="DIR",
        help="colour the tokens of the last shown step's first groups by their probability under this saved model",
    )
    return parser


def report(
    directories: list[Path], output_dir: Path, most_completions: int, model: str | None = None, latest: bool = False
) -> str:
    """Write the report, and return what to tell the user.

    Raises:
        ReportError: for a directory that is no run's, or a model that cannot be loaded.
    """
    from ..reporting.completions import read_completions
    from ..reporting.finding import find_runs
    from ..reporting.page import write_page
    from ..reporting.panels import filled_panels
    from ..reporting.pictures import write_pictures

    runs = find_runs(directories, latest)
    share = max(most_completions // len(runs), 1) if most_completions else 0
    kept = [read_completions(run, share) if share else [] for run in runs]
    token_note = ""
    if model is not None:
        from ..reporting.token_probs import color_tokens

        token_note = color_tokens(kept, model)
    panels = filled_panels(runs)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_page(output_dir / PAGE, runs, panels, kept, token_note)
    pictures = write_pictures(output_dir, runs, panels)
    shown = sum(len(group.completions) for steps in kept for step in steps for group in step.groups)
    notes = "".join(f"\n{run.name}: {note}" for run in runs for note in run.notes)
    what = f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {len(panels)} panels, {shown} completions"
    return f"Wrote {output_dir / PAGE} ({what}) and {len(pictures)} PNGs{notes}"
