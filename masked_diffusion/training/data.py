"""The training data: images of a folder, or their cached latents."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import dist_util
from ..config import RunConfig
from ..image_datasets import (
    StreamSampler,
    data_signature,
    image_classes,
    list_image_files,
    load_data,
    relative_names,
)
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

    def find_paths() -> list[str]:
        paths = list_image_files(data.data_dir)
        return preflight.check_images(paths, config.model.image_size, data.on_bad_image, data.data_dir)

    paths = dist_util.run_on_main(find_paths)
    labels, class_names = image_classes(paths) if data.class_cond else (None, [])
    options = _stream_options(config) | {"paths": paths, "on_bad_image": data.on_bad_image}

    def load(first_stage: Any, **position: int) -> Iterator:  # images are encoded later, in the training step
        return load_data(data_dir=data.data_dir, **options, **position)

    signature = data_signature(relative_names(paths, data.data_dir))
    return TrainingData(paths, labels, class_names, signature, config.train.batch_size, load)


def _find_latents(config: RunConfig) -> TrainingData:
    cache = LatentCache(config.data.latent_dir)
    shards = [cache.describe(shard) for shard in range(len(cache))]
    class_cond = config.data.class_cond
    if class_cond:
        cache.check(class_cond=True)
    labels = np.concatenate([shard["labels"] for shard in shards]) if class_cond else None
    names = [name for shard in shards for name in shard["files"]]
    classes = cache.header["classes"] if class_cond else []
    load = partial(load_latents, latent_dir=config.data.latent_dir, **_stream_options(config))
    return TrainingData(names, labels, classes, cache.header["files_sha256"], config.train.batch_size, load)
