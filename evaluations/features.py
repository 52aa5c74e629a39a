"""One pass over a batch of images: their features go into sums, and are kept only where a metric needs them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm

from . import ranks
from .errors import UserError
from .metrics import GaussianStatistics, InceptionScore
from .npz_reader import one_colour


@dataclass
class Needs:
    """What the metrics need of a batch of images."""

    statistics: set = field(default_factory=set)  # features whose mean and covariance
    rows: set = field(default_factory=set)  # features to keep, image by image
    score: bool = False  # the Inception score's sums

    def __bool__(self):
        return bool(self.statistics or self.rows or self.score)


class Collected:
    """What one pass leaves. :param count: images of the pass."""

    def __init__(self, needs, count):
        self.needs, self.count, self.done = needs, count, 0
        self.statistics = {name: GaussianStatistics() for name in needs.statistics}
        self.rows, self.score = {}, InceptionScore()
        self.flat = 0  # images of one colour

    def update(self, images, features, start):
        """Add a batch and its features; `start` is the place of its first image in the file.

        :raises UserError: when a feature is not finite.
        """
        for name, array in features.items():
            if not torch.as_tensor(array).isfinite().all():
                raise UserError(
                    f"the {name} features of images {start} to {start + len(images) - 1} hold NaN or infinite numbers: "
                    "look at the network's weights"
                )
        self.flat += int(one_colour(images).sum())
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
        self.flat += other.flat
        self.score.merge(other.score)
        for name, statistics in self.statistics.items():
            statistics.merge(other.statistics[name])
        for name, rows in other.rows.items():
            self.rows[name] = np.concatenate([self.rows[name], rows])


def check_enough(images, processes):
    """:raises UserError: when the processes are more than the images to share."""
    if 0 < len(images) < processes:
        raise UserError(f"{images.path} holds {len(images)} images, fewer than {processes} processes: use fewer")


def collect(images, network, needs, batch_size):
    """Pass the images of a file through a network, on all ranks.

    :param images: `NpzImages`. :param network: function of uint8 images that returns a dict of features.
    :return: `Collected` on rank 0, None on the others.
    :raises UserError: on rank 0, when a rank could not read its images, or all are the same; see `check_content`.
    """
    if not needs:
        return Collected(needs, len(images)) if ranks.rank() == 0 else None
    check_enough(images, ranks.world_size())
    parts = ranks.gather(_own_part(images, network, needs, batch_size))
    if parts is None:
        return None
    for part in parts:
        if isinstance(part, UserError):
            raise part
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]


def _own_part(images, network, needs, batch_size):
    """This rank's pass; or its error, for rank 0 to raise: the others would wait for it for ever."""
    start, stop = ranks.own_part(len(images))
    own = Collected(needs, stop - start)
    try:
        images.check_content()
        with tqdm(total=stop - start, unit="image", desc=images.path.name, disable=ranks.rank() > 0) as bar:
            for batch in images.batches(batch_size, start, stop):
                own.update(batch, network(batch), start + own.done)
                bar.update(len(batch))
    except UserError as error:
        return error
    return own.cpu()
