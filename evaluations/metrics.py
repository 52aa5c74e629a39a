"""Metrics as pure functions of features: Gaussian statistics, Frechet distance, Inception score, KID, bootstrap."""

import warnings
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import torch

from .errors import UserError

SPLIT_SIZE = 5000
BLOCK = 2_048  # rows that enter the sums together: with fewer, adding (d, d) matrices costs more than products
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
TWO_SIDED_95 = 1.959963984540054
ROUNDING = 1e-6  # of a covariance's trace: how far below 0 an eigenvalue may be, and how asymmetric the matrix
BELOW_ZERO = 1e-5  # of the largest possible Frechet distance: how far below 0 rounding may bring a small one


class GaussianStatistics:
    """Mean and unbiased covariance of rows that come in batches, as ADM's evaluator takes them of the whole array.

    The mean is NumPy's: of float32 features a float32 sum, row after row. In float64 it would be nearer to the truth,
    and a small FID of 50,000 images would leave ADM's in the sixth digit. The covariance is float64 around a float64
    mean; blocks and ranks are merged by the pairwise formula of Chan et al. 1979, which loses no digits to large means.
    Rows enter both in blocks of 2,048, wherever batches end: the size of batches changes no bit. Of a single block the
    covariance is NumPy's: with no more images than Inception's features it is singular, and ADM's distance hangs on its
    last bits.
    """

    def __init__(self):
        self.count, self._waiting = 0, []
        self._summed, self._sum, self._mean, self._scatter = 0, None, 0.0, 0.0  # of rows that wait no more

    def update(self, features):
        """Add (N, d) features, an array or a tensor; the float64 sums stay on its device."""
        features = torch.as_tensor(features)
        if features.ndim != 2:
            raise ValueError(f"features have shape {tuple(features.shape)}: statistics need (N, d) numbers")
        precision = torch.promote_types(features.dtype, torch.float32)
        self._waiting.append(features.to(precision, copy=True))  # the caller may use its memory again
        self.count += len(features)
        if self.count - self._summed > BLOCK:
            *blocks, rest = torch.cat(self._waiting).split(BLOCK)
            self._waiting = [rest]
            for block in blocks:
                self._enter(block)

    def _enter(self, rows):
        if len(rows):
            own = rows.cpu().numpy()  # NumPy's order of additions, which no GPU keeps
            self._sum = np.add.reduce(own if self._sum is None else np.vstack([self._sum, own]), axis=0)
            rows = rows.double()
            mean = rows.mean(dim=0)
            centered = rows - mean
            self._add(len(rows), mean, centered.T @ centered)

    def _enter_waiting(self):
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._enter(torch.cat(waiting))

    def merge(self, other):
        """Add the rows that another one has seen, as if they came after its own but for the roundings of sums."""
        if not self.count:
            self.__dict__.update(vars(other), _waiting=list(other._waiting))
            return
        self._enter_waiting()
        other._enter_waiting()
        if other.count:
            self.count += other.count
            self._sum = other._sum if self._sum is None else self._sum + other._sum
            self._add(other._summed, other._mean, other._scatter)

    def _add(self, count, mean, scatter):
        total = self._summed + count
        difference = mean - self._mean
        scatter = torch.addr(scatter, difference, difference, alpha=self._summed * count / total)
        self._scatter = scatter.add_(self._scatter)
        self._mean = self._mean + difference * (count / total)
        self._summed = total

    def cpu(self):
        """The same on the CPU, to be sent to another rank."""
        self._waiting = [rows.cpu() for rows in self._waiting]
        if self._summed:
            self._mean, self._scatter = self._mean.cpu(), self._scatter.cpu()
        return self

    def result(self):
        """Mean (d,), in the features' own precision before it, and unbiased covariance (d, d), as float64 arrays.

        :raises UserError: for fewer than two rows, and for numbers that are not finite.
        """
        if self.count < 2:
            raise UserError(f"statistics need at least two rows of numbers, not {self.count}")
        if self._summed:
            self._enter_waiting()
            mu, sigma = self._sum / self.count, (self._scatter / (self.count - 1)).cpu().numpy()
        else:
            rows = torch.cat(self._waiting).cpu().numpy()
            mu, sigma = rows.mean(axis=0), np.cov(rows, rowvar=False).reshape(rows.shape[1], -1)
        mu = mu.astype(np.float64)
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(
                "the features hold NaN or infinite numbers: look at the images and at the network's weights"
            )
        return mu, sigma


def gaussian_statistics(features):
    """Mean (d,) and unbiased covariance (d, d), as `GaussianStatistics` has them, of (N, d) features with N >= 2."""
    statistics = GaussianStatistics()
    for start in range(0, len(features), BLOCK):
        statistics.update(features[start : start + BLOCK])
    return statistics.result()


