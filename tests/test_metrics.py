"""Closed forms of the metrics; the Frechet distance against 60-digit arithmetic and against the matrix square root."""

import time

import mpmath
import numpy as np
import pytest
import torch

from evaluations.errors import UserError
from evaluations.metrics import (
    GaussianStatistics,
    InceptionScore,
    bootstrap,
    frechet_distance,
    gaussian_statistics,
    interval,
    kernel_distance,
    resample,
    share_interval,
    standard_errors,
)


def random_covariance(rng, dim, rank=None):
    root = rng.standard_normal((dim, rank or dim))
    return root @ root.T / dim


def commuting_gaussians(rng, dim, smallest=0.1):
    """Two Gaussians whose covariances share their eigenvectors, and their distance in closed form."""
    mu1, mu2 = rng.standard_normal((2, dim))
    values1, values2 = np.exp(rng.uniform(np.log(smallest), np.log(2), (2, dim)))
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(values1) - np.sqrt(values2)) ** 2).sum()
    return (mu1, (basis * values1) @ basis.T, mu2, (basis * values2) @ basis.T), expected


# ---------------------------------------------------------------- Gaussian statistics


def test_statistics_are_unbiased():
    features = np.random.default_rng(3).standard_normal((50, 4)).astype(np.float32)
    mu, sigma = gaussian_statistics(features)
    np.testing.assert_array_equal(mu, features.mean(0))
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64), rowvar=False))


def test_batches_and_ranks_give_the_statistics_of_the_whole():
    features = np.random.default_rng(4).standard_normal((1000, 7)) + 1e6  # a mean that a naive sum of squares drowns in
    ranks = [GaussianStatistics() for _ in range(3)]
    for start, rank in zip(range(0, 1000, 40), 9 * ranks, strict=False):
        rank.update(torch.from_numpy(features[start : start + 40]))
    ranks.append(GaussianStatistics())  # of a rank that had no image
    total = ranks[0]
    for rank in ranks[1:]:
        total.merge(rank.cpu())
    mu, sigma = total.result()
    assert total.count == 1000
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(features - 1e6, rowvar=False), rtol=1e-8, atol=1e-10)


def in_batches(features, size):
    statistics = GaussianStatistics()
    for start in range(0, len(features), size):
        statistics.update(torch.from_numpy(features[start : start + size]))
    return statistics


def test_the_size_of_batches_changes_no_bit():
    features = np.random.default_rng(5).normal(0.4, 0.3, (3000, 5)).astype(np.float32)
    expected = gaussian_statistics(features)
    np.testing.assert_array_equal(expected[0], features.mean(0))
    for size in (1, 7, 64, 3000):
        for found, whole in zip(in_batches(features, size).result(), expected, strict=True):
            np.testing.assert_array_equal(found, whole)


def test_small_batches_cost_few_updates_of_the_matrix(monkeypatch):
    add, counts = GaussianStatistics._add, []
    note = lambda self, count, *sums: counts.append(count) or add(self, count, *sums)  # noqa: E731
    monkeypatch.setattr(GaussianStatistics, "_add", note)
    in_batches(np.zeros((3000, 2), np.float32), 64).result()
    assert counts == [2048, 952]


def test_statistics_go_on_after_a_result_and_keep_no_ones_memory():
    features = np.random.default_rng(6).standard_normal((100, 3)).astype(np.float32)
    statistics, batch = GaussianStatistics(), np.empty((10, 3), np.float32)
    for start in range(0, 100, 10):
        batch[:] = features[start : start + 10]
        statistics.update(batch)
        if start:
            np.testing.assert_array_equal(statistics.result()[0], features[: start + 10].mean(0))
    np.testing.assert_allclose(statistics.result()[1], np.cov(features, rowvar=False), rtol=1e-12, atol=1e-14)


