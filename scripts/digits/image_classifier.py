"""A small convolutional classifier, trained here on real images: its features and its classes judge drawn ones."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from learning_runs import Judge, evenly
from PIL import Image

from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.files import atomic_write, file_hash
from masked_diffusion.utils.progress import Progress

metrics = load_evaluations("metrics")
WIDTHS, BATCH_SIZE, EPOCHS, PEAK_LR, SEED = (32, 64, 128, 128), 128, 3, 4e-3, 0
READ_AT_ONCE, KERNEL_SUBSETS = 500, 20


class Classifier(nn.Module):
    """A convolution at each of four resolutions, each half of the one before, and a linear layer on the mean of places.

    :param num_classes: of its logits; its features are the last width's.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            stride = 1 if before == 3 else 2
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> (N, WIDTHS[-1])."""
        return self.body(images.float() / 127.5 - 1).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> (N, num_classes) logits."""
        return self.head(self.features(images))


def find_images(folder: str) -> list[Path]:
    """The images named CLASS_ANYTHING of a folder, sorted.

    :raises UserError: when there are none.
    """
    paths = sorted(path for path in Path(folder).glob("*_*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"{folder} holds no images named CLASS_ANYTHING.png or .jpg: write them with datasets/")
    return paths


def read_images(paths: list[Path], image_size: int, classes: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, H, W) uint8 images and (N,) int64 labels, which are places in `classes`.

    :raises UserError: for an image of another size, or of a class that is not in `classes`.
    """
    names = [class_of(path) for path in paths]
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"{paths[0].parent} has images of class {unknown[0]!r}, which the training images lack")
    images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
    with Progress(len(paths), "images") as progress:
        for i, path in enumerate(paths):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            if pixels.shape != images.shape[1:]:
                raise UserError(
                    f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but --image_size is {image_size}: the "
                    "classifier takes images of that size"
                )
            images[i] = pixels
            progress.add(1)
    labels = torch.tensor([classes.index(name) for name in names])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def class_of(path: Path) -> str:
    return path.name.split("_")[0]


def train_classifier(images: torch.Tensor, labels: torch.Tensor, num_classes: int, epochs: int = EPOCHS) -> Classifier:
    """Train on (N, 3, H, W) uint8 images and (N,) labels: AdamW, one cycle, mirrored and shifted images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Classifier(num_classes).train()
        steps = max(len(images) // BATCH_SIZE, 1)
        optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps * epochs)
        with Progress(steps * epochs, "steps of the classifier") as progress:
            for _ in range(epochs):
                order = torch.randperm(len(images))
                for rows in order[: steps * BATCH_SIZE].split(BATCH_SIZE):
                    loss = F.cross_entropy(model(augment(images[rows])), labels[rows], label_smoothing=0.1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    progress.add(1)
    return model.eval()


def augment(images: torch.Tensor, reach: int = 4) -> torch.Tensor:
    """Mirror half of the (N, 3, H, W) images, and move all of them by the same up to `reach` pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    reach = min(reach, images.shape[-1] // 8)
    padded = F.pad(mirrored.float(), [reach] * 4, mode="reflect")
    top, left = torch.randint(2 * reach + 1, (2,)).tolist()
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


@torch.no_grad()
def classify(model: Classifier, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(N, d) float32 features and (N,) classes of (N, 3, H, W) uint8 images."""
    features = torch.cat([model.features(part) for part in images.split(READ_AT_ONCE)])
    return features.numpy(), model.head(features).argmax(dim=1).numpy()


def folder_hash(folder: str) -> str:
    """Of the names and sizes of a folder's images."""
    lines = (f"{path.name} {path.stat().st_size}\n" for path in find_images(folder))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def classifier_judge(
    train_dir: str, test_dir: str, image_size: int, num_samples: int, path: Path
) -> tuple[Judge, dict[str, Any]]:
    """The judge of samples, and what it says of real images.

    The classifier is trained on the images of `train_dir` unless its weights are there. Samples are compared with the
    images of `test_dir`.

    :param path: of the weights. Other processors train others: they belong to the study's results.
    """
    train_paths = find_images(train_dir)
    classes = sorted(set(map(class_of, train_paths)))
    test, test_labels = read_images(find_images(test_dir), image_size, classes)
    model = Classifier(len(classes)).eval()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = train_classifier(*read_images(train_paths, image_size, classes), len(classes))
        with atomic_write(path) as file:
            torch.save(model.state_dict(), file)
    reference, found = classify(model, test)
    statistics = metrics.gaussian_statistics(reference)

    def judge(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        features, classes = classify(model, torch.from_numpy(images).permute(0, 3, 1, 2))
        frechet = metrics.frechet_distance(*metrics.gaussian_statistics(features), *statistics)
        kernel, _ = metrics.kernel_distance(features, reference, subsets=KERNEL_SUBSETS)
        return {"class_accuracy": float((classes == labels).mean()), "frechet": frechet, "kernel": kernel}

    # What real training images score that are as many as an evaluation draws.
    some = evenly(len(train_paths), num_samples)
    images, labels = read_images([train_paths[i] for i in some], image_size, classes)
    accuracy = float((found == test_labels.numpy()).mean())
    real = judge(images.permute(0, 2, 3, 1).numpy(), labels.numpy()) | {"class_accuracy": accuracy}
    return judge, {"features": "classifier", "classifier_sha256": file_hash(path), "real": real}