def frechet_distance(mu1, sigma1, mu2, sigma2, as_adm=False):
    """Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6), exact for singular covariances too.

    With S1 = A A' and S2 = B B', tr sqrt(S1 S2) is the sum of the singular values of A' B. Where both have full rank
    the eigenvalues of A' S2 A, whose roots these are, cost a fraction of that. Never complex.

    :param mu1, mu2: (d,). :param sigma1, sigma2: (d, d), symmetric.
    :param as_adm: of a singular covariance, so of fewer images than features, what ADM's evaluator prints: it takes
        SciPy's square root of S1 S2, which is then inaccurate (5e-6 of a distance of 14.7 between 256 images each), and
        costs many times as much.
    :raises UserError: for shapes that disagree, numbers that are not finite, matrices that are no covariances, and a
        distance that is further below 0 than rounding brings it.
    """
    arrays = [torch.as_tensor(np.asarray(array, dtype=np.float64)) for array in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = arrays
    shapes = [tuple(array.shape) for array in arrays]
    if mu1.ndim != 1 or shapes != [shapes[0], shapes[0] * 2] * 2:
        raise UserError(f"the statistics have shapes {shapes}: they must be (d,), (d, d), (d,), (d, d)")
    if not all(array.isfinite().all() for array in arrays):
        raise UserError("the statistics hold NaN or infinite numbers: compute them anew")
    root1, root2 = _root(sigma1), _root(sigma2)
    if root1.shape == root2.shape == sigma1.shape:
        product = _product_with_root(root1, sigma2).numpy()
        values = torch.from_numpy(np.linalg.eigvalsh(product)).clamp_min(0).sqrt()  # faster than torch's
    else:
        values = torch.linalg.svdvals(root1.T @ root2)
        if as_adm:
            values = _adms_roots(sigma1.numpy(), sigma2.numpy(), values)
    difference = mu1 - mu2
    apart = (difference @ difference + sigma1.trace() + sigma2.trace()).item()
    distance = apart - 2 * values.sum().item()
    if distance < -BELOW_ZERO * apart:
        raise UserError(f"the Frechet distance is {distance}, which no covariances give: compute the statistics anew")
    return max(distance, 0.0)


def _adms_roots(sigma1, sigma2, exact):
    """The diagonal of SciPy's square root of the product of two covariances, of which one is singular.

    :return: `exact`, the true roots, where SciPy's is not real to 1e-3: ADM's evaluator then ends in an error.
    """
    from scipy.linalg import LinAlgWarning, sqrtm

    # A warning, and in SciPy before 1.17 a printed line, say that the matrix is singular.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore", LinAlgWarning)
        root = sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            offset = 1e-6 * np.eye(len(sigma1))
            root = sqrtm((sigma1 + offset) @ (sigma2 + offset))
    diagonal = np.diagonal(root)
    real = np.isfinite(diagonal).all() and np.abs(diagonal.imag).max() <= 1e-3
    return torch.from_numpy(diagonal.real.copy()) if real else exact


def check_covariance(sigma):
    """Refuse a (d, d) float64 array or tensor that is no covariance.

    :return: its Cholesky factor; None for a matrix that has none, as of too few features.
    :raises UserError: when it is not symmetric, or has a negative eigenvalue.
    """
    sigma = torch.as_tensor(sigma)
    tolerance = ROUNDING * sigma.diagonal().abs().sum()
    halves = zip(sigma.split(64), sigma.split(64, dim=1), strict=True)  # in pieces that stay in the cache
    asymmetry = max((rows - columns.T).abs().max() for rows, columns in halves)
    if asymmetry > tolerance:
        raise UserError(f"a covariance is symmetric, but two halves differ by {asymmetry:.3g}: compute it anew")
    lower, failed = torch.linalg.cholesky_ex(sigma)  # costs a hundredth of the eigenvalues
    if not failed:
        return lower
    if torch.linalg.cholesky_ex(sigma + tolerance * torch.eye(len(sigma), dtype=sigma.dtype)).info:
        smallest = torch.linalg.eigvalsh(sigma).min()
        if smallest < -tolerance:
            raise UserError(f"a covariance has no eigenvalue below 0, but one is {smallest:.3g}: compute it anew")
    return None


def _root(sigma):
    """(d, r) factor R with sigma = R R', r the numerical rank: Cholesky's where it is safe, else of eigenvectors.

    :raises UserError: when sigma is no covariance.
    """
    tolerance, lower = len(sigma) * torch.finfo(torch.float64).eps, check_covariance(sigma)
    if lower is not None:
        pivots = lower.diagonal().square()
        if pivots.min() > tolerance * pivots.max():
            return lower
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > tolerance * values.max().clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()


def _product_with_root(root, sigma, block=256):
    """The lower half of A' S A for lower triangular (d, d) A and symmetric S, with few of the products with zeros."""
    product, result = torch.empty_like(root), torch.empty_like(root)
    for start in range(0, len(root), block):
        product[:, start : start + block] = sigma[:, start:] @ root[start:, start : start + block]
    for start in range(0, len(root), block):
        end = start + block
        result[start:end, :end] = root[start:, start:end].T @ product[start:, :end]
    return result


class InceptionScore:
    """Inception score (Salimans et al. 2016) of logits that come in batches: exp of the mean KL to the marginal.

    :param split_size: images per split, as ADM has it; the score is the mean over splits, the last of which may be
        smaller. Only sums are kept, in float64.
    """

    def __init__(self, split_size=SPLIT_SIZE):
        self.split_size, self.splits = split_size, {}

    def update(self, logits, start):
        """Add (N, classes) logits of the images [start, start + N)."""
        log_p = torch.log_softmax(torch.as_tensor(logits).double(), dim=1)
        p = log_p.exp()
        negative_entropy = (p * log_p).sum(dim=1)
        split_of = np.arange(start, start + len(p)) // self.split_size
        for split in np.unique(split_of).tolist():
            rows = torch.from_numpy(np.flatnonzero(split_of == split)).to(p.device)
            self._add(split, len(rows), p[rows].sum(dim=0).cpu(), negative_entropy[rows].sum().item())

    def merge(self, other):
        """Add the images that another one has seen."""
        for split, sums in other.splits.items():
            self._add(split, *sums)

    def _add(self, split, count, p, negative_entropy):
        before = self.splits.get(split, (0, 0.0, 0.0))
        self.splits[split] = before[0] + count, before[1] + p, before[2] + negative_entropy

    def result(self):
        """The score, and its standard deviation over the splits (0 for one split)."""
        scores = []
        for count, p, negative_entropy in self.splits.values():
            marginal = (p / count).numpy()
            log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
            scores.append(np.exp(negative_entropy / count - (marginal * log_marginal).sum()))
        return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(features1, features2, subsets=KID_SUBSETS, subset_size=None, seed=0, device="cpu"):
    """KID (Binkowski et al. 2018): the unbiased squared MMD under the kernel (x'y / d + 1)^3, over random subsets.

    :param features1, features2: (N, d) and (M, d) arrays.
    :param subset_size: rows of a subset; None: 1,000, or half of the smaller set, for subsets are to differ.
    :return: mean and standard deviation over the subsets. The mean may be negative: its expectation is not.
    :raises UserError: when a set has fewer than two rows.
    """
    smaller = min(len(features1), len(features2))
    if smaller < 2:
        raise UserError(f"KID needs at least two rows of features on both sides, not {smaller}")
    size = min(subset_size or max(min(KID_SUBSET_SIZE, smaller // 2), 2), smaller)
    rng, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (
            torch.as_tensor(np.asarray(f[np.sort(rng.choice(len(f), size, replace=False))])).to(device).double()
            for f in (features1, features2)
        )
        values.append(_squared_mmd(x, y).item())
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x, y):
    size, dim = x.shape
    k_xx, k_yy, k_xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()
    return within / (size * (size - 1)) - 2 * k_xy.mean()


def resample(statistic, num_images, repeats, seed=0):
    """Values of a statistic over images drawn with replacement. The draws are functions of `num_images` and `seed`.

    :param statistic: function of (num_images,) indices that returns a dict of numbers.
    :param repeats: number of resamples, at least 2.
    :return: a dict with the same keys, of lists of `repeats` numbers.
    """
    if repeats < 2:
        raise ValueError(f"bootstrap is {repeats}: a deviation needs at least 2 resamples")
    rng = np.random.default_rng(seed)
    rows = [statistic(np.sort(rng.integers(num_images, size=num_images))) for _ in range(repeats)]
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def bootstrap(*args, **kwargs):
    """Standard error of a statistic over images: a dict of the deviations of what `resample` returns."""
    return standard_errors(resample(*args, **kwargs))


def standard_errors(replicates):
    """A dict of the deviations of lists of resampled values."""
    return {key: float(np.std(values, ddof=1)) for key, values in replicates.items()}


def interval(value, deviation):
    """The 95 % interval around a value.

    It is symmetric: percentiles of resampled Frechet distances all lie above the value, whose bias they repeat.
    """
    return [value - TWO_SIDED_95 * deviation, value + TWO_SIDED_95 * deviation]


def share_interval(share, count):
    """The 95 % interval of a share of `count` images (Wilson 1927, eq. 4): never empty, and within 0 and 1."""
    square = TWO_SIDED_95**2 / count
    middle, reach = share + square / 2, (square * (share * (1 - share) + square / 4)) ** 0.5
    return [max((middle - reach) / (1 + square), 0.0), min((middle + reach) / (1 + square), 1.0)]
