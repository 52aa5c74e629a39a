"""The learning study's tables and pictures, made of its JSON alone; samples are drawn where the runs left them."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from learning_factors import AXES, Factor, all_factors, by_cell, cell_of, comparable, curves, timed_on
from learning_runs import VARIANTS, Cell, Run, published_cell
from learning_tuning import tuned_lr

from masked_diffusion.utils.files import atomic_write
from masked_diffusion.utils.pictures import save_grid

QUALITIES = {"frechet": "Frechet distance", "class_accuracy": "class accuracy", "kernel": "kernel distance"}
COLOURS = dict(zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
SHOWN, MAX_SCALE = 20, 4  # samples of each cell in the picture, and screen pixels of each of theirs


# ---------------------------------------------------------------- tables


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def yes(value: bool) -> str:
    return "yes" if value else "no"


def geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def spread(values: np.ndarray, mean: float, digits: int = 3) -> str:
    """The mean, and the smallest and the largest."""
    return f"{mean:.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def final_table(content: dict[str, Any]) -> str:
    """One row a cell: quality at the end, and what the run cost."""
    rows, timed = [], by_cell(comparable(content["runs"], "cpu_seconds"))
    for cell, runs in by_cell(content["runs"]).items():
        last = {key: curves(runs, key)[:, -1] for key in ("frechet", "class_accuracy", "flop")}
        words = [cell.variant, cell.optimizer, yes(cell.min_snr), f"{runs[0]['lr']:g}", str(len(runs))]
        words.append(spread(last["frechet"], geometric_mean(last["frechet"])))
        words.append(spread(last["class_accuracy"], last["class_accuracy"].mean()))
        if "kernel" in runs[0]["curve"][-1]:
            kernel = curves(runs, "kernel")[:, -1]
            words.append(spread(kernel, kernel.mean()))
        seconds = f"{curves(timed[cell], 'cpu_seconds')[:, -1].mean():.0f}" if cell in timed else ""
        words += [f"{last['flop'].mean() / 1e12:.2f}", seconds]
        rows.append(tuple(words))
    qualities = ["Frechet distance", "class accuracy"] + ["kernel distance"] * any(len(row) > 9 for row in rows)
    header = ("variant", "optimizer", "Min-SNR", "lr", "seeds", *qualities, "TFLOP", "CPU seconds")
    real = ", ".join(f"{QUALITIES[key]} {value:.3f}" for key, value in content["judge"].get("real", {}).items())
    steps = content["settings"]["steps"]
    text = f"After {steps} steps; mean, and the range over the seeds. Real images: {real}.\n\n{table(header, rows)}"
    if rows:
        num = sum(map(len, timed.values()))
        text += f"\n\nCPU seconds, here and below: {timed_on(content['runs'])}, which trained {num} of the runs."
    diverged = [f"{cell_of(row)}, seed {row['seed']}" for row in content["runs"] if not row["complete"]]
    return text + (f"\n\nDiverged, and in no mean: {'; '.join(diverged)}." if diverged else "")


def factor_words(found: Factor) -> str:
    """Such as `1.40 (1.21 to 1.65)`; `< 0.8` where the end of the runs came first."""

    def one(value: float | None) -> str:
        return f"< {found.bound:.2f}" if value is None else f"{value:.2f}"

    between = "" if found.interval is None else f" ({one(found.interval[0])} to {one(found.interval[1])})"
    return one(found.value) + between


def factor_table(content: dict[str, Any]) -> str:
    """One row a question: how much earlier the first has the other's final Frechet distance, on each axis."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for heading, found in all_factors(content["runs"]):
        row = rows.setdefault((heading, *side_names(found)), {"seeds": " and ".join(map(str, found.seeds))})
        row[found.axis] = factor_words(found)
    axes = [axis for axis in AXES if axis != "images"]
    header = ("compared", "earlier by this factor", "than", "seeds", *(AXES[axis] for axis in axes))
    return table(header, [(*key, *(cells.get(name, "") for name in ("seeds", *axes))) for key, cells in rows.items()])


def side_names(found: Factor) -> tuple[str, str]:
    """What tells the two sides apart, and what they share if that is a variant."""
    fast, slow = found.fast, found.slow
    if fast.variant != slow.variant:
        return fast.variant, slow.variant
    return str(fast), str(slow)


