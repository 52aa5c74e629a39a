"""The report of a sweep: JSON, a table, heat maps, and which setting is the best, with its interval."""

import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from sweep_grading import HIGHER_IS_BETTER, GradingConfig

from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.files import atomic_write

AXES = {"cfg_scale": "guidance scale", "ema": "EMA", "solver": "solver:steps", "shape": "guidance"}
SHARES = {"class_accuracy", "precision"}  # of images, each of which counts as 0 or 1
LABELS = {"class_accuracy": "class accuracy", "frechet_pixels": "Frechet distance of pixels"}


def read_report(path: Path, settings: dict[str, Any], emas: dict[str, str]) -> dict[str, Any]:
    """The report of an earlier call, or an empty one.

    :raises UserError: for a file of another kind, and for one that was made with other settings or weights.
    """
    if not path.exists():
        return {"settings": settings, "emas": emas, "rows": {}}
    advice = f"move {path} away, or name another --out"
    try:
        report = json.loads(path.read_text())
        before = report["settings"] | {f"EMA {name}": value for name, value in report["emas"].items()}
        older = before["bootstrap"] and any("replicates" not in row for row in report["rows"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no report of this script ({error!r}): {advice}") from error
    if older:
        raise UserError(f"{path} is of an older version, which kept no resampled values to compare rows by: {advice}")
    for key, value in (settings | {f"EMA {name}": value for name, value in emas.items()}).items():
        if before.get(key, value) != value or (key in settings and key not in before):
            raise UserError(f"{path} was made with {key} {before.get(key, '(unknown)')}, now it is {value}: {advice}")
    return report | {"emas": report["emas"] | emas}


def label(measure: str) -> str:
    return LABELS.get(measure) or load_evaluations("suite").LABELS[measure]


def best_of(rows: dict[str, dict[str, Any]], measure: str) -> str:
    """The name of the row that is best by a measure; of equal ones the first."""
    sign = -1 if measure in HIGHER_IS_BETTER else 1
    return min(rows, key=lambda key: sign * rows[key]["metrics"][measure])


def interval(row: dict[str, Any], measure: str, count: int) -> list[float] | None:
    """The 95 % interval over `count` images around a row's value; None where its standard error is not known."""
    value, deviation, metrics = row["metrics"][measure], row["deviations"].get(measure), load_evaluations("metrics")
    if deviation is None:
        return None
    return metrics.share_interval(value, count) if measure in SHARES else metrics.interval(value, deviation)


def not_told_apart(rows: dict[str, dict[str, Any]], best: str, measure: str, count: int) -> list[str]:
    """Other rows whose difference from the best may be chance: two-sided t-tests at 5 %, Bonferroni's correction.

    Each resample draws the same images of all rows, which share noises and classes: the deviation of the differences
    of their resampled values is that of the difference. A share gets that of one image of `count` besides, since among
    few images that differ, resamples differ too little.
    """
    from scipy.stats import t

    others, found = [key for key in rows if key != best], []
    reach = t.ppf(1 - 0.025 / max(len(others), 1), len(rows[best]["replicates"][measure]) - 1)
    for key in others:
        one, two = (np.array(rows[name]["replicates"][measure]) for name in (key, best))
        error = math.hypot(np.std(one - two, ddof=1), 1 / count if measure in SHARES else 0)
        difference = abs(rows[key]["metrics"][measure] - rows[best]["metrics"][measure])
        found += [key] if difference <= reach * error else []
    return found


def rows_of(report: dict[str, Any], cells: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """The rows of these settings, as far as there are, in their order; a report may hold those of earlier calls too."""
    return {cell.key(): report["rows"][cell.key()] for cell in cells if cell.key() in report["rows"]}


def add_best(report: dict[str, Any], cells: Sequence[Any], grading: GradingConfig) -> dict[str, Any]:
    """The report, saying which of these settings is the best so far."""
    measure, rows, count = grading.best or grading.keys[0], rows_of(report, cells), report["settings"]["num_samples"]
    best = best_of(rows, measure)
    value, bounds, equals = rows[best]["metrics"][measure], interval(rows[best], measure, count), []
    sentence = f"best {label(measure)}: {value:.4g}"
    if bounds is not None:
        equals = not_told_apart(rows, best, measure, count)
        sentence += f" (95 % over images: {bounds[0]:.4g} to {bounds[1]:.4g})"
    sentence += f" with {best}"
    if bounds is not None:
        sentence += f"; {len(equals)} of the {len(rows) - 1} others cannot be told apart from it"
    elif report["settings"]["bootstrap"]:
        sentence += "; no interval is known"
    found = {"measure": measure, "setting": best, "value": value, "interval": bounds, "not_told_apart": equals}
    return report | {"best": found | {"sentence": sentence}}


def write_pictures(out: Path, report: dict[str, Any], cells: Sequence[Any], measures: Sequence[str]) -> None:
    """The report for people: `out`.md and `out`.png, each whole or not at all."""
    with atomic_write(f"{out}.md") as file:
        file.write(as_markdown(report, cells, measures).encode())
    with atomic_write(f"{out}.png") as file:
        draw_heat_maps(file, report, cells, measures)


def as_markdown(report: dict[str, Any], cells: Sequence[Any], measures: Sequence[str]) -> str:
    """A table of the settings, and the sentence on the best."""
    head, rows, settings = ["setting", *map(label, measures), "images/s"], rows_of(report, cells), report["settings"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, row in rows.items():
        cells_of_row = [f"**{key}**" if key == report["best"]["setting"] else key]
        cells_of_row += [_with_interval(row, measure, settings["num_samples"]) for measure in measures]
        speed = row["images_per_second"]
        lines.append(f"| {' | '.join(cells_of_row)} | {'' if speed is None else format(speed, '.3g')} |")
    said = f"{settings['num_samples']} images of each setting, of the same noises"
    if settings["bootstrap"]:
        without = [label(measure) for measure in measures if measure not in next(iter(rows.values()))["deviations"]]
        said += "; in brackets: 95 % over images" + (f", not known of {', '.join(without)}" if without else "")
    sentence = report["best"]["sentence"]
    return "\n".join([*lines, "", f"{said}; {report['device']}.", f"{sentence[0].upper()}{sentence[1:]}.", ""])


def _with_interval(row: dict[str, Any], measure: str, count: int) -> str:
    bounds = interval(row, measure, count)
    reach = "" if bounds is None else f" ({bounds[0]:.4g} to {bounds[1]:.4g})"
    return f"{row['metrics'][measure]:.4g}{reach}"


# ---------------------------------------------------------------- heat maps


def draw_heat_maps(file: Any, report: dict[str, Any], cells: Sequence[Any], measures: Sequence[str]) -> None:
    """Write a PNG: a row of panels for each measure, the two longest axes within the panels, the best framed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(report, cells)
    values = {axis: list(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in AXES}
    y, x = sorted(values, key=lambda axis: len(values[axis]), reverse=True)[1::-1]
    others = [axis for axis in AXES if axis not in (x, y)]
    panels = list(product(*(values[axis] for axis in others)))
    width, height = 1.1 + 0.75 * len(values[x]), 0.9 + 0.42 * len(values[y])
    figure, axes = plt.subplots(
        len(measures), len(panels), squeeze=False, layout="constrained", sharex=True, sharey=True,
        figsize=(max(width * len(panels) + 1.5, 5), height * len(measures) + 0.9),
    )  # fmt: skip
    for measure, line in zip(measures, axes, strict=True):
        key = best_of(rows, measure)
        numbers = [row["metrics"][measure] for row in rows.values()]
        colours = "viridis" if measure in HIGHER_IS_BETTER else "viridis_r"
        for panel, place in zip(line, panels, strict=True):
            keys = _keys(cells, dict(zip(others, place, strict=True)), x, values[x], y, values[y])
            grid = np.array([[rows[k]["metrics"][measure] if k in rows else np.nan for k in row] for row in keys])
            image = panel.imshow(grid, cmap=colours, vmin=min(numbers), vmax=max(numbers), aspect="auto")
            _write_numbers(panel, grid, keys, key, image)
            panel.set_xticks(range(len(values[x])), [_word(value) for value in values[x]])
            panel.set_yticks(range(len(values[y])), [_word(value) for value in values[y]])
            shown = [_word(value) for axis, value in zip(others, place, strict=True) if len(values[axis]) > 1]
            panel.set_title(f"{label(measure)}{': ' if shown else ''}{', '.join(shown)}", fontsize=9)
            panel.set(xlabel=AXES[x] if measure == measures[-1] else "", ylabel=AXES[y] if panel is line[0] else "")
        figure.colorbar(image, ax=line)
    figure.suptitle(f"{report['settings']['num_samples']} images of each setting; the best of each measure is framed")
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def _keys(cells: Sequence[Any], fixed: dict[str, Any], x: str, xs: list, y: str, ys: list) -> list[list[str]]:
    """Names of the settings of one panel."""
    kind = type(cells[0])
    return [[kind(**fixed, **{x: column, y: row}).key() for column in xs] for row in ys]


def _write_numbers(panel: Any, grid: np.ndarray, keys: list[list[str]], best: str, image: Any) -> None:
    """The value in each field, in a colour that shows on it; a frame around the best."""
    from matplotlib.patches import Rectangle

    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            continue
        dark = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)) < 0.5
        bold = "bold" if keys[row][column] == best else "normal"
        colour = "white" if dark else "black"
        panel.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8, weight=bold)
        if bold == "bold":
            frame = {"fill": False, "edgecolor": "red", "linewidth": 2.5}
            panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
