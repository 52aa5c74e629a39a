"""The training data: images of a folder, or their cached latents."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import dist_util, logger
from ..config import RunConfig
from ..image_datasets import StreamSampler, data_signature, image_classes, load_data, relative_names
from ..images.finding import INDEX_NAME, check_index_place, find_images
from ..latents.cache import LatentCache, load_latents
from . import preflight


class TrainingData(NamedTuple):
    """A dataset whose batches depend only on the seed and the step.

    :param names: file names, in the order of the image indices.
    :param labels: (len(names),) int64, or None without classes.
    :param class_names: in the order of the labels; [] without classes.
    :param signature: hash of the names; see `data_signature`.
    :param batch_size: images per rank.
    :param load: a function of the keywords `first_stage`, `seed` and `start_step` that returns the stream of batches.
    """

    names: Sequence[str]
    labels: np.ndarray | None
    class_names: list[str]
    signature: str
    batch_size: int
    load: Callable[..., Iterator]

    def stream(self, start_step: int, seed: int, first_stage: Any) -> Iterator:
        """An endless iterator over this rank's `(batch, cond)`, beginning with the batch after `start_step` steps."""
        return self.load(first_stage=first_stage, seed=seed, start_step=start_step)

    def batch_names(self, step: int, seed: int) -> list[str]:
        """The files of this rank's batch of a step, provided that none of them was skipped as unreadable."""
        sampler = StreamSampler(len(self.names), self.batch_size, seed=seed)
        return [self.names[index] for index, _ in sampler.batch(step)]


def find_data(config: RunConfig) -> TrainingData:
    """Find the images or cached latents that `--data_dir` or `--latent_dir` names. Rank 0 reads the folder for all.

    :raises UserError: for a folder without images, a folder without a valid latent cache, unreadable or too small
        images, and class names that look like a mistake.
    """
    data = _find_latents(config) if config.data.latent_dir else _find_images(config)
    if config.data.class_cond:
        place = config.data.latent_dir or config.data.data_dir
        preflight.check_classes(place, data.class_names, config.model.num_classes or len(data.class_names))
    return data


def _stream_options(config: RunConfig) -> dict[str, Any]:
    names = ("class_cond", "random_crop", "random_flip", "fast_decode", "num_workers")
    options = {name: getattr(config.data, name) for name in names}
    return options | {"batch_size": config.train.batch_size, "image_size": config.model.image_size}


def _find_images(config: RunConfig) -> TrainingData:
    data = config.data
    if data.index:
        check_index_place(data.index, data.data_dir)
    index = data.index or Path(logger.get_dir() or logger.DEFAULT_DIR, INDEX_NAME)
    paths = find_images(data.data_dir, index, data.reindex)
    paths = preflight.check_images(paths, config.model.image_size, data.on_bad_image, data.data_dir)
    labels, class_names = image_classes(paths) if data.class_cond else (None, [])
    options = _stream_options(config) | {"paths": paths, "on_bad_image": data.on_bad_image}

    def load(first_stage: Any, **position: int) -> Iterator:  # images are encoded later, in the training step
        return load_data(data_dir=data.data_dir, **options, **position)

    signature = dist_util.run_on_main(lambda: data_signature(relative_names(paths, data.data_dir)))
    return TrainingData(paths, labels, class_names, signature, config.train.batch_size, load)


class CachedNames(Sequence[str]):
    """The file names of a latent cache, read from the description of their shard when they are asked for."""

    def __init__(self, cache: LatentCache) -> None:
        self.cache, self._files = cache, lru_cache(maxsize=8)(lambda shard: cache.describe(shard)["files"])

    def __len__(self) -> int:
        return self.cache.header["num_images"]

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard, row = divmod(index, self.cache.header["shard_size"])
        return self._files(shard)[row]


def _find_latents(config: RunConfig) -> TrainingData:
    cache = LatentCache(config.data.latent_dir)
    class_cond = config.data.class_cond
    if class_cond:
        cache.check(class_cond=True)
    labels = [cache.describe(shard)["labels"] for shard in range(len(cache))]
    labels = np.concatenate(labels) if class_cond else None
    classes = cache.header["classes"] if class_cond else []
    load = partial(load_latents, latent_dir=config.data.latent_dir, **_stream_options(config))
    return TrainingData(
        CachedNames(cache), labels, classes, cache.header["files_sha256"], config.train.batch_size, load
    )
