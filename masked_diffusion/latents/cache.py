"""The latent cache: the posteriors of a dataset, encoded once and kept on disk, so that training need not encode.

A cache is a folder with `latents.json`, which records how it was made, and shards of consecutive images in the order of
`list_image_files`. `shard_00000.npy` is (n, 2, m, C, h, w) float16. Its axes are: image; original or mirrored; mean and
standard deviation, or of an autoencoder without posterior the latent alone (before shift and scale); channel; row;
column. `shard_00000.json` has the array's SHA-256, and the file names and labels of its images. It is written last, so
that its presence means that the shard is complete.
"""

import hashlib
import json
import math
import os
import random
import resource
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .. import dist_util, logger
from ..image_datasets import ImageDataset, data_signature, image_classes, list_image_files, relative_names, stream
from ..utils.errors import UserError
from ..utils.files import atomic_write, disk_errors, file_hash, write_json
from ..utils.loader_processes import LoaderIterator, init_loader_process
from ..utils.random_numbers import fold_seed
from .autoencoder import FirstStage, IdentityFirstStage, describe_first_stage

VERSION = 1
HEADER_NAME = "latents.json"
ADVICE = "free some disk space, or choose another --latent_dir; run the same command again to resume"
OPEN_FILES_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MAX_OPEN_FILES = (OPEN_FILES_LIMIT if OPEN_FILES_LIMIT > 0 else 4096) // 2  # the rest is left to the loader
HEADER_NUMBERS = ("version", "image_size", "channels", "latent_size", "num_images", "shard_size")

# ---------------------------------------------------------------- the folder


def fingerprint(first_stage: FirstStage) -> str:
    """SHA-256, in hexadecimal, of the names, shapes, dtypes and values of a VAE's weights; `identity` for pixels."""
    if isinstance(first_stage, IdentityFirstStage):
        return "identity"
    digest = hashlib.sha256()
    for name, tensor in sorted(first_stage.vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentCache:
    """The files of a latent cache. Shards are numbered from 0.

    :raises UserError: when the folder holds no latent cache, or one of another format version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = _read_json(self.folder / HEADER_NAME, {"shards": list} | dict.fromkeys(HEADER_NUMBERS, int))
        self.header = {"fast_decode": False, "moments": 2, "vae_precision": "fp32"} | self.header  # of older versions
        self.check(version=VERSION)

    def check(self, **wanted: Any) -> None:
        """Check entries of the header, given as keyword arguments.

        :raises UserError: for the first entry with another value; the message has both values.
        """
        for key, value in wanted.items():
            if self.header.get(key) != value:
                raise UserError(
                    f"{self.folder} was made with {key} {self.header.get(key)} (--vae {self.header.get('vae')}), "
                    f"now it is {value}: repeat its settings, or choose another --latent_dir"
                )

    def __len__(self) -> int:
        return len(self.header["shards"])

    def path(self, shard: int) -> Path:
        """The path of a shard's array."""
        return self.folder / self.header["shards"][shard]

    def rows(self, shard: int) -> range:
        """The indices of a shard's images."""
        start, size = shard * self.header["shard_size"], self.header["shard_size"]
        return range(start, min(start + size, self.header["num_images"]))

    def describe(self, shard: int) -> dict[str, Any]:
        """`sha256`, `files` and `labels` (None without classes) of a complete shard, without reading its array.

        :raises UserError: when the shard is not complete.
        """
        return _read_json(self.path(shard).with_suffix(".json"), {"sha256": str, "files": list})

    def open(self, shard: int) -> np.memmap:
        """A shard as a memory-mapped (n, 2, m, C, h, w) float16 array.

        :raises UserError: for an array that is missing, truncated or of another shape.
        """
        path, size = self.path(shard), self.header["latent_size"]
        shape = (len(self.rows(shard)), 2, self.header["moments"], self.header["channels"], size, size)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if (array.shape, array.dtype) != (shape, np.float16) or not array.flags.c_contiguous:
                raise UserError(f"{array.dtype} {array.shape} instead of float16 {shape}")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): run scripts/encode_latents.py again") from error
        return array

    def is_complete(self, shard: int, verify: bool = False) -> bool:
        """Whether a shard is complete.

        :param verify: also compare the checksum, for which the whole shard is read.
        """
        try:
            described = self.describe(shard)
            self.open(shard)
        except UserError:
            return False
        return not verify or file_hash(self.path(shard)) == described["sha256"]

    def write(self, shard: int, latents: np.ndarray, files: list[str], labels: list[int] | None) -> None:
        """Write a complete shard.

        :param latents: (n, 2, m, C, h, w) float16; see the docstring of this module.
        :raises UserError: for latents that overflow float16, and when the files cannot be written.
        """
        path = self.path(shard)
        if not np.isfinite(latents).all():
            raise UserError(
                f"{files[0]} to {files[-1]}: a latent is infinite or NaN in float16: train with --data_dir, without a "
                "latent cache"
            )
        with disk_errors(path, ADVICE):
            # Remove an old description first: it would mark the new array as complete too early.
            path.with_suffix(".json").unlink(missing_ok=True)
            with atomic_write(path, ADVICE) as file:
                np.save(file, latents, allow_pickle=False)
            write_json(path.with_suffix(".json"), {"sha256": file_hash(path), "files": files, "labels": labels})


