"""Frechet and kernel distance while a model is in training, of few samples: to see a trend, not to publish."""

from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F

from . import ranks
from .errors import UserError, check_packages
from .features import Needs, collect
from .files import INCEPTION_NAME, cache_folder, named_inception
from .metrics import GaussianStatistics, frechet_distance, kernel_distance
from .npz_reader import NpzImages
from .suite import check_sizes

SIDE = 16  # pixels of a side that the pixel distance is taken of, at most
KID_IMAGES = 2_000  # of the reference, at most; samples are few, and all of them count
BATCH_SIZE = 64


def inception_at_hand():
    """The path of the network's weights where they are on the disk, else None: a training run downloads nothing.

    :raises UserError: when INCEPTION_V3_PATH names no file, or one that cannot be used without torch-fidelity.
    """
    if named := named_inception():
        check_packages("torch-fidelity", reason=f"INCEPTION_V3_PATH={named}")
        return named
    cached = cache_folder() / INCEPTION_NAME
    return cached if cached.is_file() and find_spec("torch_fidelity") else None


def pixel_features(images):
    """(N, H, W, 3) uint8 -> pool (N, d): their pixels in [0, 1], averaged down to 16 x 16."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    size = [min(side, SIDE) for side in x.shape[2:]]
    return {"pool": F.adaptive_avg_pool2d(x, size).flatten(1)}


class LiveEvaluation:
    """Compares samples with a reference: FID and KID where Inception's weights are at hand, else pixels.

    All ranks make one, and call it together. The global random streams stay as they were.

    :param path: npz of a reference; see `NpzImages`. :param size: height and width of the samples.
    :param device: where Inception runs.
    :raises UserError: when the reference's images have another size, or there is nothing to compare with.
    """

    def __init__(self, path, size, device="cpu"):
        images, weights = NpzImages(path), inception_at_hand()
        if images.size not in (None, size):
            raise UserError(
                f"{path} has images of {images.size}, the model draws {size}: make a reference of that size"
            )
        if not len(images) and not weights:
            raise UserError(
                f"{path} holds statistics of Inception's features alone, and {INCEPTION_NAME} is not at hand: "
                "name it in INCEPTION_V3_PATH, or take a reference with images"
            )
        self.network = self._inception(weights, device) if weights else pixel_features
        self.has_inception = bool(weights)
        if weights:
            check_sizes(["fid"], images, self.network.sizes)
        self.statistics, self.rows = self._read(images)

    @staticmethod
    def _inception(weights, device):
        from .inception_torch import TorchInception

        with torch.random.fork_rng(devices=[]):  # its layers draw initial weights
            return TorchInception(weights, device)

    def _read(self, images):
        """The reference's statistics, and for KID the features of some of its images: on rank 0."""
        ready = self.has_inception and images.has_statistics("mu", "sigma")
        statistics, rows = images.statistics("mu", "sigma") if ready else None, None
        needs = Needs(statistics=set() if ready else {"pool"}, rows={"pool"} if self.has_inception else set())
        some = images.some(KID_IMAGES)
        if ready:
            images = some
        collected = collect(images, self.network, needs, BATCH_SIZE) if len(images) else None
        if collected is not None:
            statistics = statistics or collected.statistics["pool"].result()
            if self.has_inception:
                rows = collected.rows["pool"] if ready else collected.rows["pool"][some.places]
        return statistics, rows

    def __call__(self, batches):
        """Metrics of the samples of all ranks.

        :param batches: this rank's (n, H, W, 3) uint8 images, batch by batch.
        :return: dict of numbers on rank 0, empty on the others.
        """
        own, rows = GaussianStatistics(), []
        for images in batches:
            features = self.network(images)["pool"]
            own.update(features)
            rows.append(features.cpu().numpy())
        parts = ranks.gather((own.cpu(), rows))
        if parts is None:
            return {}
        for statistics, _ in parts[1:]:
            own.merge(statistics)
        distance = frechet_distance(*own.result(), *self.statistics)
        if not self.has_inception:
            return {"frechet_pixels": distance}
        values = {"fid": distance}
        if self.rows is not None:
            drawn = np.concatenate([row for _, rows in parts for row in rows])
            values["kid"], values["kid_std"] = kernel_distance(self.rows, drawn)
        return values
