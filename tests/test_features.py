"""One pass over images: what it refuses, and that the size of its batches does not matter."""

import numpy as np
import pytest
import torch
from helpers import crops

from evaluations.errors import UserError
from evaluations.features import Needs, collect
from evaluations.npz_reader import NpzImages

NEEDS = Needs(statistics={"pool"}, rows={"pool"}, score=True)


def network(images):
    pool = torch.from_numpy(images).float().mean(dim=(1, 2))
    return {"pool": pool, "logits": pool / 50}


def forbidden(images):
    raise AssertionError("the network was run")


@pytest.fixture
def saved(tmp_path):
    def save(images):
        np.savez(tmp_path / "a.npz", images)
        return NpzImages(tmp_path / "a.npz")

    return save


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_pass_does_not_depend_on_the_size_of_its_batches(saved, batch_size):
    images = crops(70, seed=0)
    images[[3, 69]] = 7
    whole, parts = (collect(saved(images), network, NEEDS, size) for size in (70, batch_size))
    np.testing.assert_array_equal(parts.rows["pool"], whole.rows["pool"])
    for found, expected in zip(parts.statistics["pool"].result(), whole.statistics["pool"].result(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert parts.score.result() == pytest.approx(whole.score.result(), rel=1e-12)
    assert parts.flat == whole.flat == 2


@pytest.mark.parametrize(
    "images, message",
    [
        (np.repeat(crops(1, 0), 70, axis=0), "all 70 images are the same"),
        (np.arange(70, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3), "one colour each"),
    ],
    ids=["equal", "flat"],
)
def test_constant_images_are_refused_before_the_network_runs(saved, images, message):
    with pytest.raises(UserError, match=message):
        collect(saved(images), forbidden, NEEDS, 64)


def test_what_nothing_needs_is_not_computed(saved):
    assert collect(saved(crops(9, 0)), forbidden, Needs(), 64).count == 9


def test_one_image_that_differs_is_enough(saved):
    images = np.repeat(crops(1, 0), 70, axis=0)
    images[-1, 0, 0, 0] ^= 1
    saved(images).check_content()


@pytest.mark.parametrize("name", ["pool", "logits"])
def test_features_that_are_no_numbers_are_refused(saved, name):
    def broken(images):
        features = network(images)
        features[name][-1, 0] = float("nan")
        return features

    with pytest.raises(UserError, match=f"the {name} features of images 0 to 7 hold NaN"):
        collect(saved(crops(20, 0)), broken, NEEDS, 8)