def _read_json(path: Path, required: dict[str, type]) -> dict[str, Any]:
    """Read a dictionary from a file, and check that it has the `required` keys, with values of the given types."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise UserError(f"it holds a {type(found).__name__} instead of a dictionary")
        for key, kind in required.items():
            if not isinstance(found.get(key), kind):
                raise UserError(f"its {key!r} is {found.get(key)!r}")
        return found
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): run scripts/encode_latents.py") from error


# ---------------------------------------------------------------- encoding


def encode_latents(
    *,
    data_dir: str,
    latent_dir: str,
    image_size: int,
    first_stage: FirstStage,
    vae: str,
    batch_size: int,
    shard_size: int,
    class_cond: bool,
    num_workers: int,
    verify: bool,
    fast_decode: bool = False,
    paths: Sequence[str] | None = None,
    on_bad_image: str = "error",
) -> None:
    """Encode all images of a folder, centre-cropped, original and mirrored. Complete shards are not encoded again.

    The missing shards are divided among the ranks. A shard does not depend on the rank that encodes it.

    :param vae: the name of the first stage, for messages; its fingerprint decides whether a cache matches.
    :param batch_size: images per rank that are encoded at once.
    :param shard_size: images per shard.
    :param class_cond: take labels from the file names; see `image_classes`.
    :param num_workers: data loading processes per rank; 0: load in this process.
    :param verify: compare complete shards with their checksums, and encode damaged ones again.
    :param fast_decode: see `load_data`.
    :param paths: the images of `data_dir`, if they have been listed already.
    :param on_bad_image: `error`, or `skip` to put the next image, with its name and label, in the place of one that
        cannot be read, as training does.
    :raises UserError: for a cache that was made with other settings or files, for an image size that is not a multiple
        of the first stage's downsampling, for bad image folders as in `load_data`, and when files cannot be written.
    """
    if image_size % first_stage.downsample:
        raise UserError(
            f"--image_size is {image_size}: it must be a multiple of {first_stage.downsample}, the factor by which "
            f"--vae {vae} makes images smaller"
        )
    paths = list_image_files(data_dir) if paths is None else paths
    files = relative_names(paths, data_dir)
    labels, classes = image_classes(paths) if class_cond else (None, [])
    header = {
        "version": VERSION,
        "image_size": image_size,
        "crop": "center",
        "fast_decode": fast_decode,
        "vae_precision": first_stage.precision,
        "vae_fingerprint": fingerprint(first_stage),
        "channels": first_stage.channels,
        "moments": first_stage.num_moments,
        "latent_size": image_size // first_stage.downsample,
        "num_images": len(files),
        "files_sha256": data_signature(files),
        "class_cond": class_cond,
        "classes": classes,
        "shard_size": shard_size,
        "shards": [f"shard_{i:05d}.npy" for i in range(-(-len(files) // shard_size))],
    }
    cache = _start_cache(Path(latent_dir), header, {"vae": vae} | describe_first_stage(first_stage))
    missing = _find_incomplete(cache, verify)
    own = missing[dist_util.get_rank() :: dist_util.get_world_size()]
    batches = [rows[i : i + batch_size] for rows in map(cache.rows, own) for i in range(0, len(rows), batch_size)]
    # Each image's own index is its label here: with `skip` it tells which image was read in the place of another.
    dataset = ImageDataset(
        image_size,
        paths,
        classes=np.arange(len(files)),
        random_flip=False,
        on_bad_image=on_bad_image,
        fast_decode=fast_decode,
    )
    pin = dist_util.dev().type == "cuda"
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin, worker_init_fn=init_loader_process
    )
    encoded = _encode_batches(first_stage, loader, sum(map(len, batches)), sum(len(cache.rows(i)) for i in missing))
    for shard in own:
        rows = cache.rows(shard)
        batches = [next(encoded) for _ in range(0, len(rows), batch_size)]
        latents, indices = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        own_labels = labels[indices].tolist() if class_cond else None
        cache.write(shard, latents, [files[index] for index in indices.tolist()], own_labels)
    dist_util.barrier()


def _start_cache(folder: Path, header: dict[str, Any], notes: dict[str, Any]) -> LatentCache:
    if dist_util.is_main():
        with disk_errors(folder / HEADER_NAME, ADVICE):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".*.partial"):  # left by a killed process
                path.unlink()
            if not (folder / HEADER_NAME).exists():
                write_json(folder / HEADER_NAME, header | notes)
    dist_util.barrier()
    cache = LatentCache(folder)
    cache.check(**header)
    return cache


def _find_incomplete(cache: LatentCache, verify: bool) -> list[int]:
    """The shards to encode, ascending. Each rank looks at a part of the shards, and all get the whole list."""
    incomplete = torch.zeros(len(cache), device=dist_util.dev())
    for shard in range(dist_util.get_rank(), len(cache), dist_util.get_world_size()):
        incomplete[shard] = not cache.is_complete(shard, verify)
    missing = dist_util.mean_over_ranks(incomplete).nonzero().flatten().tolist()
    logger.log(f"{len(cache) - len(missing)} of {len(cache)} shards are complete already")
    for path in map(cache.path, missing):
        if path.with_suffix(".json").exists():
            logger.log(f"{path} is damaged: it is encoded again")
    dist_util.barrier()  # rank 0 must have logged the damaged shards before another rank replaces them
    return missing


def _encode_batches(
    first_stage: FirstStage, loader: DataLoader, own: int, total: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches as (N, 2, m, C, h, w) float16 with the (N,) indices of their images, and log the progress.

    :param own: number of images that this rank encodes. :param total: that of all ranks together.
    """
    start = last_log = time.perf_counter()
    count = 0
    for images, cond in LoaderIterator(loader):
        images = images.to(dist_util.dev(), non_blocking=True)
        flips = [first_stage.moments(flip) for flip in (images, images.flip(3))]
        latents = torch.stack(flips, dim=1).to(torch.float16).cpu().numpy()
        count += len(latents)
        now = time.perf_counter()
        if now - last_log > 10 or count == own:
            done, last_log = total * count // own, now
            speed = done / (now - start)
            eta = timedelta(seconds=round((total - done) / speed))
            logger.log(f"{done}/{total} images  {speed:.2f} images/s  ETA {eta}")
        yield latents, cond["y"].numpy()


