"""Grade the demo's digits: an SVM fitted on real training digits, and Frechet distances of pixels."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from .errors import UserError
from .metrics import frechet_distance, gaussian_statistics, resample, standard_errors

COLUMNS, SCALE = 24, 6


def read_folder(folder):
    """(N, 64) pixels in [0, 1] and (N,) labels of a folder of `ClassID_ImgID.png`."""
    paths = sorted(Path(folder).glob("*_*.png"))
    if not paths:
        raise UserError(f"{folder} holds no digits: write them with datasets/digits.py")
    pixels = np.stack([np.asarray(Image.open(path).convert("L"), dtype=np.float64) for path in paths]) / 255
    return pixels.reshape(len(pixels), -1), np.array([int(path.name.split("_")[0]) for path in paths])


def read_samples(path):
    """(N, H, W, 3) uint8 images and (N,) labels of an npz."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


class Grader:
    """Compares generated digits with real ones, which are read and learned once.

    :param digits: folder with `train` and `test`.
    """

    def __init__(self, digits):
        train, train_labels = read_folder(Path(digits, "train"))
        test, test_labels = read_folder(Path(digits, "test"))
        self.classifier = SVC(C=10, gamma="scale").fit(train, train_labels)
        self.reference = gaussian_statistics(test)
        self.real = {
            "real_accuracy": float(self.classifier.score(test, test_labels)),
            "frechet_pixels_real": frechet_distance(*gaussian_statistics(train), *self.reference),
        }

    def __call__(self, images, labels, repeats=0):
        """A dict of accuracies and distances; of two of them the resampled values, and the standard errors over images.

        :param images: (N, 8, 8, 3) uint8. :param labels: (N,) the digits that were asked for.
        :param repeats: resamples of the bootstrap; 0 for none.
        """
        generated = images.mean(axis=3).reshape(len(images), -1) / 255
        correct = self.classifier.predict(generated) == labels

        def of_drawn(indices):
            distance = frechet_distance(*gaussian_statistics(generated[indices]), *self.reference)
            return {"class_accuracy": correct[indices].mean(), "frechet_pixels": distance}

        drawn = resample(of_drawn, len(images), repeats) if repeats else {}
        return {
            "num_samples": len(images),
            "class_accuracy": float(correct.mean()),
            "class_accuracy_per_digit": {str(c): float(correct[labels == c].mean()) for c in np.unique(labels)},
            "frechet_pixels": frechet_distance(*gaussian_statistics(generated), *self.reference),
            **self.real,
        } | ({"deviations": standard_errors(drawn), "replicates": drawn} if repeats else {})


def grade(digits, images, labels, repeats=0):
    """Compare generated digits with real ones; see `Grader`."""
    return Grader(digits)(images, labels, repeats)


def draw_samples(path, images, labels):
    """One row per class, each pixel enlarged."""
    rows = [images[labels == c][:COLUMNS] for c in np.unique(labels)]
    height, width = images.shape[1:3]
    sheet = np.full((len(rows), height + 1, COLUMNS, width + 1, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        sheet[r, :height, : len(row), :width] = row.transpose(1, 0, 2, 3)
    pixels = sheet.reshape(len(rows) * (height + 1), COLUMNS * (width + 1), 3)
    Image.fromarray(pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)).save(path)


def draw_loss(path, progress):
    """Loss against steps, whole and by quarter of the timesteps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in Path(progress).read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = {"loss": "both passes"} | {f"loss_q{q}": f"t in quarter {q + 1} of 4" for q in range(4)}
    for key, name in names.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=2 if key == "loss" else 1)
    axes.set(xlabel="step", ylabel="loss (full + masked)", yscale="log", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
