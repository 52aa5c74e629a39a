"""The suite: which features each metric needs, and the metrics of one batch of samples against a reference."""

from dataclasses import dataclass, field

import numpy as np
import torch

from . import ranks
from .errors import UserError
from .features import Needs, collect
from .metrics import (
    InceptionScore,
    bootstrap,
    frechet_distance,
    gaussian_statistics,
    kernel_distance,
    resample,
    standard_errors,
)
from .neighbours import DENSITY_K, MANIFOLD_K, Overlap, density_coverage, precision_recall

METRICS = {
    "is": "Inception score",
    "fid": "Frechet distance of pool features",
    "sfid": "Frechet distance of spatial features",
    "pr": "precision and recall",
    "kid": "kernel distance of pool features",
    "dc": "density and coverage",
    "fd_dinov2": "Frechet distance of DINOv2 features",
}
LABELS = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
    "kid_std": "KID standard deviation over subsets",
    "density": "Density",
    "coverage": "Coverage",
    "fd_dinov2": "FD-DINOv2",
}
DISTANCES = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dinov2"}
READY_MADE = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def _used(metrics):
    """Names of the features whose Frechet distance is asked for."""
    return {DISTANCES[metric] for metric in metrics if metric in DISTANCES}


def _ready(metrics, images):
    """Names of the features whose statistics the metrics use and the file has ready-made."""
    return {name for name in _used(metrics) & READY_MADE.keys() if images.has_statistics(*READY_MADE[name])}


def reference_needs(metrics, images):
    """What a reference is passed through the network for: not for statistics that its file has ready-made.

    :raises UserError: when that is something, but the file has no images.
    """
    ready = _ready(metrics, images)
    needs = Needs(statistics=_used(metrics) - ready, rows={"pool"} if {"pr", "kid", "dc"} & set(metrics) else set())
    if needs and not len(images):
        known = [metric for metric, name in DISTANCES.items() if name in ready]
        raise UserError(
            f"{images.path} holds statistics alone, without images: choose --metrics {','.join(['is', *known])}"
        )
    return needs


def sample_needs(metrics, bootstrapped, images):
    """What samples are passed through the network for; a bootstrap draws from the features of the images.

    Statistics that their file has ready-made are used, as ADM's evaluator uses those of either file.
    """
    used = _used(metrics)
    rows = {"pool"} if {"pr", "kid", "dc"} & set(metrics) else set()
    if bootstrapped:
        rows = rows | used | ({"pool"} if "is" in metrics else set())
    return Needs(statistics=used - _ready(metrics, images), rows=rows, score="is" in metrics)


def ready_statistics(metrics, images):
    """The statistics that a file has ready-made and the metrics use, by the name of the feature.

    :raises UserError: when they are none; see `NpzImages.statistics`.
    """
    return {name: images.statistics(*READY_MADE[name]) for name in _ready(metrics, images)}


def check_sizes(metrics, images, sizes):
    """Refuse a file whose ready-made statistics are of another network.

    :param sizes: how many numbers the network gives of each feature.
    :raises UserError: when these are not as many as the statistics have.
    """
    for name in _ready(metrics, images):
        mean = READY_MADE[name][0]
        shape = images.arrays[mean][0]
        if shape != (sizes[name],):
            raise UserError(
                f"{images.path}: {mean} has shape {shape}, but the network gives {sizes[name]} {name} features: "
                "make the file anew with this network"
            )


def check_counts(metrics, reference, samples):
    """Refuse sets of images that have too few for their neighbours.

    :raises UserError: names the metric to leave out.
    """
    for metric, images, neighbours in (
        ("pr", reference, MANIFOLD_K),
        ("pr", samples, MANIFOLD_K),
        ("dc", reference, DENSITY_K),
    ):
        if metric in metrics and len(images) <= neighbours:
            raise UserError(
                f"{images.path} holds {len(images)} images, which have no {neighbours} neighbours each: use at least "
                f"{neighbours + 1}, or leave {metric} out of --metrics"
            )


@dataclass
class Reference:
    """A reference, ready to be compared with: statistics by the name of the feature, and rows of pool features."""

    statistics: dict
    rows: np.ndarray | None = None
    flat: int = 0  # images of one colour


