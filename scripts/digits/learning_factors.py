"""How much earlier one cell of the learning study reaches another's final quality, with an interval over seeds."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
from learning_runs import UNMASKED, VARIANTS, Cell, published_cell
from scipy.stats import norm, t

AXES = {"step": "steps", "images": "images", "flop": "FLOP", "cpu_seconds": "CPU seconds"}
PAIRS = (("MDTv2", "DiT"), ("MDTv2", "MDT"), ("MDT", "DiT"), ("MDTv2", UNMASKED), (UNMASKED, "DiT"))
RESAMPLES, CONFIDENCE = 2000, 0.95


class Factor(NamedTuple):
    """How much earlier than `slow` `fast` has the mean Frechet distance that `slow` has at its end.

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

    def on(self, axis: str, ratio: float) -> "Factor":
        """The same on another axis, whose cost of a step is `ratio` times as much for `slow` as for `fast`."""

        def scaled(value: float | None) -> float | None:
            return None if value is None else value * ratio

        interval = self.interval and tuple(map(scaled, self.interval))
        return self._replace(axis=axis, value=scaled(self.value), bound=self.bound * ratio, interval=interval)


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


def mean_curves(rows: np.ndarray) -> np.ndarray:
    """Geometric means over runs: (repeats, runs, evaluations) Frechet distances -> (repeats, evaluations)."""
    return np.exp(np.log(rows).mean(axis=1))


def speedups(steps: np.ndarray, fast: np.ndarray, slow: np.ndarray) -> np.ndarray:
    """The factors in steps; 0: not reached.

    Both sides' steps are those where they first have the distance that `slow` has at its end, so that a side against
    itself gives 1, whatever its last evaluation is.

    :param steps: (evaluations,). :param fast, slow: (repeats, runs, evaluations) Frechet distances.
    :return: (repeats,).
    """
    fast, slow = mean_curves(fast), mean_curves(slow)
    steps, targets = np.broadcast_to(steps, fast.shape), slow[:, -1]
    return reached_at(steps, slow, targets) / reached_at(steps, fast, targets)


def factor(fast: Cell, slow: Cell, fast_rows: list[dict], slow_rows: list[dict]) -> Factor:
    """The factor in steps between two cells, and its interval: both cells' seeds are drawn again with replacement.

    Of few seeds the quantiles of such draws lie too near to each other: five seeds' 95 % cover 86 %. So their distance
    from the factor, in logarithms, is stretched to that of Student's t, of spreads that are divided by n - 1.
    """
    steps = curves(slow_rows, "step")[0]
    sides = [curves(rows, "frechet") for rows in (fast_rows, slow_rows)]
    value = float(speedups(steps, *(side[None] for side in sides))[0])
    slow_mean = mean_curves(sides[1][None])
    bound = float(reached_at(steps[None], slow_mean, slow_mean[:, -1])[0] / steps[-1])
    interval, fewest = None, min(map(len, sides))
    if fewest > 1:
        rng, tail = np.random.default_rng(0), (1 - CONFIDENCE) / 2
        found = speedups(steps, *(side[rng.integers(len(side), size=(RESAMPLES, len(side)))] for side in sides))
        ends = [float(np.quantile(found, q, method="nearest")) for q in (tail, 1 - tail)]
        freedom = sum(map(len, sides)) - 2
        stretch = t.isf(tail, freedom) / norm.isf(tail) * math.sqrt(fewest / (fewest - 1))
        if value:
            ends = [end and value * (end / value) ** stretch for end in ends]
        interval = tuple(end if end >= bound else None for end in ends)
    return Factor(fast, slow, "step", value or None, bound, interval, (len(fast_rows), len(slow_rows)))


def cost_of_step(rows: list[dict], axis: str) -> float:
    """Mean cost of a step over runs."""
    return float(np.mean([row["curve"][-1][axis] / row["curve"][-1]["step"] for row in rows]))


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
    """Every question's factors: in steps, and in what else a step costs. Images are steps times a constant."""
    cells = {axis: by_cell(comparable(rows, axis)) for axis in AXES if axis != "images"}
    found = []
    for heading, fast, slow in questions(set(cells["step"])):
        in_steps = factor(fast, slow, cells["step"][fast], cells["step"][slow])
        for axis, runs in cells.items():
            if fast in runs and slow in runs:
                ratio = cost_of_step(runs[slow], axis) / cost_of_step(runs[fast], axis)
                found.append((heading, in_steps.on(axis, ratio)))
    return found
