"""Precision, recall, density and coverage against their definitions, ADM's in TensorFlow too; bounded memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import REPO, adm_distances, by_definition, exact_distances, needs_tensorflow

from evaluations import neighbours
from evaluations.neighbours import (
    HALF,
    SINGLE,
    Rows,
    density_coverage,
    half_distances,
    neighbour_radii,
    precision_recall,
    single_distances,
)


def found_in(reference, samples):
    precision, recall = precision_recall(reference, samples)
    density, overlap = density_coverage(reference, samples)
    shares = {"precision": precision, "recall": recall, "density": density, "coverage": overlap.covered}
    return {key: share.mean() for key, share in shares.items()}


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((130, 24)).astype(np.float32)
    return reference, (0.9 * rng.standard_normal((90, 24)) + 0.3).astype(np.float32)


@pytest.mark.parametrize("tile, rows", [(10_000, 1000), (40, 7), (64, 64)])
def test_tiles_give_the_definition(features, tile, rows, monkeypatch):
    monkeypatch.setattr(neighbours, "TILE", tile)
    monkeypatch.setattr(neighbours, "ROWS", rows)
    expected = by_definition(*features)
    assert found_in(*features) == pytest.approx(expected)
    assert 0.1 < expected["precision"] < 0.95 and 0.1 < expected["recall"] < 0.95
    found, across = density_coverage(*features)[1], exact_distances(*features)
    np.testing.assert_allclose(found.distance, across.min(0), rtol=1e-5)
    np.testing.assert_array_equal(found.nearest, across.argmin(0))


def test_numbers_in_closed_form():
    line, samples = np.arange(10, dtype=np.float32)[:, None], np.float32([[0], [4.5], [12], [13], [40]])
    np.testing.assert_array_equal(neighbour_radii(Rows(line), 3, HALF), [9, 4, 4, 4, 4, 4, 4, 4, 4, 9])
    found = found_in(line, samples)
    # 12 is within 3 of 9, and 13 is not; of the reference, all lie within the reach of the sample at 0, 12 or 13
    assert found["precision"] == 3 / 5 and found["recall"] == 1
    reach = [5, 4, 3, 3, 3, 3, 3, 3, 4, 5]
    inside = [[abs(i - s) <= r for i, r in enumerate(reach)] for s in samples[:, 0]]
    assert found["density"] == pytest.approx(np.sum(inside) / 5 / 5)
    assert found["coverage"] == np.any(inside, axis=0).mean()


def test_the_same_images_are_all_within_reach(features):
    found = found_in(features[0], features[0])
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert set(found_in(features[0], features[0] + 100).values()) == {0}


def test_density_does_not_depend_on_a_common_offset(features):
    """Half precision around an offset sees ties only; ADM's precision and recall do depend on it."""
    moved = [f + np.float32(100) for f in features]
    density, coverage = (found_in(*moved)[key] for key in ("density", "coverage"))
    expected = by_definition(*features)
    assert (density, coverage) == pytest.approx((expected["density"], expected["coverage"]), abs=1e-2)


def test_a_tile_that_half_precision_cannot_hold_is_computed_in_single():
    u = torch.randn(5, 4) * 1000
    exact = torch.cdist(u.double(), u.double()).square()
    torch.testing.assert_close(half_distances(u, u), exact.float(), rtol=1e-4, atol=4)
    small = half_distances(u / 1000, u / 1000)
    assert small.half().float().equal(small) and not small.equal(single_distances(u / 1000, u / 1000))


@pytest.mark.parametrize("offset", [0, 30])
def test_exact_distances_see_what_double_precision_sees(features, offset):
    reference, samples = (f + np.float32(offset) for f in features)
    radii, sample_radii = (np.sort(exact_distances(f, f), axis=1)[:, 3] for f in (reference, samples))
    across = exact_distances(reference, samples)
    precision, recall = precision_recall(reference, samples, rule=SINGLE)
    np.testing.assert_array_equal(precision, (across <= radii[:, None]).any(0))
    np.testing.assert_array_equal(recall, (across <= sample_radii).any(1))
    if offset:  # half precision sees ties alone
        assert not np.array_equal(precision, precision_recall(reference, samples)[0])


# ---------------------------------------------------------------- ADM's operations


@needs_tensorflow
@pytest.mark.parametrize("tile", [10_000, 150])
def test_tensorflow_sees_adms_neighbours(tile, monkeypatch):
    """Against the published formula in eager TensorFlow, on features like Inception's; not one image differs."""
    from evaluations.distances_tensorflow import adm_rule

    monkeypatch.setattr(neighbours, "TILE", tile)
    rng = np.random.default_rng(5)
    basis = rng.standard_normal((20, 512)).astype(np.float32)
    reference, samples = (
        np.abs(0.4 + 0.1 * rng.standard_normal((n, 20)) @ basis + 0.2 * rng.standard_normal((n, 512))).astype(
            np.float32
        )
        for n in (400, 330)
    )
    samples[-90:] *= 30  # squared norms beyond half precision: the tiles that hold them are in single precision
    across = adm_distances(reference, samples, tile)
    radii, sample_radii = (np.sort(adm_distances(f, f, tile), axis=1)[:, 3] for f in (reference, samples))
    precision, recall = precision_recall(reference, samples, rule=adm_rule())
    np.testing.assert_array_equal(precision, (across <= radii[:, None]).any(0))
    np.testing.assert_array_equal(recall, (across <= sample_radii).any(1))
    assert 0.2 < precision.mean() < 0.8 and 0.1 < recall.mean() < 0.95
    halves = across == torch.from_numpy(across).half().float().numpy()
    assert halves[:150, :150].all() == (tile == 150) and not halves[:, -30:].all()


def test_too_few_images_are_refused(features):
    with pytest.raises(ValueError, match="3 images have no 3 neighbours"):
        precision_recall(features[0][:3], features[1])


# A child's ru_maxrss begins with its parent's, the tests' own; VmHWM is of its own memory.
MEASURE = """
import sys
import numpy as np
from evaluations import neighbours
neighbours.TILE = 2500
rule = neighbours.HALF
if sys.argv[1] == "tensorflow":
    from evaluations.distances_tensorflow import adm_rule
    rule = adm_rule()
reference, samples = (np.load(path, mmap_mode="r") for path in sys.argv[2:])
print(*(share.mean() for share in neighbours.precision_recall(reference, samples, rule=rule, progress=True)))
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024)
"""


def peak_memory(folder, backend, samples, reference):
    """MiB of a process that compares so many images; what the libraries alone need differs between machines."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{count}.npy" for count in (reference, samples)]
    for path, count in zip(paths, (reference, samples), strict=True):
        np.save(path, rng.standard_normal((count, 64), dtype=np.float32))
    # What is freed goes back to the system at once, and is not counted: by default glibc raises this threshold to the
    # size of what was freed, and tiles leave holes in as many arenas as there are threads.
    env = {**os.environ, "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}
    command = [sys.executable, "-c", MEASURE, backend, *map(str, paths)]
    result = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", pytest.param("tensorflow", marks=needs_tensorflow)])
def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path, backend):
    one, many = peak_memory(tmp_path, backend, 2_500, 2_500), peak_memory(tmp_path, backend, 10_000, 20_000)
    print(f"\npeak memory of one tile {one} MiB, of 32 tiles {many} MiB; all distances at once are 1526 MiB")
    assert many - one < 150