def adm_distance(features1, features2):
    """ADM's formula: means in float32, covariances in float64, the square root of their product."""
    from scipy.linalg import sqrtm

    mu1, mu2 = (np.mean(f, axis=0) for f in (features1, features2))
    sigma1, sigma2 = (np.cov(f, rowvar=False) for f in (features1, features2))
    return (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(sqrtm(sigma1 @ sigma2).real)


def test_a_small_fid_of_50_000_images_is_adms():
    """Means in float64 would be 1e-4 off here: those in float32 lose digits, and the published numbers with them."""
    rng = np.random.default_rng(0)
    samples, reference = (rng.normal(0.4, 0.3, (n, 64)).astype(np.float32) for n in (50_000, 10_000))
    reference += np.float32(0.01)
    expected = adm_distance(samples, reference)
    ours = frechet_distance(*in_batches(samples, 64).result(), *in_batches(reference, 100).result())
    assert expected < 0.1 and ours == pytest.approx(expected, rel=1e-6)
    exact = [(f.mean(0, dtype=np.float64), np.cov(f, rowvar=False)) for f in (samples, reference)]
    assert frechet_distance(*exact[0], *exact[1]) != pytest.approx(expected, rel=1e-5)


def test_what_was_merged_stays_as_it_was():
    rows = np.random.default_rng(7).standard_normal((30, 3)).astype(np.float32)
    part, whole = in_batches(rows[:10], 5), GaussianStatistics()
    whole.merge(part)
    whole.update(rows[10:])
    np.testing.assert_array_equal(whole.result()[0], rows.mean(0))
    np.testing.assert_array_equal(part.result()[1], np.cov(rows[:10], rowvar=False))


def test_of_few_images_the_distance_is_adms_inaccurate_one():
    """Fewer images than features: SciPy's square root of a singular matrix, whose error is part of what ADM prints."""
    rng = np.random.default_rng(0)
    basis, scales = rng.standard_normal((512, 512)) / 512**0.5, 6 * np.arange(1, 513) ** -0.75
    samples, reference = (
        np.maximum(size * (rng.standard_normal((n, 512)) * scales) @ basis + 0.1, 0).astype(np.float32)
        for n, size in ((120, 1.0), (100, 1.15))
    )
    expected, statistics = adm_distance(samples, reference), [*in_batches(samples, 64).result()]
    statistics += in_batches(reference, 7).result()
    assert frechet_distance(*statistics, as_adm=True) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(*statistics) / expected - 1) > 1e-6


def test_of_singular_covariances_whose_root_is_not_real_the_distance_is_exact(monkeypatch, capsys):
    import scipy.linalg

    statistics = [*gaussian_statistics(np.eye(3, 5)), *gaussian_statistics(np.eye(3, 5)[:, ::-1].copy())]
    exact = frechet_distance(*statistics)
    for broken in (np.full((5, 5), np.nan), np.eye(5) * 1j):
        monkeypatch.setattr(scipy.linalg, "sqrtm", lambda _, broken=broken: print("singular") or broken)
        assert frechet_distance(*statistics, as_adm=True) == exact
    assert capsys.readouterr().out == ""
    finite = iter([np.full((5, 5), np.nan), 0.01 * np.eye(5)])  # the second is asked for with larger covariances
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda _: next(finite))
    mu1, sigma1, mu2, sigma2 = statistics
    apart = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2)
    assert frechet_distance(*statistics, as_adm=True) == pytest.approx(apart - 2 * 5 * 0.01)


