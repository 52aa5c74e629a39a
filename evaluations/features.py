"""One pass over a batch of images: their features go into sums, and are kept only where a metric needs them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from . import ranks
from .errors import UserError
from .metrics import GaussianStatistics, InceptionScore


@dataclass
class Needs:
    """What the metrics need of a batch of images."""

    statistics: set = field(default_factory=set)  # features whose mean and covariance
    rows: set = field(default_factory=set)  # features to keep, image by image
    score: bool = False  # the Inception score's sums

    def __bool__(self):
        return bool(self.statistics or self.rows or self.score)


class Pixels:
    """Notes images of one colour, and whether all images are the same."""

    def __init__(self):
        self.flat, self.first, self.all_equal = 0, None, True

    def update(self, images):
        images = images.reshape(len(images), -1, images.shape[-1])
        self.flat += int((images == images[:, :1]).all(axis=(1, 2)).sum())
        self.first = images[0].copy() if self.first is None else self.first
        self.all_equal = self.all_equal and bool((images == self.first).all())

    def merge(self, other):
        self.flat += other.flat
        self.all_equal = self.all_equal and other.all_equal and bool((self.first == other.first).all())


class Collected:
    """What one pass leaves. :param count: images of the pass."""

    def __init__(self, needs, count):
        self.needs, self.count, self.done = needs, count, 0
        self.statistics = {name: GaussianStatistics() for name in needs.statistics}
        self.rows, self.score, self.pixels = {}, InceptionScore(), Pixels()

    @property
    def flat(self):
        """Number of images of one colour."""
        return self.pixels.flat

    def update(self, images, features, start):
        """Add a batch and its features; `start` is the place of its first image in the file."""
        self.pixels.update(images)
        for name, statistics in self.statistics.items():
            statistics.update(features[name])
        for name in self.needs.rows:
            array = torch.as_tensor(features[name]).cpu().numpy()
            self.rows.setdefault(name, np.empty((self.count, array.shape[1]), dtype=np.float32))
            self.rows[name][self.done : self.done + len(array)] = array
        if self.needs.score:
            self.score.update(features["logits"], start)
        self.done += len(images)

    def cpu(self):
        for statistics in self.statistics.values():
            statistics.cpu()
        return self

    def merge(self, other):
        """Add the pass of the next rank."""
        self.count, self.done = self.count + other.count, self.done + other.done
        self.pixels.merge(other.pixels)
        self.score.merge(other.score)
        for name, statistics in self.statistics.items():
            statistics.merge(other.statistics[name])
        for name, rows in other.rows.items():
            self.rows[name] = np.concatenate([self.rows[name], rows])


def collect(images, network, needs, batch_size):
    """Pass the images of a file through a network, on all ranks.

    :param images: `NpzImages`. :param network: function of uint8 images that returns a dict of features.
    :return: `Collected` on rank 0, None on the others.
    :raises UserError: on rank 0, when a rank could not read its images, or all images are equal.
    """
    if len(images) < ranks.world_size():
        raise UserError(
            f"{images.path} holds {len(images)} images, fewer than {ranks.world_size()} processes: use fewer"
        )
    parts = ranks.gather(_own_part(images, network, needs, batch_size))
    if parts is None:
        return None
    for part in parts:
        if isinstance(part, UserError):
            raise part
    for part in parts[1:]:
        parts[0].merge(part)
    if parts[0].pixels.all_equal:
        raise UserError(f"{images.path}: all {len(images)} images are the same: look at how they were made")
    return parts[0]


def _own_part(images, network, needs, batch_size):
    """This rank's pass; or its error, for rank 0 to raise: the others would wait for it for ever."""
    start, stop = ranks.own_part(len(images))
    own = Collected(needs, stop - start)
    try:
        with tqdm(total=stop - start, unit="image", desc=images.path.name, disable=ranks.rank() > 0) as bar:
            for batch in images.batches(batch_size, start, stop):
                own.update(batch, network(batch), start + own.done)
                bar.update(len(batch))
    except UserError as error:
        return error
    return own.cpu()
