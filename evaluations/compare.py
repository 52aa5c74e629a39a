"""Print results of evaluator.py --json as a table beside the published ones, and draw them."""

if __spec__ is None:  # started as a script, which is part of no package
    from as_package import run_script

    raise SystemExit(run_script(__file__))

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from . import console
from .errors import UserError, check_packages
from .files import atomic_write, check_named_once, check_outputs
from .suite import LABELS

# ImageNet 256 x 256, 50,000 samples, ADM's suite; the last three are guided.
PUBLISHED = {
    "ADM": {"fid": 10.94, "sfid": 6.02, "inception_score": 100.98, "precision": 0.69, "recall": 0.63},
    "DiT-XL/2-G": {"fid": 2.27, "sfid": 4.60, "inception_score": 278.24, "precision": 0.83, "recall": 0.57},
    "MDT-XL/2-G": {"fid": 1.79, "sfid": 4.57, "inception_score": 283.01, "precision": 0.81, "recall": 0.61},
    "MDTv2-XL/2-G": {"fid": 1.58, "sfid": 4.52, "inception_score": 314.73, "precision": 0.79, "recall": 0.65},
}
COLUMNS = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "density", "coverage", "fd_dinov2")
DIGITS = {"kid": 5, "precision": 3, "recall": 3, "density": 3, "coverage": 3}


@dataclass
class Row:
    """A line of the table."""

    name: str
    metrics: dict
    widths: dict = field(default_factory=dict)  # half widths of 95 % intervals
    published: bool = False


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("results", nargs="+", help="files that evaluator.py --json wrote")
    parser.add_argument("--plot", help="draw FID against Inception score into this picture")
    args = parser.parse_args()
    check_named_once(args.results, "name each result once")
    check_outputs({"--plot": args.plot}, args.results)
    if args.plot:
        check_packages("matplotlib", reason="--plot")
    return args


def read(path):
    """Metrics, half widths of their 95 % intervals (over seeds, else over images) and warnings of one file.

    :raises UserError: for a file that evaluator.py did not write, and for numbers that are not finite.
    """
    try:
        row = json.loads(Path(path).read_text())
        metrics = {key: float(value) for key, value in row["metrics"].items() if key in LABELS}
        widths = {key: value["half_width"] for key, value in row["over_seeds"].items()}
        if not widths:
            widths = {key: (high - low) / 2 for key, (low, high) in row["runs"][0]["intervals"].items()}
        for key, value in [*metrics.items(), *widths.items()]:
            if not math.isfinite(value):
                raise UserError(f"{path}: {key} is {value}, which compares with nothing: evaluate the samples anew")
        return metrics, widths, [str(warning) for warning in row["warnings"]]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): name a file that evaluator.py --json wrote") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is no result of evaluator.py --json ({reason}): write it anew") from error


def format_table(rows):
    """A Markdown table. :param rows: list of `Row`."""
    columns = [key for key in COLUMNS if any(key in row.metrics for row in rows)]
    lines = ["| | " + " | ".join(LABELS[key] for key in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [_cell(key, row.metrics.get(key), row.widths.get(key)) for key in columns]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(key, value, width):
    if value is None:
        return ""
    digits = DIGITS.get(key, 2)
    return f"{value:.{digits}f}" + (f" ± {width:.{digits}f}" if width else "")


def draw(path, rows):
    """FID against Inception score, published rows in grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for row in rows:
        if not {"fid", "inception_score"} <= row.metrics.keys():
            continue
        place = row.metrics["fid"], row.metrics["inception_score"]
        axes.errorbar(
            *place, xerr=row.widths.get("fid"), yerr=row.widths.get("inception_score"),
            fmt="s" if row.published else "o", color="grey" if row.published else None, capsize=4,
        )  # fmt: skip
        axes.annotate(row.name, place, xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="FID (lower is better)", ylabel="Inception Score (higher is better)", xscale="log")
    axes.grid(alpha=0.3, which="both")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def names_of(paths):
    """Short names: of the files, or their whole paths where two are the same or one is a published row's."""
    stems = [Path(path).stem for path in paths]
    unclear = len(set(stems)) < len(stems) or not PUBLISHED.keys().isdisjoint(stems)
    return [str(Path(path).absolute()) for path in paths] if unclear else stems


def main():
    args = parse_args()
    rows, notes = [Row(name, metrics, published=True) for name, metrics in PUBLISHED.items()], []
    for name, path in zip(names_of(args.results), args.results, strict=True):
        metrics, widths, warnings = read(path)
        notes += [f"(!) {name}: {warning}" for warning in warnings]
        rows.append(Row(name + (" (!)" if warnings else ""), metrics, widths))
    print("\n".join([format_table(rows), *notes]))
    if args.plot:
        draw(args.plot, rows)


if __name__ == "__main__":
    console.run(main)
