"""Images from a folder, in the layout and with the crops of ADM.

Determinism: the order of the images depends only on the seed and the position in the stream, crop and flip only on
seed, epoch and image. Neither the number of ranks nor the number of data loading processes changes them.
"""

import random
import sys
from collections.abc import Iterator, Sequence

import blobfile as bf
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from . import dist_util
from .images.decoding import (
    Box,
    center_crop_arr,
    decode_image,
    decode_reduced,
    largest_short_side,
    random_crop_arr,
)
from .images.decoding import read_image as read_image  # for whoever imports it from here
from .images.index import no_class_message
from .images.listing import Listing, check_listed, check_name, list_names, log_other_formats
from .images.sequence import ImageFiles, ImageSequence, signature_of
from .images.shards import DamagedShard, is_packed, open_packed
from .utils.errors import UserError
from .utils.loader_processes import LoaderIterator, init_loader_process
from .utils.loader_processes import LoaderWorkerDied as LoaderWorkerDied  # what `next()` of `load_data` may raise
from .utils.random_numbers import fold_seed

MOST_SKIPPED = 100  # images in a row: then the disk is gone, and going on would only skip all the others


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    num_workers: int = 1,
    seed: int = 0,
    start_step: int = 0,
    paths: Sequence[str] | None = None,
    on_bad_image: str = "error",
    fast_decode: bool = False,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """An endless iterator over `(batch, cond)`.

    `batch` is (batch_size, 3, image_size, image_size) float32 in [-1, 1]; `cond` is `{}`, or with `class_cond`
    `{"y": (batch_size,) int64}`. The stream is one permutation of all images after another. Each global batch is the
    next world_size * batch_size images of it, split into one block per rank.

    :param data_dir: a folder, local or remote; all its subfolders are searched too. Or a folder
        that scripts/pack_images.py made of it, which gives the same batches.
    :param batch_size: images per rank.
    :param class_cond: take labels from the file names; see `image_classes`.
    :param deterministic: keep the sorted order instead of shuffling.
    :param random_crop: crop between 80 and 100 % of the short side at random, instead of the centre.
    :param random_flip: mirror half of the images.
    :param num_workers: data loading processes; 0: load in this process.
    :param start_step: number of global batches to skip at the start of the stream, as a resumed run does.
    :param paths: the images of `data_dir`, if they have been listed already.
    :param on_bad_image: `error`, or `skip` to replace an image that cannot be read by the next one.
    :param fast_decode: decode large JPEGs at a fraction of their size; see `images.decoding.decode_reduced`.
    :raises UserError: for a folder without images, with fewer than a global batch, or with file names without a class;
        and from `next()` for an image that cannot be read.
    :raises LoaderWorkerDied: from `next()`, when a data loading process was killed, usually for lack of memory.
    """
    paths = list_image_files(data_dir) if paths is None else paths
    dataset = ImageDataset(
        image_size,
        paths,
        classes=image_classes(paths)[0] if class_cond else None,
        random_crop=random_crop,
        random_flip=random_flip,
        seed=seed,
        on_bad_image=on_bad_image,
        fast_decode=fast_decode,
    )
    return stream(dataset, data_dir, batch_size, num_workers, seed, start_step, shuffle=not deterministic)


def stream(
    dataset: Dataset,
    source: str,
    batch_size: int,
    num_workers: int,
    seed: int,
    start_step: int,
    shuffle: bool = True,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """An endless iterator over this rank's batches of a dataset; see `load_data`.

    :param source: the name of the dataset in error messages.
    :raises UserError: for fewer items than a global batch. `next()` raises the errors of `LoaderIterator`.
    """
    global_batch = batch_size * dist_util.get_world_size()
    if len(dataset) < global_batch:
        raise UserError(
            f"{source} holds {len(dataset)} images, fewer than one global batch of {global_batch} "
            f"({batch_size} per rank): lower --batch_size"
        )
    sampler = StreamSampler(len(dataset), batch_size, seed=seed, shuffle=shuffle, start_step=start_step)
    return LoaderIterator(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=dist_util.dev().type == "cuda",
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=init_loader_process,
        )
    )


def list_image_files(data_dir: str) -> Sequence[str]:
    """Paths of all images in a folder and its subfolders, in ADM's order: files and subfolders sorted together by name.

    If there are images of other formats, one log line counts them; they are ignored.

    :return: a list; for a packed folder its `ImageShards`, a sequence of the paths that the images had.
    :raises UserError: when the folder does not exist or holds no image, a subfolder cannot be read, or the shards and
        the index of a packed folder do not fit.
    """
    check_name(data_dir)
    if is_packed(data_dir):
        return open_packed(data_dir)
    listing = Listing()
    paths = _list_image_files_recursively(data_dir, listing)
    check_listed(data_dir, len(paths), listing)
    log_other_formats(data_dir, listing.other_formats)
    return paths


def _list_image_files_recursively(data_dir: str, listing: Listing | None = None) -> list[str]:
    prefix = bf.join(data_dir, "")
    found = list_names(data_dir, listing or Listing())
    return [prefix + subfolder + name for subfolder, names in found for name in names]


