"""Precision, recall, density and coverage against their definitions; bounded memory."""

import subprocess
import sys

import neighbours
import numpy as np
import pytest
import torch
from conftest import REPO
from neighbours import neighbour_radii, overlap, squared_distances


def half_distances(u, v):
    """ADM's rule in numpy: half precision after every operation, sums in single precision."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    norms = [(x * x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v)]
    products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1], np.float16(0)).astype(np.float32)


def by_definition(reference, samples, distance):
    """All four numbers, from whole matrices of distances."""
    within, across = distance(reference, reference), distance(reference, samples)
    radii3, radii5 = np.sort(within, axis=1)[:, [3, 5]].T
    sample_radii = np.sort(distance(samples, samples), axis=1)[:, 3]
    return {
        "precision": (across <= radii3[:, None]).any(0).mean(),
        "recall": (across <= sample_radii).any(1).mean(),
        "density": (across <= radii5[:, None]).sum(0).mean() / 5,
        "coverage": (across <= radii5[:, None]).any(1).mean(),
    }


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((130, 24)).astype(np.float32)
    return reference, (0.9 * rng.standard_normal((90, 24)) + 0.3).astype(np.float32)


@pytest.mark.parametrize("tile, rows", [(10_000, 1000), (40, 7), (64, 64)])
def test_tiles_give_the_definition(features, tile, rows, monkeypatch):
    monkeypatch.setattr(neighbours, "TILE", tile)
    monkeypatch.setattr(neighbours, "ROWS", rows)
    found = overlap(*features)
    expected = by_definition(*features, half_distances)
    assert found.result() == pytest.approx(expected)
    assert 0.1 < expected["precision"] < 0.95 and 0.1 < expected["recall"] < 0.95
    across = half_distances(*features)
    np.testing.assert_array_equal(found.distance, across.min(0))
    np.testing.assert_array_equal(across[found.nearest, np.arange(90)], across.min(0))


def test_numbers_in_closed_form():
    line = np.arange(10, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(neighbour_radii(line, (3, 5))[:5], [[9, 25], [4, 16], [4, 9], [4, 9], [4, 9]])
    result = overlap(line, np.float32([[0], [4.5], [12], [13], [40]])).result()
    # 12 is within 3 of 9, and 13 is not; of the reference, all lie within the reach of the sample at 0, 12 or 13
    assert result["precision"] == 3 / 5 and result["recall"] == 1
    inside = [
        [abs(i - s) <= r for i, r in zip(range(10), [5, 4, 3, 3, 3, 3, 3, 3, 4, 5], strict=True)]
        for s in (0, 4.5, 12, 13, 40)
    ]
    assert result["density"] == pytest.approx(np.sum(inside) / 5 / 5)
    assert result["coverage"] == np.any(inside, axis=0).mean()


def test_the_same_images_are_all_within_reach(features):
    result = overlap(features[0], features[0]).result()
    assert (result["precision"], result["recall"], result["coverage"]) == (1, 1, 1)
    far = overlap(features[0], features[0] + 100).result()
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_a_tile_that_half_precision_cannot_hold_is_computed_in_single():
    u = torch.randn(5, 4) * 1000
    exact = torch.cdist(u.double(), u.double()).square()
    torch.testing.assert_close(squared_distances(u, u), exact.float(), rtol=1e-4, atol=4)
    assert squared_distances(u / 1000, u / 1000).half().float().equal(squared_distances(u / 1000, u / 1000))


def test_too_few_images_are_refused(features):
    with pytest.raises(ValueError, match="3 images have no 3 neighbours"):
        neighbour_radii(features[0][:3], (3,))


MEASURE = """
import resource, sys, time
import numpy as np
from neighbours import overlap
reference, samples = (np.load(path, mmap_mode="r") for path in sys.argv[1:])
start = time.perf_counter()
print(overlap(reference, samples, progress=True).result(), f"{time.perf_counter() - start:.0f} s")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("samples.npy", "reference.npy")]
    for path, count in zip(paths, (10_000, 20_000), strict=True):
        np.save(path, rng.standard_normal((count, 64), dtype=np.float32))
    command = [sys.executable, "-c", MEASURE, *map(str, reversed(paths))]
    result = subprocess.run(command, cwd=REPO / "evaluations", capture_output=True, text=True, check=True)
    peak = int(result.stdout.split()[-1])
    print(f"\npeak memory {peak} MiB")
    assert peak < 1800
