"""Closed forms of the metrics, and the grader of the demo."""

import grade_digits
import numpy as np
import pytest
from digits import write_digits
from metrics import frechet_distance, gaussian_statistics


def random_covariance(rng, dim, rank=None):
    root = rng.standard_normal((dim, rank or dim))
    return root @ root.T / dim


def test_frechet_distance_in_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.standard_normal((2, 30))
    values1, values2 = rng.uniform(0.1, 2, (2, 30))
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    commuting = (basis * values1) @ basis.T, (basis * values2) @ basis.T
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(values1) - np.sqrt(values2)) ** 2).sum()
    assert frechet_distance(mu1, commuting[0], mu2, commuting[1]) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_against_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    mu1, mu2 = rng.standard_normal((2, 20))
    sigma1, sigma2 = random_covariance(rng, 20), random_covariance(rng, 20)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances():
    rng = np.random.default_rng(2)
    mu, sigma = rng.standard_normal(20), random_covariance(rng, 20, rank=3)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(mu, sigma, mu, np.zeros((20, 20))) == pytest.approx(np.trace(sigma))


def test_statistics_are_unbiased():
    features = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)
    mu, sigma = gaussian_statistics(features)
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(0))
    centered = features.astype(np.float64) - mu
    np.testing.assert_allclose(sigma, centered.T @ centered / 49)
    with pytest.raises(ValueError, match="at least two rows"):
        gaussian_statistics(features[:1])


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
    with pytest.raises(ValueError, match="holds no digits"):
        grade_digits.read_folder(tmp_path / "nowhere")
