"""Precision, recall, density and coverage: what lies within whose nearest neighbours, tile by tile."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

TILE = 10_000  # ADM's tiles, each of which decides by itself whether half precision will do
ROWS = 1_000  # of a tile at a time
MANIFOLD_K, DENSITY_K = 3, 5


def squared_distances(u, v):
    """(n, d) and (m, d) float32 tensors -> (n, m) float32 squared distances, by ADM's numerical rule.

    That is: in half precision, where all of the tile is finite in it, else in single precision. Published precision
    and recall depend on it, for many neighbours are as far as the next at that precision.
    """
    distances = torch.empty(len(u), len(v), device=u.device)
    for dtype in (torch.float16, torch.float32):
        if _fill(distances, u.to(dtype), v.to(dtype)):
            break
    return distances


def _fill(distances, u, v):
    """Fill a tile in u's precision; products are summed in single precision. Returns whether all of it is finite."""
    norms_u, norms_v = (x.square().sum(dim=1, dtype=torch.float32).to(u.dtype) for x in (u, v))
    v_wide = v.float()
    for start in range(0, len(u), ROWS):
        rows = slice(start, start + ROWS)
        products = (u[rows].float() @ v_wide.T).to(u.dtype)
        distances[rows] = (norms_u[rows, None] - 2 * products + norms_v).clamp_min(0)
        if u.dtype == torch.float16 and not distances[rows].isfinite().all():
            return False
    return True


def _tiles(count):
    return [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]


def _rows(features, tile, device):
    return torch.from_numpy(np.array(features[tile], dtype=np.float32)).to(device)


def neighbour_radii(features, ks, device="cpu", progress=False):
    """Squared distance of every row to its k-th nearest other row.

    :param features: (N, d) array, which may be memory-mapped. :param ks: the numbers of neighbours.
    :return: (N, len(ks)) float32.
    :raises ValueError: when there are no k other rows.
    """
    if len(features) <= max(ks):
        raise ValueError(f"{len(features)} images have no {max(ks)} neighbours each: use more images")
    radii, tiles = np.empty((len(features), len(ks)), dtype=np.float32), _tiles(len(features))
    for tile in tqdm(tiles, desc="neighbours", disable=not progress):
        u = _rows(features, tile, device)
        nearest = torch.empty(len(u), 0, device=device)
        for other in tiles:
            nearest = torch.cat([nearest, _smallest(u, _rows(features, other, device), max(ks) + 1)], dim=1)
        nearest = nearest.sort(dim=1).values  # the first is the row itself
        radii[tile] = nearest[:, list(ks)].cpu().numpy()
    return radii


def _smallest(u, v, count):
    """(n, count) smallest squared distances of every row of u to rows of v; fewer where v has fewer."""
    return squared_distances(u, v).topk(min(count, len(v)), largest=False).values


@dataclass
class Overlap:
    """Which of N reference and M sample images lie in whose neighbourhoods, one row per image."""

    sample_inside: np.ndarray  # (M,) bool: within the reach of some reference image
    reference_inside: np.ndarray  # (N,) bool: within the reach of some sample
    density: np.ndarray  # (M,) float64: reference images in whose reach a sample lies, over DENSITY_K
    covered: np.ndarray  # (N,) bool: has a sample within its reach of DENSITY_K
    nearest: np.ndarray  # (M,) int64: the nearest reference image
    distance: np.ndarray  # (M,) float32: squared distance to it

    def result(self):
        """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""
        return {
            "precision": float(self.sample_inside.mean()),
            "recall": float(self.reference_inside.mean()),
            "density": float(self.density.mean()),
            "coverage": float(self.covered.mean()),
        }


def overlap(reference, samples, device="cpu", progress=False):
    """Compare two sets of features, with 3 neighbours for precision and recall and 5 for density and coverage.

    At no time is more in memory than one tile of distances beside the features.

    :param reference, samples: (N, d) and (M, d) arrays, which may be memory-mapped.
    :return: an `Overlap`.
    :raises ValueError: when a set has too few images to have so many neighbours.
    """
    reach = neighbour_radii(reference, (MANIFOLD_K, DENSITY_K), device, progress)
    sample_reach = neighbour_radii(samples, (MANIFOLD_K,), device, progress)[:, 0]
    n, m = len(reference), len(samples)
    found = Overlap(
        sample_inside=np.zeros(m, dtype=bool),
        reference_inside=np.zeros(n, dtype=bool),
        density=np.zeros(m),
        covered=np.zeros(n, dtype=bool),
        nearest=np.zeros(m, dtype=np.int64),
        distance=np.full(m, np.inf, dtype=np.float32),
    )
    for rows in tqdm(_tiles(n), desc="overlap", disable=not progress):
        u, u_reach = (_rows(array, rows, device) for array in (reference, reach))
        for columns in _tiles(m):
            v, v_reach = (_rows(array, columns, device) for array in (samples, sample_reach))
            _compare(found, rows, columns, squared_distances(u, v), u_reach, v_reach)
    return found


def _compare(found, rows, columns, distances, reach, sample_reach):
    """Enter one tile of distances, between the reference images `rows` and the samples `columns`."""
    near, far = reach[:, :1], reach[:, 1:]
    found.sample_inside[columns] |= (distances <= near).any(dim=0).cpu().numpy()
    found.reference_inside[rows] |= (distances <= sample_reach).any(dim=1).cpu().numpy()
    inside = distances <= far
    found.density[columns] += inside.sum(dim=0, dtype=torch.int32).cpu().numpy() / DENSITY_K
    found.covered[rows] |= inside.any(dim=1).cpu().numpy()
    smallest, row = (array.cpu().numpy() for array in distances.min(dim=0))
    closer = smallest < found.distance[columns]
    found.distance[columns] = np.where(closer, smallest, found.distance[columns])
    found.nearest[columns] = np.where(closer, row + rows.start, found.nearest[columns])
