"""Many images: finished batches as shards on the disk, one npz at the end."""

import io
import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import dist_util, logger
from ..utils.errors import UserError
from ..utils.files import atomic_write, write_json
from ..utils.locks import FileLock
from .image_sampler import ImageSampler

BEFORE = {"quantize": "round", "vae_precision": "fp32"}  # settings that older files do not mention, as they were then
FIRST_IMAGES = 64  # that `merge` returns


class ShardStore:
    """Finished images of a run: one npz per batch in a folder, each with the indices it holds.

    One run at a time fills it, of any number of ranks, which all see the folder: rank 0 holds `NAME.lock` beside it
    until `merge` is done or `close` is called, or until its process ends. A context manager closes it.

    :param path: the npz that they will be merged into; the shards lie in a folder beside it. All ranks share it.
    :param settings: what the images are a function of, as JSON values. They go into the npz.
    :raises UserError: when shards or npz are there and were made with other settings, and while another run draws them.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path, self.settings, self._lock = Path(path), settings, None
        self.folder = self.path.with_suffix(".shards")
        dist_util.run_on_main(self._open)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Let another run have the store."""
        if self._lock is not None:
            self._lock.release()

    def _open(self):
        self._check_settings()
        if self.finished() and not self.folder.exists():
            return
        advice = "wait for it, end it, or choose another --log_dir; nothing was done"
        self._lock = FileLock(self.path.with_suffix(".lock"), f"{self.path} is being drawn", advice)
        if not self._lock.is_held:
            logger.log(f"{self.folder} has no locks: take care that no other run draws {self.path.name} there")
        self._check_settings()  # of a run that ended in between
        if self.finished():  # a run was killed after the last image, before it could remove the shards
            shutil.rmtree(self.folder, ignore_errors=True)
            self.close()
            return
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "settings.json", self.settings)

    def _check_settings(self):
        described = self.folder / "settings.json"
        if self.finished():
            with np.load(self.path, allow_pickle=False) as arrays:
                place, found = self.path, json.loads(str(arrays["settings"]))
        elif described.exists():
            place, found = self.folder, json.loads(described.read_text())
        else:
            return
        found = BEFORE | found
        different = [key for key, value in self.settings.items() if found.get(key) != value]
        if different:
            key = different[0]
            raise UserError(
                f"{place} was made with {key} {found.get(key)}, now it is {self.settings[key]}: use the same, "
                "choose another --log_dir, or remove it"
            )

    def finished(self) -> bool:
        return self.path.exists()

    def shards(self) -> list[Path]:
        """All shards, in the order of their first image."""
        found = ((re.fullmatch(r"shard_(\d+)_x\d+\.npz", path.name), path) for path in self.folder.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def missing(self, num_samples: int) -> list[int]:
        """The indices below `num_samples` that no shard holds, ascending. Rank 0 looks; all ranks call it.

        :raises UserError: for a shard that cannot be read.
        """
        return dist_util.run_on_main(self._find_missing, num_samples).tolist()

    def _find_missing(self, num_samples):
        held = np.zeros(num_samples, dtype=bool)
        for shard in self.shards():
            (indices,) = _read(shard, "indices")
            held[indices] = True
        return np.flatnonzero(~held)

    def write(self, indices: Sequence[int], images: np.ndarray, labels: torch.Tensor) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, indices=np.asarray(indices), images=images, labels=np.asarray(labels))
        with atomic_write(self.folder / f"shard_{indices[0]:06d}_x{len(indices)}.npz") as file:
            file.write(buffer.getbuffer())

    def merge(self, num_samples: int) -> np.ndarray:
        """Write the npz: images [0, num_samples) in order as `arr_0`, their labels as `arr_1`, and the settings.

        Each shard is read once, and few are in memory, whatever the number of images; the folder of shards is removed
        at the end.

        :return: the first images, at most 64.
        :raises UserError: for an image that no shard holds, and a shard that cannot be read.
        """
        labels, first = np.zeros(num_samples, dtype=np.int64), []
        with atomic_write(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                for index, (image, label) in enumerate(self._in_order(num_samples)):
                    if index == 0:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *image.shape)}
                        np.lib.format.write_array_header_1_0(array, header)
                    if index < FIRST_IMAGES:
                        first.append(image.copy())
                    array.write(image.tobytes())
                    labels[index] = label
            for name, array in (("arr_1", labels), ("settings", np.array(json.dumps(self.settings)))):
                buffer = io.BytesIO()
                np.save(buffer, array)
                archive.writestr(f"{name}.npy", buffer.getvalue())
        shutil.rmtree(self.folder)
        self.close()
        return np.stack(first)

    def _in_order(self, num_samples) -> Iterator[tuple[np.ndarray, int]]:
        """Images and labels by index. Shards of one run follow each other; those of several runs interleave."""
        shards, ahead = iter(self.shards()), {}
        for index in range(num_samples):
            while index not in ahead:
                shard = next(shards, None)
                if shard is None:
                    raise UserError(f"{self.folder} lacks image {index}: run the same command again to draw it")
                indices, images, labels = _read(shard, "indices", "images", "labels")
                ahead |= {i: (images[row], labels[row]) for row, i in enumerate(indices.tolist()) if i >= index}
            yield ahead.pop(index)


def _read(shard, *names):
    try:
        with np.load(shard, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{shard} cannot be read ({error}): remove it, and its images are drawn again") from error


def draw_samples(
    image_sampler: ImageSampler,
    store: ShardStore,
    num_samples: int,
    batch_size: int,
    choose: Callable[[list[int]], torch.Tensor],
) -> None:
    """Draw what the store lacks of `num_samples` images, shared among the ranks; return when all of them have.

    :param choose: a function from (n,) indices to (n,) labels.
    """
    missing = store.missing(num_samples)  # the same list on all ranks
    held = num_samples - len(missing)
    if held:
        logger.log(f"{held} of {num_samples} images are there already")
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    progress = _Progress(str(store.path), len(missing))
    for batch in batches[dist_util.get_rank() :: dist_util.get_world_size()]:
        labels = choose(batch)
        store.write(batch, image_sampler(batch, labels), labels)
        progress.add(len(batch))
    progress.wait()


class _Progress:
    """Images of all ranks, shown by rank 0. Its cost does not grow with them."""

    def __init__(self, key: str, total: int):
        self.key, self.total = key, total
        self.before = dist_util.add_to_count(key, 0)  # of an earlier call in this process
        dist_util.host_barrier()
        self.bar = tqdm(total=total, unit="image", disable=None if dist_util.is_main() else True)
        self.start = self.last_log = time.perf_counter()
        self.shown = 0

    def add(self, count: int) -> None:
        self._show(dist_util.add_to_count(self.key, count) - self.before)

    def wait(self) -> None:
        dist_util.host_barrier((lambda: self.add(0)) if dist_util.is_main() else None)
        self._show(self.total)
        self.bar.close()

    def _show(self, done):
        now = time.perf_counter()
        if not dist_util.is_main() or done == self.shown:
            return
        self.bar.update(done - self.shown)
        self.shown = done
        if now - self.last_log > 10 or done == self.total:
            speed = done / (now - self.start)
            eta = timedelta(seconds=round((self.total - done) / speed))
            logger.log(f"{done}/{self.total} images  {speed:.2f} images/s  ETA {eta}")
            self.last_log = now
