"""Draw the logs of one or several training runs: loss by quartile of the timestep, gradient norm, speed, evaluations.

A run is a log directory, whose progress.jsonl (or progress.csv) is read; it may be in use.
"""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion import script_util
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.pictures import check_picture_name, save_picture

AXES = {"step": "step", "samples": "images seen", "train_seconds": "hours of training"}
PANELS = {  # key: title, whether the axis is logarithmic
    "loss": ("loss", True),
    "loss_q0": ("loss, first quartile of timesteps", True),
    "loss_q1": ("loss, second quartile", True),
    "loss_q2": ("loss, third quartile", True),
    "loss_q3": ("loss, last quartile", True),
    "grad_norm": ("gradient norm", True),
    "images_per_second": ("images per second", False),
}
COLUMNS = 4
Row = dict[str, float]


# ---------------------------------------------------------------- reading


def read_rows(folder: str | Path) -> list[Row]:
    """The numbers of a run's log, by name, in the order of their steps.

    A step that was logged twice, because a run was killed and resumed, counts as it was logged last.

    :raises UserError: for a folder without a log, and for a log without a row.
    """
    folder = Path(folder)
    lines, table = folder / "progress.jsonl", folder / "progress.csv"
    try:
        if lines.exists():
            rows = read_lines(lines)
        elif table.exists():
            with table.open(newline="") as file:
                rows = [numbers(row) for row in csv.DictReader(file)]
        else:
            what = "a folder without progress.jsonl and progress.csv" if folder.is_dir() else "no folder"
            raise UserError(f"{folder} is {what}: name the log directory of a training run")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the log in {folder} cannot be read ({error}): restore it") from error
    by_step = {row["step"]: row for row in rows if math.isfinite(row.get("step", math.nan))}
    if not by_step:
        raise UserError(f"the log in {folder} has no row yet: wait for the first one (--log_interval)")
    return [by_step[step] for step in sorted(by_step)]


def read_lines(path: Path) -> list[Row]:
    """The rows of progress.jsonl, without one that is only partly written."""
    found = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            found.append(numbers(row) if isinstance(row, dict) else {})
    return found


def numbers(row: dict[str, Any]) -> Row:
    """The values of a row that are numbers, also as text."""
    found = {}
    for key, value in row.items():
        with suppress(TypeError, ValueError):
            found[key] = float(value)
    return found


# ---------------------------------------------------------------- drawing


def draw_runs(path: str, runs: dict[str, list[Row]], x: str) -> None:
    """Draw a panel for every quantity that some run has, with a line for every run.

    :param runs: rows by the name of the run. :param x: one of `AXES`.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = {key for rows in runs.values() for row in rows for key in row}
    panels = {key: style for key, style in PANELS.items() if key in logged}
    panels |= {key: (f"evaluation: {key[5:]}", False) for key in sorted(logged) if key.startswith("eval_")}
    if not panels:
        raise UserError(f"the logs of {', '.join(runs)} have nothing to draw: they are of no training run")
    columns = min(COLUMNS, len(panels))
    shape = (-(-len(panels) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(4.2 * columns, 3.1 * shape[0] + 0.5), dpi=110, squeeze=False)
    for axis, (key, (title, logarithmic)) in zip(axes.flat, panels.items(), strict=False):
        for name, rows in runs.items():
            points = [(row[x], row[key]) for row in rows if key in row and x in row]
            scale = 3600 if x == "train_seconds" else 1
            marker = "o" if key.startswith("eval_") or len(points) == 1 else None
            axis.plot([at / scale for at, _ in points], [y for _, y in points], label=name, lw=1.2, marker=marker, ms=3)
        if logarithmic and all(row[key] > 0 for rows in runs.values() for row in rows if key in row):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.yaxis.set_major_formatter("{x:g}")  # not powers of ten
            axis.yaxis.set_minor_formatter("")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(AXES[x], fontsize=9)
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    figure.canvas.draw()
    save_picture(path, np.asarray(figure.canvas.buffer_rgba())[:, :, :3])
    plt.close(figure)


def run_names(folders: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [Path(folder).absolute().parts for folder in folders]
    most = max(map(len, parts))
    return next(
        (
            names
            for count in range(1, most)
            if len(set(names := ["/".join(each[-count:]) for each in parts])) == len(parts)
        ),
        list(map(str, folders)),
    )


def parse_arguments() -> argparse.Namespace:
    parser = script_util.Parser(description=__doc__)
    parser.add_argument("log_dirs", metavar="LOG_DIR", nargs="+", help="log directories of the runs to compare")
    parser.add_argument("--out", default="runs.png", help="the picture")
    parser.add_argument("--x", default="step", choices=AXES, help="horizontal axis")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    check_picture_name(arguments.out)
    folders = list(dict.fromkeys(arguments.log_dirs))
    runs = {name: read_rows(folder) for name, folder in zip(run_names(folders), folders, strict=True)}
    draw_runs(arguments.out, runs, arguments.x)
    for name, rows in runs.items():
        last = rows[-1]
        shown = [f"{key} {last[key]:.5g}" for key in ("loss", "grad_norm", "images_per_second") if key in last]
        print(f"{name}: {len(rows)} rows to step {last['step']:.0f}" + "".join(f", {value}" for value in shown))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    script_util.run(main)
