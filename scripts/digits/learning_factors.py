"""How much earlier one cell of the learning study reaches another's final quality, with an interval over seeds."""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from learning_runs import UNMASKED, VARIANTS, Cell, published_cell

AXES = {"step": "steps", "images": "images", "flop": "FLOP", "cpu_seconds": "CPU seconds"}
PAIRS = (("MDTv2", "DiT"), ("MDTv2", "MDT"), ("MDT", "DiT"), ("MDTv2", UNMASKED), (UNMASKED, "DiT"))
RESAMPLES, INTERVAL = 2000, (0.025, 0.975)


class Factor(NamedTuple):
    """How much earlier than `slow`, at its end, `fast` has the same mean Frechet distance.

    :param axis: of `AXES`. :param value: the factor; None: `fast` does not get there within its runs.
    :param bound: the largest factor that this leaves open.
    :param interval: of 95 %, over the seeds of both, with None as for `value`; None where a side has one seed.
    :param seeds: runs of `fast` and of `slow`.
    """

    fast: Cell
    slow: Cell
    axis: str
    value: float | None
    bound: float
    interval: tuple[float | None, float | None] | None
    seeds: tuple[int, int]


def curves(rows: list[dict], key: str) -> np.ndarray:
    """(runs, evaluations) values of the curves."""
    return np.array([[point[key] for point in row["curve"]] for row in rows], dtype=np.float64)


def reached_at(places: np.ndarray, qualities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Where curves first fall to their targets, between two evaluations in a straight line of the logarithm.

    A target that is reached before the first evaluation counts as reached there.

    :param places, qualities: (curves, evaluations). :param targets: (curves,).
    :return: (curves,), infinity where a curve does not.
    """
    below, rows = qualities <= targets[:, None], np.arange(len(targets))
    after = below.argmax(axis=1)
    before = np.maximum(after - 1, 0)
    logs = np.log(qualities)
    fall = np.where(after > 0, logs[rows, before] - logs[rows, after], 1.0)
    share = np.where(after > 0, (logs[rows, before] - np.log(targets)) / fall, 0.0)
    found = places[rows, before] + share * (places[rows, after] - places[rows, before])
    return np.where(below.any(axis=1), found, np.inf)


def speedups(fast: tuple[np.ndarray, np.ndarray], slow: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The factors, of places and Frechet distances of both sides; 0: not reached.

    Curves are averaged over runs, distances as geometric means.

    :param fast, slow: (repeats, runs, evaluations) each. :return: (repeats,).
    """
    (fast_places, fast_quality), (slow_places, slow_quality) = (
        (places.mean(axis=1), np.exp(np.log(quality).mean(axis=1))) for places, quality in (fast, slow)
    )
    return slow_places[:, -1] / reached_at(fast_places, fast_quality, slow_quality[:, -1])


def factor(fast: Cell, slow: Cell, axis: str, fast_rows: list[dict], slow_rows: list[dict]) -> Factor:
    """The factor between two cells and its interval: both cells' seeds are drawn again with replacement."""
    sides = [(curves(rows, axis), curves(rows, "frechet")) for rows in (fast_rows, slow_rows)]
    value = float(speedups(*[(places[None], quality[None]) for places, quality in sides])[0])
    rng, interval = np.random.default_rng(0), None
    if min(len(fast_rows), len(slow_rows)) > 1:
        drawn = [rng.integers(len(places), size=(RESAMPLES, len(places))) for places, _ in sides]
        resampled = [(side[0][rows], side[1][rows]) for side, rows in zip(sides, drawn, strict=True)]
        found = speedups(*resampled)
        interval = tuple(float(np.quantile(found, q, method="nearest")) or None for q in INTERVAL)
    bound = float(sides[1][0].mean(axis=0)[-1] / sides[0][0].mean(axis=0)[-1])
    return Factor(fast, slow, axis, value or None, bound, interval, (len(fast_rows), len(slow_rows)))


def questions(cells: set[Cell]) -> Iterator[tuple[str, Cell, Cell]]:
    """Which cells are set against each other: a heading, the one that is to be faster, and the other.

    Variants as published; variants with the same optimizer and weighting; then the optimizer, and Min-SNR, alone.
    """
    asked = [("as published", published_cell(fast), published_cell(slow)) for fast, slow in PAIRS]
    for optimizer, min_snr in product(("adan", "adamw"), (True, False)):
        heading = f"both with {optimizer} and {'' if min_snr else 'no '}Min-SNR"
        asked += [(heading, Cell(fast, optimizer, min_snr), Cell(slow, optimizer, min_snr)) for fast, slow in PAIRS]
    for variant, min_snr in product(VARIANTS, (True, False)):
        asked.append(("Adan instead of AdamW", Cell(variant, "adan", min_snr), Cell(variant, "adamw", min_snr)))
    for variant, optimizer in product(VARIANTS, ("adan", "adamw")):
        sides = (Cell(variant, optimizer, weighted) for weighted in (True, False))
        asked.append(("with instead of without Min-SNR", *sides))
    yield from (each for each in asked if each[1] in cells and each[2] in cells and each[1] != each[2])


def cell_of(row: dict) -> Cell:
    return Cell(row["variant"], row["optimizer"], row["min_snr"])


def by_cell(rows: list[dict]) -> dict[Cell, list[dict]]:
    """The complete runs of each cell."""
    found: dict[Cell, list[dict]] = {}
    for row in rows:
        if row["complete"]:
            found.setdefault(cell_of(row), []).append(row)
    return found


def timed_on(rows: list[dict]) -> str | None:
    """The processor that trained most of the complete runs, if any: seconds of two processors do not compare."""
    counts = Counter(row["processor"] for row in rows if row["complete"])
    return max(counts, key=counts.get, default=None)


def comparable(rows: list[dict], axis: str) -> list[dict]:
    """The runs whose costs on an axis compare."""
    if axis != "cpu_seconds":
        return rows
    processor = timed_on(rows)
    return [row for row in rows if row["processor"] == processor]


def all_factors(rows: list[dict]) -> list[tuple[str, Factor]]:
    """Every question's factors, on every axis but images, which are steps times a constant."""
    cells = {axis: by_cell(comparable(rows, axis)) for axis in AXES if axis != "images"}
    return [
        (heading, factor(fast, slow, axis, found[fast], found[slow]))
        for heading, fast, slow in questions(set(by_cell(rows)))
        for axis, found in cells.items()
        if fast in found and slow in found
    ]
