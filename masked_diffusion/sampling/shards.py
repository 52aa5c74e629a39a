"""Many images: finished batches as shards on the disk, one npz at the end."""

import io
import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import dist_util, logger
from ..utils.errors import UserError
from ..utils.files import atomic_write, write_json
from .image_sampler import ImageSampler

BEFORE = {"quantize": "round"}  # settings that older files do not mention, as they were then


class ShardStore:
    """Finished images of a run: one npz per batch in a folder, each with the indices it holds.

    :param path: the npz that they will be merged into; the shards lie in a folder beside it. All ranks share it.
    :param settings: what the images are a function of, as JSON values. They go into the npz.
    :raises UserError: when shards or npz are there and were made with other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path, self.settings = Path(path), settings
        self.folder = self.path.with_suffix(".shards")
        described = self.folder / "settings.json"
        if self.finished():
            with np.load(self.path, allow_pickle=False) as arrays:
                self._check(self.path, json.loads(str(arrays["settings"])))
        elif described.exists():
            self._check(self.folder, json.loads(described.read_text()))
        dist_util.barrier()
        if dist_util.is_main() and not self.finished():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(described, settings)
        dist_util.barrier()

    def _check(self, place, found):
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
        return sorted(self.folder.glob("shard_*.npz"))

    def missing(self, num_samples: int) -> list[int]:
        """The indices below `num_samples` that no shard holds, ascending.

        :raises UserError: for a shard that cannot be read.
        """
        held = np.zeros(num_samples, dtype=bool)
        for shard in self.shards():
            try:
                with np.load(shard, allow_pickle=False) as arrays:
                    held[arrays["indices"]] = True
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{shard} cannot be read ({error}): remove it, and its images are drawn again"
                ) from error
        return np.flatnonzero(~held).tolist()

    def count(self) -> int:
        """Images in all shards, of all ranks, by their names."""
        return sum(int(re.search(r"_x(\d+)$", shard.stem)[1]) for shard in self.shards())

    def write(self, indices: Sequence[int], images: np.ndarray, labels: torch.Tensor) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, indices=np.asarray(indices), images=images, labels=np.asarray(labels))
        with atomic_write(self.folder / f"shard_{indices[0]:06d}_x{len(indices)}.npz") as file:
            file.write(buffer.getbuffer())

    def merge(self, num_samples: int) -> np.ndarray:
        """Write the npz: images [0, num_samples) in order as `arr_0`, their labels as `arr_1`, and the settings.

        Few shards at a time are in memory, whatever the number of images; the folder of shards is removed at the end.

        :return: the first images, at most 64.
        """
        shards, labels = self.shards(), np.zeros(num_samples, dtype=np.int64)
        shard_of, row_of = np.zeros(num_samples, dtype=np.int64), np.zeros(num_samples, dtype=np.int64)
        for number, shard in enumerate(shards):
            with np.load(shard, allow_pickle=False) as arrays:
                indices = arrays["indices"]
                labels[indices] = arrays["labels"]
            shard_of[indices], row_of[indices] = number, np.arange(len(indices))

        @lru_cache(maxsize=4)
        def read(number):
            with np.load(shards[number], allow_pickle=False) as arrays:
                return arrays["images"]

        with atomic_write(self.path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *read(0).shape[1:])}
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for number, row in zip(shard_of.tolist(), row_of, strict=True):
                    array.write(read(number)[row].tobytes())
            for name, array in (("arr_1", labels), ("settings", np.array(json.dumps(self.settings)))):
                buffer = io.BytesIO()
                np.save(buffer, array)
                archive.writestr(f"{name}.npy", buffer.getvalue())
        places = zip(shard_of[:64].tolist(), row_of[:64], strict=True)
        first = np.stack([read(number)[row] for number, row in places])
        shutil.rmtree(self.folder)
        return first


def draw_samples(
    image_sampler: ImageSampler,
    store: ShardStore,
    num_samples: int,
    batch_size: int,
    choose: Callable[[list[int]], torch.Tensor],
) -> None:
    """Draw what the store lacks of `num_samples` images, shared among the ranks.

    :param choose: a function from (n,) indices to (n,) labels.
    """
    missing = store.missing(num_samples)
    dist_util.barrier()  # before anyone writes: all ranks share out the same list
    held = num_samples - len(missing)
    if held:
        logger.log(f"{held} of {num_samples} images are there already")
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    own = batches[dist_util.get_rank() :: dist_util.get_world_size()]
    bar = tqdm(total=len(missing), unit="image", disable=None if dist_util.is_main() else True)
    start = last_log = time.perf_counter()
    for batch in own:
        labels = choose(batch)
        store.write(batch, image_sampler(batch, labels), labels)
        if not dist_util.is_main():
            continue
        done, now = store.count() - held, time.perf_counter()
        bar.update(done - bar.n)
        if now - last_log > 10 or batch is own[-1]:
            speed = done / (now - start)
            eta = timedelta(seconds=round((len(missing) - done) / speed))
            logger.log(f"{done}/{len(missing)} images  {speed:.2f} images/s  ETA {eta}")
            last_log = now
    bar.close()
    dist_util.barrier()