def tuning_table(content: dict[str, Any]) -> str:
    """One row a cell that was tuned: the Frechet distance of every learning rate that was tried, the best one bold."""
    cells: dict[Cell, dict[float, float | None]] = {}
    for row in content["tuning"]:
        cells.setdefault(cell_of(row), {})[row["lr"]] = row["curve"][-1]["frechet"] if row["complete"] else None
    lrs = sorted({lr for scores in cells.values() for lr in scores})
    rows = []
    for cell, scores in cells.items():
        best = min((score for score in scores.values() if score is not None), default=None)
        words = {lr: "diverged" if score is None else f"{score:.3f}" for lr, score in scores.items()}
        words = {lr: f"**{word}**" if scores[lr] == best else word for lr, word in words.items()}
        rows.append((cell.variant, cell.optimizer, *(words.get(lr, "") for lr in lrs)))
    return table(("variant", "optimizer", *(f"lr {lr:g}" for lr in lrs)), rows)


SECTIONS = {"final quality": final_table, "factors": factor_table, "tuning": tuning_table}
PICTURES = {  # ending of the file's name -> what it shows
    "": "Quality against steps, images, FLOP and seconds, each variant as published; bands: range over seeds",
    "_cells": "Frechet distance against steps and FLOP, the variants under every optimizer and weighting",
    "_samples": "Samples at the end of a run, one row a cell in the order of the table",
    "_tuning": "Frechet distance at the end of tuning against the learning rate",
}
PLACES = {"final quality": ("", "_samples"), "factors": ("_cells",), "tuning": ("_tuning",)}


def picture_links(out: str, doc: Path, endings: tuple[str, ...]) -> str:
    """Links from a Markdown file to those of the pictures that are there."""
    paths = [Path(f"{out}{ending}.png") for ending in endings]
    found = [(PICTURES[ending], path) for ending, path in zip(endings, paths, strict=True) if path.exists()]
    return "".join(f"![{text}]({os.path.relpath(path, doc.parent)})\n\n" for text, path in found)


def write_tables(out: str, doc: Path, content: dict[str, Any]) -> None:
    """Put every table between its two marks in a Markdown file; marks that are not there are added at its end.

    The pictures, which must be drawn before, stand above the table that they belong to.
    """
    name = Path(out).name
    text = doc.read_text() if doc.exists() else f"# {name}\n"
    for section, make in SECTIONS.items():
        first, last = f"<!-- {name}: {section} -->", f"<!-- end of {name}: {section} -->"
        if first not in text:
            text += f"\n## {section.capitalize()}\n\n{first}\n{last}\n"
        body = f"{first}\n\n{picture_links(out, doc, PLACES[section])}{make(content)}\n\n{last}"
        text = re.sub(f"{re.escape(first)}.*?{re.escape(last)}", lambda _, body=body: body, text, flags=re.DOTALL)
    with atomic_write(doc) as file:
        file.write(text.encode())


# ---------------------------------------------------------------- pictures


def draw_curve(panel: Any, runs: list[dict], axis: str, quality: str, label: str, **style: Any) -> None:
    """The mean over runs, and the range from the smallest to the largest as a band."""
    places, values = curves(runs, axis).mean(axis=0), curves(runs, quality)
    logarithmic = quality == "frechet"
    mean = np.exp(np.log(values).mean(axis=0)) if logarithmic else values.mean(axis=0)
    panel.plot(places, mean, label=label, marker="o", markersize=3, **style)
    panel.fill_between(places, values.min(axis=0), values.max(axis=0), alpha=0.2, color=style.get("color"))
    if logarithmic:
        panel.set_yscale("log")
    panel.grid(alpha=0.3, which="both")