def test_statistics_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least two rows of numbers, not 1"):
        gaussian_statistics(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        gaussian_statistics(np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        gaussian_statistics(np.zeros(5))


# ---------------------------------------------------------------- Frechet distance


def test_frechet_distance_in_closed_form():
    gaussians, expected = commuting_gaussians(np.random.default_rng(0), 30)
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_against_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    mu1, mu2 = rng.standard_normal((2, 20))
    sigma1, sigma2 = random_covariance(rng, 20), random_covariance(rng, 20)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-8)


def frechet_distance_of_60_digits(features1, features2):
    """From the features on, in mpmath: the roots of the eigenvalues of S1 S2, of which those that are zero are zero."""
    with mpmath.workdps(60):
        means, covariances = [], []
        for features in (features1, features2):
            rows = mpmath.matrix(features.tolist())
            mean = mpmath.matrix([sum(rows[:, j]) / rows.rows for j in range(rows.cols)])
            centered = mpmath.matrix(rows.rows, rows.cols)
            for i in range(rows.rows):
                centered[i, :] = rows[i, :] - mean.T
            means.append(mean)
            covariances.append(centered.T * centered / (rows.rows - 1))
        values = mpmath.eig(covariances[0] * covariances[1], left=False, right=False)
        roots = sum(mpmath.sqrt(v.real) for v in map(mpmath.mpc, values) if v.real > mpmath.mpf(10) ** -30)
        traces = sum(c[i, i] for c in covariances for i in range(c.rows))
        return float(sum((means[0] - means[1])[i] ** 2 for i in range(len(means[0]))) + traces - 2 * roots)


@pytest.mark.parametrize("counts", [(5, 5), (5, 40), (40, 4), (12, 13), (40, 50)], ids=str)
def test_few_images_agree_with_60_digits(counts):
    rng = np.random.default_rng(sum(counts))
    features1, features2 = (np.exp(rng.standard_normal((n, 12))) for n in counts)
    features2 *= 2
    expected = frechet_distance_of_60_digits(features1, features2)
    found = frechet_distance(*gaussian_statistics(features1), *gaussian_statistics(features2))
    assert found == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_are_finite_and_exact():
    rng = np.random.default_rng(2)
    mu, sigma = rng.standard_normal(20), random_covariance(rng, 20, rank=3)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-12
    assert frechet_distance(mu, sigma, mu, np.zeros((20, 20))) == pytest.approx(np.trace(sigma))
    assert frechet_distance(mu, 0 * sigma, mu + 2, 0 * sigma) == pytest.approx(80)
    apart = np.diag([1.0, 0.0]), np.diag([0.0, 4.0])
    assert frechet_distance(np.zeros(2), apart[0], np.zeros(2), apart[1]) == 5


def test_500_images_of_2048_features_agree_with_the_gram_matrix():
    rng = np.random.default_rng(6)
    features = [rng.standard_normal((500, 2048)) * rng.uniform(0.1, 2, 2048) for _ in range(2)]
    centered = [(f - f.mean(0)) / np.sqrt(499) for f in features]
    roots = np.linalg.svd(centered[0] @ centered[1].T, compute_uv=False).sum()  # S1 S2 has these 500 roots alone
    difference = features[0].mean(0) - features[1].mean(0)
    expected = difference @ difference + sum((c**2).sum() for c in centered) - 2 * roots
    found = frechet_distance(*gaussian_statistics(features[0]), *gaussian_statistics(features[1]))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [({"mu2": np.zeros(3)}, r"shapes"), ({"sigma1": np.full((2, 2), np.nan)}, "NaN"), ({"mu1": [0, np.inf]}, "NaN")],
)
def test_statistics_that_disagree_are_refused(change, message):
    arguments = {"mu1": np.zeros(2), "sigma1": np.eye(2), "mu2": np.zeros(2), "sigma2": np.eye(2)} | change
    with pytest.raises(ValueError, match=message):
        frechet_distance(**arguments)


@pytest.mark.parametrize(
    "sigma, message",
    [
        (-np.eye(4), "has no eigenvalue below 0, but one is -1"),
        (np.diag([1.0, 1.0, -0.01, 1.0]), "has no eigenvalue below 0, but one is -0.01"),
        (np.eye(4) + 0.1 * np.eye(4, k=1), "two halves differ by 0.1"),
    ],
)
def test_matrices_that_are_no_covariances_are_refused(sigma, message):
    for arguments in ((sigma, np.eye(4)), (np.eye(4), sigma)):
        with pytest.raises(UserError, match=message):
            frechet_distance(np.zeros(4), arguments[0], np.zeros(4), arguments[1])


def test_a_distance_below_zero_is_an_error_unless_it_is_rounding():
    rng = np.random.default_rng(8)
    rounded = random_covariance(rng, 50, rank=5).astype(np.float32)  # as other tools save it
    assert np.linalg.eigvalsh(rounded.astype(np.float64)).min() < 0
    assert 0 <= frechet_distance(np.zeros(50), rounded, np.zeros(50), rounded) < 1e-4
    many = np.diag([1.0] + [-9e-7] * 200)  # each could be rounding; all of them are not
    with pytest.raises(UserError, match=r"distance is -0\.000(36|35).*, which no covariances give"):
        frechet_distance(np.zeros(201), many, np.zeros(201), many)


def timed(function, *arguments):
    start = time.process_time()  # what else the machine does counts little
    result = function(*arguments)
    return time.process_time() - start, result


