"""Precision, recall, density and coverage: what lies within whose nearest neighbours, tile by tile."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from .errors import UserError

TILE = 10_000  # ADM's tiles, each of which decides by itself whether half precision will do
ROWS = 1_000  # of a tile at a time
MANIFOLD_K, DENSITY_K = 3, 5


@dataclass(frozen=True)
class Rule:
    """How distances are computed. Precision and recall depend on it: in half precision many neighbours are equally far.

    :param text: what a report says of it.
    :param distances: (n, d) and (m, d) float32 tensors -> (n, m) float32 squared distances, on their device.
    :param centered: whether the reference's mean is subtracted from all features first, which keeps digits.
    """

    text: str
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    centered: bool = False


def half_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """ADM's rule: in half precision where all of the tile is finite in it, else in single precision."""
    distances = torch.empty(len(u), len(v), device=u.device)
    if not _fill(distances, u.half(), v.half()):
        _fill(distances, u, v)
    return distances


def single_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In single precision whatever the numbers are."""
    distances = torch.empty(len(u), len(v), device=u.device)
    _fill(distances, u, v)
    return distances


def _fill(distances, u, v):
    """Fill a tile in u's precision; products are summed in single precision. Returns whether all of it is finite."""
    norms_u, norms_v = (x.square().sum(dim=1, dtype=torch.float32).to(u.dtype) for x in (u, v))
    v_wide = v.float()
    for start in range(0, len(u), ROWS):
        rows = slice(start, start + ROWS)
        products = (u[rows].float() @ v_wide.T).to(u.dtype).mul_(2)
        torch.sub(norms_u[rows, None], products, out=products)
        distances[rows] = products.add_(norms_v).clamp_min_(0)
        if not distances[rows].max().isfinite():  # the maximum of what holds a NaN is NaN
            return False
    return True


HALF = Rule("half precision where a tile is finite in it, products summed in single precision", half_distances)
SINGLE = Rule("single precision, without the half-precision rule", single_distances, centered=True)


class Rows:
    """Features on a device, tile by tile.

    :param features: (N, d) array, which may be memory-mapped. :param shift: (d,) to subtract from each.
    """

    def __init__(self, features, device="cpu", shift=None):
        self.features, self.device, self.shift = features, device, shift

    def __len__(self):
        return len(self.features)

    def tiles(self):
        """Pairs of a slice and its (n, d) float32 tensor, one in memory at a time."""
        for start in range(0, len(self), TILE):
            tile = slice(start, min(start + TILE, len(self)))
            rows = torch.from_numpy(np.array(self.features[tile], dtype=np.float32)).to(self.device)
            yield tile, rows if self.shift is None else rows - self.shift


def neighbour_radii(rows, k, rule, progress=False):
    """Squared distance of every row to its k-th nearest other row.

    :param rows: `Rows`. :param rule: `Rule`.
    :return: (N,) float32 tensor.
    :raises UserError: when there are no k other rows.
    """
    if len(rows) <= k:
        raise UserError(f"{len(rows)} images have no {k} neighbours each: use at least {k + 1}")
    radii = torch.empty(len(rows), device=rows.device)
    with tqdm(total=len(rows), unit="image", desc="neighbours", disable=not progress) as bar:
        for tile, u in rows.tiles():
            nearest = torch.cat([_smallest(rule.distances(u, v), k + 1) for _, v in rows.tiles()], dim=1)
            radii[tile] = nearest.kthvalue(k + 1, dim=1).values  # the first is the row itself
            bar.update(len(u))
    return radii


def _smallest(distances, count):
    """(n, count) smallest of every row of distances; fewer where there are fewer columns."""
    return distances.topk(min(count, distances.shape[1]), largest=False).values


