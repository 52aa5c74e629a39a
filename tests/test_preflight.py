import numpy as np
import pytest
from helpers import write_images
from PIL import Image

from masked_diffusion import create_model
from masked_diffusion.training import preflight


def test_bad_images_are_listed_with_their_reason(tmp_path):
    paths = write_images(tmp_path, ["a_0.png", "a_1.png", "b_2.png"], size=(16, 16))
    (tmp_path / "a_1.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((3, 90, 3), dtype=np.uint8)).save(tmp_path / "b_2.png")
    bad = dict(preflight.find_bad_images(paths, 16))
    assert bad.keys() == set(paths[1:])
    assert "cannot be read" in bad[paths[1]] and "is 90 x 3, tiny for an image_size of 16" in bad[paths[2]]
    assert preflight.check_images(paths, 16, "skip") == paths[:1]
    with pytest.raises(ValueError, match=r"2 bad images, the first: .*a_1\.png.*--on_bad_image skip"):
        preflight.check_images(paths, 16, "error")


def test_classes_that_cannot_be_meant():
    with pytest.raises(ValueError, match=r"all images of data are of one class, 'img'"):
        preflight.check_classes("data", ["img"], 1)
    with pytest.raises(ValueError, match=r"data has 3 classes \(a, b, c, \.\.\.\), more than --num_classes 2"):
        preflight.check_classes("data", ["a", "b", "c"], 2)
    preflight.check_classes("data", ["a", "b"], 1000)


def test_few_classes_are_counted_and_many_make_a_histogram():
    few = preflight.describe_classes(np.array([0] * 40 + [1] * 10), ["cat", "dog"])
    assert [line.split()[:2] for line in few] == [["cat", "40"], ["dog", "10"]]
    assert few[0].count("#") == 4 * few[1].count("#") == 40
    labels = np.repeat(np.arange(100), np.arange(1, 101))
    many = preflight.describe_classes(labels, [str(i) for i in range(100)])
    assert len(many) == 10 and sum(int(line.split(":")[1].split()[0]) for line in many) == 100


def test_memory_is_that_of_the_tensors():
    model = create_model("MDTv2_Nano_2", input_size=8)
    num = sum(p.numel() for p in model.parameters())
    assert preflight.memory_estimate(num, 2, "adan", 1, "none") == 4 * num * 8
    assert preflight.memory_estimate(num, 1, "adamw", 4, "zero1") == 4 * num * (3 + 0.5)
    assert preflight.memory_estimate(num, 1, "adamw", 4, "fsdp") == 4 * num * 5 / 4