def read_reference(images, network, metrics, batch_size):
    """The `Reference` of an `NpzImages`, on rank 0; the other ranks help, and get None."""
    needs = reference_needs(metrics, images)
    statistics = ready_statistics(metrics, images)
    if not needs:
        return Reference(statistics)
    collected = collect(images, network, needs, batch_size)
    if collected is None:
        return None
    statistics |= {name: sums.result() for name, sums in collected.statistics.items()}
    return Reference(statistics, collected.rows.get("pool"), collected.flat)


@dataclass
class Result:
    """Metrics of one batch of samples."""

    values: dict
    deviations: dict = field(default_factory=dict)  # standard errors over images
    replicates: dict = field(default_factory=dict)  # of those over samples: the resampled values
    shares: dict = field(default_factory=dict)  # of metrics that are means over images: each image's own
    overlap: Overlap | None = None  # with the nearest reference image of each sample


@ranks.full_float32()
def compare(reference, samples, metrics, logit_weights, repeats=0, device="cpu", rule=None, ready=None):
    """The metrics of collected samples against a reference.

    :param metrics: names out of `METRICS`. :param logit_weights: (2048, classes) of the network.
    :param repeats: resamples of the bootstrap; 0 for none.
    :param rule: the `Rule` of the distances of precision and recall; None where they are not asked for.
    :param ready: the samples' ready-made statistics; see `ready_statistics`.
    :return: a `Result`, with the keys of `LABELS` in their order.
    """
    values, result, pool = {}, Result({}), samples.rows.get("pool")
    statistics = {name: sums.result() for name, sums in samples.statistics.items()} | (ready or {})
    if "is" in metrics:
        values["inception_score"] = samples.score.result()[0]
    for metric, name in DISTANCES.items():
        if metric in metrics:
            values[metric] = frechet_distance(*statistics[name], *reference.statistics[name], as_adm=True)
    if "pr" in metrics:
        inside = precision_recall(reference.rows, pool, device, rule, progress=True)
        result.shares |= zip(("precision", "recall"), inside, strict=True)
    if "dc" in metrics:
        result.shares["density"], result.overlap = density_coverage(reference.rows, pool, device, progress=True)
        result.shares["coverage"] = result.overlap.covered
    if "kid" in metrics:
        values["kid"], values["kid_std"] = kernel_distance(reference.rows, pool, device=device)
    values |= {key: float(share.mean()) for key, share in result.shares.items()}
    result.values = {key: values[key] for key in LABELS if key in values}
    if repeats:
        result.replicates = replicates(reference, samples, result, logit_weights, repeats, device)
        errors = standard_errors(result.replicates)
        if result.shares:
            errors |= bootstrap(_of_shares(result, ("recall", "coverage")), len(reference.rows), repeats)
        result.deviations = {key: errors[key] for key in result.values if key in errors}
    return result


def replicates(reference, samples, result, logit_weights, repeats, device):
    """Metrics of samples drawn with replacement: a dict of lists of `repeats` numbers; see `resample`.

    Neighbourhoods stay what they are: among images drawn twice, the nearest neighbour would be the image itself. So
    recall and coverage, which are shares of reference images, are not among them.
    """
    weights, of_shares = torch.as_tensor(logit_weights).to(device), _of_shares(result, ("precision", "density"))

    def of_samples(indices):
        row = of_shares(indices)
        for metric, name in DISTANCES.items():
            if metric in result.values:
                drawn = torch.from_numpy(samples.rows[name][indices]).to(device)
                row[metric] = frechet_distance(*gaussian_statistics(drawn), *reference.statistics[name])
        if "inception_score" in result.values:
            score = InceptionScore()
            score.update(torch.from_numpy(samples.rows["pool"][indices]).to(device) @ weights, 0)
            row["inception_score"] = score.result()[0]
        return row

    return resample(of_samples, samples.count, repeats)


def _of_shares(result, keys):
    """A function of indices: the means over these images of the shares named."""
    shares = {key: share for key, share in result.shares.items() if key in keys}
    return lambda indices: {key: share[indices].mean() for key, share in shares.items()}