# ---------------------------------------------------------------- training


def load_latents(
    *,
    latent_dir: str,
    batch_size: int,
    image_size: int,
    first_stage: FirstStage,
    class_cond: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    fast_decode: bool = False,
    num_workers: int = 1,
    seed: int = 0,
    start_step: int = 0,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """`load_data` from a latent cache: an endless iterator over `(batch, cond)` of the same images, flips and labels.

    `batch` is (batch_size, m, C, h, w) float32, from which `first_stage.sample` draws latents; `cond` is that of
    `load_data`. Parameters that are not listed here are those of `load_data`.

    :param latent_dir: a folder made by `encode_latents`; the images themselves are not needed.
    :param random_crop: must be False, since a cache holds centre crops.
    :param fast_decode: must be that of `encode_latents`.
    :raises UserError: for a cache of another first stage, size, crop or decoding, without labels although `class_cond`
        is True, with fewer images than a global batch, or with a shard that is missing or truncated.
    """
    dataset = LatentDataset(latent_dir, class_cond=class_cond, random_flip=random_flip, seed=seed)
    dataset.cache.check(
        image_size=image_size,
        crop="random" if random_crop else "center",
        fast_decode=fast_decode,
        vae_precision=first_stage.precision,
        vae_fingerprint=fingerprint(first_stage),
    )
    return stream(dataset, latent_dir, batch_size, num_workers, seed, start_step)


class LatentDataset(Dataset):
    """Moments as (m, C, h, w) float32, see `AutoencoderFirstStage.moments`, with `{}` or `{"y": int64}`.

    Keys are those of `ImageDataset`, and the same items are mirrored. Shards are opened when they are needed.

    :raises UserError: for a cache that is not complete, or has no labels although `class_cond` is True.
    """

    def __init__(
        self, latent_dir: str | Path, class_cond: bool = False, random_flip: bool = True, seed: int = 0
    ) -> None:
        self.cache, self.random_flip, self.seed = LatentCache(latent_dir), random_flip, seed
        if class_cond:
            self.cache.check(class_cond=True)
        labels, self._paths, self._offsets = [], [], []
        for shard in range(len(self.cache)):
            labels.append(self.cache.describe(shard)["labels"])
            self._paths.append(str(self.cache.path(shard)))  # joining and hashing a Path takes as long as a read
            self._offsets.append(self.cache.open(shard).offset)
        self.classes = np.concatenate(labels) if class_cond else None
        size = self.cache.header["latent_size"]
        self._shape = (self.cache.header["moments"], self.cache.header["channels"], size, size)

    def __len__(self) -> int:
        return self.cache.header["num_images"]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[np.ndarray, dict[str, np.int64]]:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        flip = self.random_flip and random.Random(fold_seed(self.seed, epoch, index)).random() < 0.5
        moments = self._read(index, int(flip)).astype(np.float32)
        return moments, {} if self.classes is None else {"y": np.int64(self.classes[index])}

    def _read(self, index: int, flip: int) -> np.ndarray:
        """The moments of an image as (m, C, h, w) float16.

        Read by position: a memory map would have to be made anew whenever a shard is opened, and would read much more
        of the disk than it is asked for.
        """
        shard, row = divmod(index, self.cache.header["shard_size"])
        path, size = self._paths[shard], 2 * math.prod(self._shape)
        try:
            data = os.pread(_open_file(path).descriptor, size, self._offsets[shard] + (2 * row + flip) * size)
            if len(data) != size:
                raise UserError("it has been truncated")
        except (OSError, UserError) as error:
            raise UserError(f"{path} cannot be read ({error}): run scripts/encode_latents.py again") from error
        return np.frombuffer(data, np.float16).reshape(self._shape)


class _OpenFile:
    """A file that is closed when nobody uses it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # no reading ahead: the next image is elsewhere
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open_file = lru_cache(maxsize=MAX_OPEN_FILES)(_OpenFile)