def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, np.ndarray]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (4 * columns, 3.2 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def content_hash(content: dict[str, Any]) -> str:
    """What a picture's text `Source` says of the JSON that it was made of."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_figure(path: Path, figure: Any, content: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    with atomic_write(path) as file:
        figure.savefig(file, dpi=100, format="png", metadata={"Source": content_hash(content)})
    plt.close(figure)


def draw_published(path: Path, content: dict[str, Any]) -> None:
    """Every variant as in its paper: each quality against each cost."""
    cells = by_cell(content["runs"])
    chosen = {cell: cells[cell] for cell in map(published_cell, VARIANTS) if cell in cells}
    if not chosen:
        return
    first = next(iter(chosen.values()))[0]["curve"][0]
    qualities = [quality for quality in QUALITIES if quality in first]
    figure, panels = new_figure(len(qualities), len(AXES), sharey="row")
    for row, quality in enumerate(qualities):
        for panel, (axis, title) in zip(panels[row], AXES.items(), strict=True):
            runs_of = by_cell(comparable(content["runs"], axis))
            for cell in (cell for cell in chosen if cell in runs_of):
                label = f"{cell} ({len(chosen[cell])} seeds)"
                draw_curve(panel, runs_of[cell], axis, quality, label, color=COLOURS[cell.variant])
            panel.set_xlabel(title)
        panels[row, 0].set_ylabel(QUALITIES[quality])
    panels[0, 0].legend(fontsize=6)
    save_figure(path, figure, content)


def draw_cells(path: Path, content: dict[str, Any]) -> None:
    """Frechet distance against steps and FLOP, the variants beside each other under every optimizer and weighting."""
    cells = by_cell(content["runs"])
    settings = list(dict.fromkeys((cell.optimizer, cell.min_snr) for cell in cells))
    figure, panels = new_figure(2, len(settings), sharey=True, sharex="row")
    for column, (optimizer, min_snr) in enumerate(settings):
        for panel, axis in zip(panels[:, column], ("step", "flop"), strict=True):
            for variant in VARIANTS:
                runs = cells.get(Cell(variant, optimizer, min_snr))
                if runs:
                    draw_curve(panel, runs, axis, "frechet", variant, color=COLOURS[variant])
            panel.set_xlabel(AXES[axis])
        panels[0, column].set_title(f"{optimizer}, {'with' if min_snr else 'without'} Min-SNR", fontsize=9)
    for panel in panels[:, 0]:
        panel.set_ylabel(QUALITIES["frechet"])
    panels[0, 0].legend(fontsize=7)
    save_figure(path, figure, content)


def draw_tuning(path: Path, content: dict[str, Any]) -> None:
    """Frechet distance at the end of the tuning runs against the learning rate."""
    figure, panels = new_figure(1, 1)
    panel, found = panels[0, 0], {}
    for row in content["tuning"]:
        if row["complete"]:
            found.setdefault((row["variant"], row["optimizer"]), []).append((row["lr"], row["curve"][-1]["frechet"]))
    for (variant, optimizer), points in found.items():
        style = {"linestyle": "-" if optimizer == "adan" else "--", "color": COLOURS[variant]}
        panel.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{variant}, {optimizer}", **style)
    panel.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=QUALITIES["frechet"])
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=6)
    save_figure(path, figure, content)


def samples_of(cell: Cell, runs: list[dict], settings: dict[str, Any], work: Path) -> Path | None:
    """The last samples of the first of a cell's runs whose samples are there: a run of another machine left none."""
    run_rows = (Run(cell, row["lr"], row["seed"], settings["steps"], settings["eval_interval"]) for row in runs)
    paths = (work / f"{run.name}.npz" for run in run_rows)
    return next((path for path in paths if path.exists()), None)


def draw_samples(path: Path, content: dict[str, Any], work: Path) -> None:
    """The first samples of one run of each cell, one row a cell, in the order of the table; if every cell has some."""
    found = [samples_of(cell, runs, content["settings"], work) for cell, runs in by_cell(content["runs"]).items()]
    if None in found:
        return
    rows = []
    for samples in found:
        with np.load(samples, allow_pickle=False) as arrays:
            rows.append(arrays["images"][:SHOWN])
    images = np.pad(np.concatenate(rows), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    save_grid(path, images, len(rows[0]), max(1, min(MAX_SCALE, 96 // images.shape[1])))


def at_tuned_rates(content: dict[str, Any]) -> dict[str, Any]:
    """The same without runs at other learning rates than tuning chose, where it is finished."""
    first, factor = (content["settings"].get(key) for key in ("tuning_lr", "tuning_factor"))
    tuned = {cell: tuned_lr(content["tuning"], cell, first, factor) for cell in map(cell_of, content["runs"])}
    return content | {"runs": [row for row in content["runs"] if tuned[cell_of(row)] in (None, row["lr"])]}


def write(out: str, doc: Path, content: dict[str, Any], work: Path) -> None:
    """Make everything that the JSON has rows for."""
    content = at_tuned_rates(content)
    if content["tuning"]:
        draw_tuning(Path(f"{out}_tuning.png"), content)
    if by_cell(content["runs"]):
        draw_published(Path(f"{out}.png"), content)
        draw_cells(Path(f"{out}_cells.png"), content)
        draw_samples(Path(f"{out}_samples.png"), content, work)
    write_tables(out, doc, content)