@dataclass
class Overlap:
    """Which of N reference and M sample images lie in whose neighbourhoods, one row per image."""

    counts: np.ndarray  # (M,) int64: reference images within whose reach a sample lies
    covered: np.ndarray  # (N,) bool: has a sample within its reach
    reached: np.ndarray  # (N,) bool: within the reach of some sample
    nearest: np.ndarray  # (M,) int64: the nearest reference image
    distance: np.ndarray  # (M,) float32: squared distance to it


def precision_recall(reference, samples, device="cpu", rule=HALF, progress=False):
    """Precision and recall of k = 3 neighbours (Kynkaanniemi et al. 2019), as ADM computes them.

    :param reference, samples: (N, d) and (M, d) arrays, which may be memory-mapped. Beside them, at no time is more in
        memory than one tile of distances.
    :param rule: how distances are computed.
    :return: whether each sample lies within the reach of a reference image (M,), whose mean is the precision; whether
        each reference image lies within the reach of a sample (N,), whose mean is the recall.
    :raises UserError: when a set has too few images to have so many neighbours.
    """
    shift = _mean(reference, device) if rule.centered else None
    reference, samples = Rows(reference, device, shift), Rows(samples, device, shift)
    radii = [neighbour_radii(rows, MANIFOLD_K, rule, progress) for rows in (reference, samples)]
    found = overlap(reference, samples, *radii, rule, progress)
    return found.counts > 0, found.reached


def density_coverage(reference, samples, device="cpu", progress=False):
    """Density and coverage of k = 5 neighbours (Naeem et al. 2020), in single precision around the reference's mean.

    :param reference, samples: as for `precision_recall`.
    :return: density of each sample (M,), whose mean is the density; an `Overlap`, the mean of whose `covered` is the
        coverage.
    :raises UserError: when the reference has too few images to have so many neighbours.
    """
    shift = _mean(reference, device)
    reference, samples = Rows(reference, device, shift), Rows(samples, device, shift)
    radii = neighbour_radii(reference, DENSITY_K, SINGLE, progress)
    found = overlap(reference, samples, radii, torch.full((len(samples),), -1.0, device=device), SINGLE, progress)
    return found.counts / DENSITY_K, found


def _mean(features, device):
    """(d,) mean of the first rows: near enough to the whole mean for sums around it to lose no digits."""
    return torch.from_numpy(np.array(features[:TILE], dtype=np.float32).mean(axis=0)).to(device)


def overlap(reference, samples, radii, sample_radii, rule, progress=False):
    """Compare all images of two `Rows`, given the reach of each, by a `Rule`. :return: an `Overlap`."""
    n, m = len(reference), len(samples)
    found = Overlap(
        counts=np.zeros(m, dtype=np.int64),
        covered=np.zeros(n, dtype=bool),
        reached=np.zeros(n, dtype=bool),
        nearest=np.zeros(m, dtype=np.int64),
        distance=np.full(m, np.inf, dtype=np.float32),
    )
    with tqdm(total=n, unit="image", desc="overlap", disable=not progress) as bar:
        for rows, u in reference.tiles():
            for columns, v in samples.tiles():
                distances = rule.distances(u, v)
                _enter(found, rows, columns, distances, radii[rows], sample_radii[columns])
                del distances  # before the next tile is made
            bar.update(len(u))
    return found


def _enter(found, rows, columns, distances, radii, sample_radii):
    """Enter one tile of distances, between the reference images `rows` and the samples `columns`."""
    found.reached[rows] |= (distances <= sample_radii).any(dim=1).cpu().numpy()
    inside = distances <= radii[:, None]
    found.covered[rows] |= inside.any(dim=1).cpu().numpy()
    found.counts[columns] += inside.sum(dim=0, dtype=torch.int32).cpu().numpy()
    smallest, row = (array.cpu().numpy() for array in distances.min(dim=0))
    closer = smallest < found.distance[columns]
    found.distance[columns] = np.where(closer, smallest, found.distance[columns])
    found.nearest[columns] = np.where(closer, row + rows.start, found.nearest[columns])
