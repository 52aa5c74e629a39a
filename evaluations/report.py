"""What stays of an evaluation: a JSON file that identifies the run, and one picture."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from .files import atomic_write, file_hash
from .metrics import interval
from .suite import LABELS

PACKAGES = ("numpy", "scipy", "torch", "tensorflow", "tensorflow-cpu", "torch-fidelity", "timm")
# Of the environment, which choose among algorithms.
VARIABLES = ("TF_ENABLE_ONEDNN_OPTS", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
PAIRS, GRID_IMAGES = 10, 40


def over_seeds(results):
    """Mean of each metric over several batches of samples, with the half width of its 95 % interval (Student's t)."""
    if len(results) < 2:
        return {}
    from scipy.stats import t

    summary = {}
    for key in results[0].values:
        values = np.array([result.values[key] for result in results])
        half_width = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        summary[key] = {"mean": float(values.mean()), "half_width": float(half_width)}
    return summary


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(network, rule):
    """What can move the last digits: backend, device, versions, and how precision and recall see distances.

    :param network: of Inception. :param rule: a `Rule`; None where precision and recall were not asked for.
    """
    return {
        "backend": network.name,
        "device": network.device_name,
        "versions": versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "distances": rule.text if rule else None,
    }


def sentence(row):
    """An `environment` in one line."""
    packages = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    variables = "".join(f", {name}={value}" for name, value in row["variables"].items())
    distances = f"; distances of precision and recall in {row['distances']}" if row["distances"] else ""
    return f"computed by {row['backend']} on {row['device']} ({packages}{variables}){distances}"


def describe(args, where, inception, reference, samples, results, warnings):
    """Everything that identifies a run, as JSON values. `metrics` is the mean over the batches of samples.

    :param where: an `environment`. :param inception: path of the network's weights.
    """
    seeds = over_seeds(results)
    return {
        "metrics": {key: seeds[key]["mean"] if seeds else value for key, value in results[0].values.items()},
        "over_seeds": seeds,
        "runs": [_run(images, result) for images, result in zip(samples, results, strict=True)],
        "reference": _file(reference),
        **where,
        "inception": _weights(inception),
        "dinov2": _weights(args.dinov2) if args.dinov2 not in (None, "hub") else args.dinov2,
        "warnings": warnings,
        "settings": vars(args),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _weights(path):
    return {"path": str(path), "sha256": file_hash(path)}


def _run(images, result):
    intervals = {key: interval(result.values[key], deviation) for key, deviation in result.deviations.items()}
    return _file(images) | {"metrics": result.values, "deviations": result.deviations, "intervals": intervals}


def _file(images):
    """Path, hash, counts, and what the npz says of itself."""
    return {
        "path": str(images.path),
        "sha256": file_hash(images.path),
        "count": len(images),
        "size": images.size,
        "description": images.description(),
    }


# ---------------------------------------------------------------- the picture


def draw(path, reference, samples, results):
    """One picture: the metrics with error bars, the farthest and nearest neighbours, samples beside the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14, 9.4), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(2.3, 2, 5))
    _draw_metrics(top, results)
    if len(reference) and results[0].overlap is not None:
        _draw_neighbours(middle, reference, samples, results[0].overlap)
    sides = bottom.subfigures(1, 2)
    for side, images, title in zip(sides, (samples, reference), ("samples", "reference"), strict=True):
        if len(images):
            places = np.linspace(0, len(images) - 1, min(GRID_IMAGES, len(images))).astype(int)
            _show(side.subplots(), _sheet(images.take(places), columns=8), f"{title}: {images.path.name}")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def _draw_metrics(figure, results):
    keys = [key for key in results[0].values if key != "kid_std"]
    for axis, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for place, result in enumerate(results):
            error = 1.96 * result.deviations.get(key, 0)
            axis.errorbar(place, result.values[key], yerr=error or None, fmt="o", capsize=6)
        axis.set_title(f"{LABELS[key]}\n{np.mean([r.values[key] for r in results]):.4g}")
        axis.set(xticks=[], xlim=(-0.7, len(results) - 0.3))
        axis.grid(alpha=0.3)
    figure.suptitle("metrics, with 95 % intervals where they are known")


def _draw_neighbours(figure, reference, samples, overlap):
    order = np.argsort(overlap.distance)
    count = min(PAIRS, len(order) // 2)
    chosen = {"farthest from all reference images": order[::-1][:count], "nearest to one": order[:count]}
    for axis, (title, places) in zip(figure.subplots(1, 2), chosen.items(), strict=True):
        pairs = np.concatenate([samples.take(places), reference.take(overlap.nearest[places])])
        _show(axis, _sheet(pairs, columns=max(count, 1)), f"samples {title}, and that image")


def _sheet(images, columns):
    """(n, H, W, 3) -> one (rows * H, columns * W, 3) image, white where images are lacking."""
    rows = -(-len(images) // columns)
    sheet = np.full((rows * columns, *images.shape[1:]), 255, dtype=np.uint8)
    sheet[: len(images)] = images
    grid = sheet.reshape(rows, columns, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * images.shape[1], columns * images.shape[2], 3)


def _show(axis, image, title):
    axis.imshow(image)
    axis.set_title(title)
    axis.axis("off")