@pytest.mark.slow
def test_2048_dimensions_are_exact_and_far_faster_than_the_matrix_square_root():
    from scipy.linalg import sqrtm

    gaussians, expected = commuting_gaussians(np.random.default_rng(7), 2048, smallest=1e-4)
    own, found = min(timed(frechet_distance, *gaussians) for _ in range(3))
    square_root, root = timed(lambda: sqrtm(gaussians[1] @ gaussians[3]))
    print(f"\nfrechet_distance {own:.2f} s, sqrtm {square_root:.2f} s: {square_root / own:.1f} times as fast")
    assert found == pytest.approx(expected, rel=1e-8)
    difference = gaussians[0] - gaussians[2]
    by_root = difference @ difference + np.trace(gaussians[1] + gaussians[3] - 2 * root.real)
    assert by_root == pytest.approx(expected, rel=1e-6)
    assert square_root > 8 * own


# ---------------------------------------------------------------- Inception score


def score(logits, split_size, batch=7):
    scores = [InceptionScore(split_size), InceptionScore(split_size)]
    for number, start in enumerate(range(0, len(logits), batch)):
        scores[number % 2].update(torch.from_numpy(logits[start : start + batch]), start)
    scores[0].merge(scores[1])
    return scores[0].result()


def test_inception_score_of_sure_and_of_clueless_networks():
    sure = 1000.0 * np.eye(10)[np.arange(60) % 10]
    assert score(sure, 30) == pytest.approx((10, 0), abs=1e-9)
    assert score(np.ones((60, 10)), 30) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_is_the_mean_over_splits():
    logits = np.random.default_rng(0).standard_normal((50, 8)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    splits = [p[:20], p[20:40], p[40:]]
    scores = [np.exp((s * (np.log(s) - np.log(s.mean(0)))).sum(1).mean()) for s in splits]
    assert score(logits, 20) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


# ---------------------------------------------------------------- KID, bootstrap


def test_kid_is_the_definition_on_all_images():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 5)), rng.standard_normal((30, 5)) + 1

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    within = [kernel(a, b) for f in (x, y) for i, a in enumerate(f) for j, b in enumerate(f) if i != j]
    expected = 2 * np.mean(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y, subsets=2, subset_size=30) == pytest.approx((expected, 0), rel=1e-10, abs=1e-12)


def test_kid_is_unbiased_where_the_frechet_distance_is_not():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 4000, 8))
    for size in (20, 200):
        mean, deviation = kernel_distance(x, y, subsets=100, subset_size=size)
        assert abs(mean) < 4 * deviation / np.sqrt(100) and deviation > 0
    assert kernel_distance(x, y + 1, subsets=10, subset_size=200)[0] > 1
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x[:40], y[:50])[1] > 0  # subsets of few images differ too
    with pytest.raises(ValueError, match="not 1"):
        kernel_distance(x[:1], y)


def test_the_bootstrap_finds_the_error_of_a_mean():
    values = np.random.default_rng(0).standard_normal(2000)
    deviation = bootstrap(lambda indices: {"mean": values[indices].mean()}, 2000, repeats=400)["mean"]
    assert deviation == pytest.approx(values.std() / np.sqrt(2000), rel=0.12)
    assert interval(3.0, 0.5) == pytest.approx([2.02, 3.98], abs=1e-2)
    with pytest.raises(ValueError, match="bootstrap is 1"):
        bootstrap(lambda indices: {}, 5, repeats=1)


def test_resamples_of_two_sets_are_of_the_same_images():
    first, second = np.random.default_rng(0).standard_normal((2, 500))
    drawn = [resample(lambda i, v=v: {"mean": v[i].mean()}, 500, repeats=9)["mean"] for v in (first, first + second)]
    added = resample(lambda i: {"mean": second[i].mean()}, 500, repeats=9)["mean"]
    assert np.subtract(drawn[1], drawn[0]) == pytest.approx(added)
    assert standard_errors({"mean": added}) == {"mean": pytest.approx(np.std(added, ddof=1))}


def test_the_interval_of_a_share_holds_it_at_the_stated_rate():
    assert share_interval(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert share_interval(1.0, 1000) == pytest.approx([0.9962, 1], abs=1e-4)
    assert share_interval(0.0, 1000) == pytest.approx([0, 0.0038], abs=1e-4)
    for share in (0.5, 0.9, 0.98):
        found = np.random.default_rng(0).binomial(200, share, size=4000) / 200
        bounds = np.array([share_interval(value, 200) for value in found])
        assert 0.93 < np.mean((bounds[:, 0] <= share) & (share <= bounds[:, 1])) < 0.97