def relative_names(paths: Sequence[str], data_dir: str) -> Sequence[str]:
    """Paths as `list_image_files(data_dir)` gives them -> names relative to `data_dir`."""
    if isinstance(paths, ImageSequence):
        return paths.relative()
    return [path.removeprefix(data_dir).lstrip("/") for path in paths]


def data_signature(names: Sequence[str]) -> str:
    """SHA-256, in hexadecimal, of the file names of a dataset in their order; see `relative_names`.

    A latent cache records the same hash of its images (`files_sha256`).
    """
    return names.signature() if isinstance(names, ImageSequence) else signature_of(names)


def image_classes(paths: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Labels from file names: the class is the name up to its first underscore; sorted classes are numbered from 0.

    :return: (len(paths),) int64 labels, and the sorted class names.
    :raises UserError: for a name without an underscore.
    """
    if isinstance(paths, ImageSequence):
        return paths.classes()
    names = []
    for path in paths:
        name, underscore, _ = bf.basename(path).partition("_")
        if not underscore:
            raise UserError(no_class_message(path))
        names.append(name)
    classes, labels = np.unique(names, return_inverse=True)
    return labels.astype(np.int64), classes.tolist()


class StreamSampler(Sampler):
    """This rank's batches of `(image index, epoch)` pairs, without end.

    :param start_step: number of global batches to skip at the start.
    :param rank, world_size: None: those of the process group.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        start_step: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.num_images, self.batch_size, self.seed, self.shuffle = num_images, batch_size, seed, shuffle
        self.start_step = start_step
        self.rank = dist_util.get_rank() if rank is None else rank
        self.world_size = dist_util.get_world_size() if world_size is None else world_size
        self._epoch = self._indices = None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The `(image index, epoch)` pairs of one step."""
        start = (step * self.world_size + self.rank) * self.batch_size
        positions = range(start, start + self.batch_size)
        return [
            (int(self._order(position // self.num_images)[position % self.num_images]), position // self.num_images)
            for position in positions
        ]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._epoch, self._indices = epoch, np.arange(self.num_images)
            if self.shuffle:
                self._indices = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
        return self._indices


class ImageDataset(Dataset):
    """Images as (3, resolution, resolution) float32 in [-1, 1], with `{}` or `{"y": int64}`.

    An item's key is `(index, epoch)`, as `load_data` gives it, and crop and flip depend only on the seed and this key.
    Or it is an index, from a user's own DataLoader: then they are drawn from Python's `random`, as in ADM, which torch
    seeds in every data loading process, and differ from epoch to epoch.

    :param classes: a label for each path, or None.
    :param shard, num_shards: use every num_shards-th image, beginning at `shard`. `load_data` does not use them: its
        `StreamSampler` divides the images among the ranks.
    :param on_bad_image, fast_decode: see `load_data`.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | np.ndarray | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
        seed: int = 0,
        on_bad_image: str = "error",
        fast_decode: bool = False,
    ) -> None:
        self.resolution, self.image_paths = resolution, image_paths[shard::num_shards]
        is_sequence = isinstance(self.image_paths, ImageSequence)
        self.images = self.image_paths if is_sequence else ImageFiles(self.image_paths)
        self.classes = None if classes is None else classes[shard::num_shards]
        self.local_images, self.local_classes = self.image_paths, self.classes  # ADM's names, for its forks
        self.random_crop, self.random_flip, self.seed = random_crop, random_flip, seed
        self.on_bad_image, self.fast_decode = on_bad_image, fast_decode
        self._largest_short_side = largest_short_side(resolution) if random_crop else resolution

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[np.ndarray, dict[str, np.int64]]:
        if isinstance(key, tuple):
            index, epoch = key
            rng = random.Random(fold_seed(self.seed, epoch, index))
        else:
            index, rng = key, random
        index, image, box = self._read(index)
        if self.random_crop:
            pixels = random_crop_arr(image, self.resolution, rng=rng, box=box)
        else:
            pixels = center_crop_arr(image, self.resolution, box)
        item = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
        item /= 127.5
        item -= 1
        if self.random_flip and rng.random() < 0.5:
            item = np.ascontiguousarray(item[:, :, ::-1])
        return item, {} if self.classes is None else {"y": np.int64(self.classes[index])}

    def _read(self, index: int) -> tuple[int, Image.Image, Box | None]:
        """The index, the image, and the `box` of `decode_reduced`; with `skip`, those of the first readable image from
        this index on."""
        first = index
        for _ in range(min(len(self), MOST_SKIPPED)):
            try:
                data, name = self.images.read(index), self.images.name(index)
                if self.fast_decode:
                    return index, *decode_reduced(data, name, self._largest_short_side)
                return index, decode_image(data, name), None
            except UserError as error:
                if self.on_bad_image == "error" or isinstance(error, DamagedShard):
                    raise
                print(f"skipped: {error}", file=sys.stderr, flush=True)
                index = (index + 1) % len(self)
        others = min(len(self), MOST_SKIPPED) - 1
        raise UserError(
            f"{self.images.name(first)} and the {others} images after it cannot be read: check that their folder is "
            "still there"
        )
