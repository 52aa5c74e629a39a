"""The grader of the demo."""

import numpy as np
import pytest
from digits import write_digits

from evaluations import grade_digits


def test_the_grader_knows_real_digits_from_noise(tmp_path):
    write_digits(tmp_path)
    pixels, labels = grade_digits.read_folder(tmp_path / "test")
    images = np.rint(pixels * 255).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, axis=3)
    real = grade_digits.grade(tmp_path, images, labels)
    assert real["class_accuracy"] == real["real_accuracy"] > 0.98
    assert real["frechet_pixels"] == pytest.approx(0, abs=1e-6) and real["frechet_pixels_real"] > 0.01
    assert grade_digits.grade(tmp_path, images, (labels + 1) % 10)["class_accuracy"] < 0.02
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert grade_digits.grade(tmp_path, noise, labels)["frechet_pixels"] > 10 * real["frechet_pixels_real"]
    grader = grade_digits.Grader(tmp_path)
    assert grader(images, labels) == real and grader.real.items() <= real.items()
    with pytest.raises(ValueError, match="holds no digits"):
        grade_digits.read_folder(tmp_path / "nowhere")
