"""Metrics as pure functions of features."""

import numpy as np


def gaussian_statistics(features):
    """Mean (d,) and unbiased covariance (d, d), float64, of (N, d) features with N >= 2."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features have shape {features.shape}: statistics need at least two rows of numbers")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6), exact for singular covariances too.

    tr sqrt(S1 S2) is the sum of the square roots of the eigenvalues of L' S2 L, with S1 = L L': a symmetric problem.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    cross = np.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_root = np.sqrt(np.clip(cross, 0, None)).sum()
    difference = mu1 - mu2
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)
