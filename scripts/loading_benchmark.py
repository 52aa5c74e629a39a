"""Measure how many images a processor core loads per second: from a folder, packed shards and a latent cache."""

import datetime
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from benchmark import device_name, format_table

from masked_diffusion import script_util
from masked_diffusion.image_datasets import list_image_files, load_data, read_image, stream
from masked_diffusion.images.packing import pack_images
from masked_diffusion.latents.cache import VERSION, LatentCache, LatentDataset
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.options import Config, option

# images/s of one H100 in training, with which the cores for eight of them are computed: benchmarks/2026-11-23.md
H100 = {"S/2": 1572, "XL/2": 185}
GPUS = 8
MANY_SHARDS = 1252  # as many as ImageNet's cache has
IMAGES_PER_SHARD = 16
COLUMNS = {
    "name": "{}",
    "images_per_core_second": "{:.0f}",
    "ms_per_image": "{:.3f}",
    "images_per_second": "{:.0f}",
    "kib_read": "{:.1f}",
} | {f"cores for {GPUS} x {model}": "{:.1f}" for model in H100}


@dataclass(frozen=True)
class LoadingConfig(Config):
    """loading benchmark"""

    data_dir: str = option("", "folder of images, local; what they are decides the numbers")
    image_size: int = option(256, "height and width of the crops in pixels", at_least=1)
    random_crop: bool = option(False, "crop at a random place and size, not the centre")
    batch_size: int = option(32, "images per batch", at_least=1)
    batches: int = option(8, "batches in a round", at_least=1)
    rounds: int = option(5, "rounds, in which all ways take turns; the fastest counts", at_least=1)
    scratch: str | None = option(None, "folder for the packed images and the latents; None: where temporary files are")
    json: str | None = option(None, "file for the table and all settings")


Batches = Iterator[Any]


def image_ways(config: LoadingConfig, scratch: Path) -> dict[str, Callable[[], Batches]]:
    """Ways to load batches of the images, each a function that starts a stream."""
    packed = str(scratch / "packed")
    pack_images(
        data_dir=config.data_dir, out=packed, shard_size=1000, class_cond=False, on_bad_image="skip", num_workers=0,
        verify=False,
    )  # fmt: skip
    options = {name: getattr(config, name) for name in ("batch_size", "image_size", "random_crop")}

    def load(data_dir: str, fast: bool = False) -> Callable[[], Batches]:
        return lambda: load_data(data_dir=data_dir, num_workers=0, on_bad_image="skip", fast_decode=fast, **options)

    def decode_alone() -> Batches:
        paths = list_image_files(config.data_dir)
        while True:
            for start in range(0, len(paths) - config.batch_size + 1, config.batch_size):
                yield [read_image(path) for path in paths[start : start + config.batch_size]]

    return {
        "folder": load(config.data_dir),
        "folder, --fast_decode": load(config.data_dir, fast=True),
        "packed shards": load(packed),
        "decoding alone": decode_alone,
    }


def make_latents(folder: Path, num_shards: int, shard_size: int) -> Path:
    """A latent cache of random numbers, of the size that 256 pixels have."""
    folder.mkdir()
    header = {"version": VERSION, "image_size": 256, "crop": "center", "vae": "random", "class_cond": False}
    header |= {"channels": 4, "latent_size": 32, "num_images": num_shards * shard_size, "shard_size": shard_size}
    header |= {"shards": [f"shard_{i:05d}.npy" for i in range(num_shards)]}
    write_json(folder / "latents.json", header)
    latents = np.random.default_rng(0).standard_normal((shard_size, 2, 2, 4, 32, 32)).astype(np.float16)
    cache = LatentCache(folder)
    for shard in range(num_shards):
        cache.write(shard, latents, [f"{shard}_{i}.jpg" for i in range(shard_size)], None)
    return folder


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, where the system does that for a user."""
    for path in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(folder: Path) -> None:
    """Read the files of a folder, so that they are in the page cache."""
    for path in folder.iterdir():
        path.read_bytes()


def bytes_read() -> int:
    """Bytes that this process has had read from disks so far; 0 where the system does not tell."""
    path = Path("/proc/self/io")
    lines = dict(line.split(": ") for line in path.read_text().splitlines()) if path.exists() else {}
    return int(lines.get("read_bytes", 0))


class Way:
    """One way to load.

    :param start: starts its stream of batches. :param num_batches: in a round.
    :param before: called before each round.
    """

    def __init__(
        self, name: str, start: Callable[[], Batches], num_batches: int, before: Callable[[], None] = lambda: None
    ) -> None:
        self.name, self.num_batches, self.before, self.rounds = name, num_batches, before, []
        self.batches = start()
        next(self.batches)

    def run(self) -> None:
        """One round."""
        self.before()
        wall, cpu, read = time.perf_counter(), time.process_time(), bytes_read()
        for _ in range(self.num_batches):
            next(self.batches)
        self.rounds.append((time.process_time() - cpu, time.perf_counter() - wall, bytes_read() - read))

    def row(self, batch_size: int) -> dict[str, Any]:
        """What the round with the least CPU time gives."""
        cpu, wall, read = min(self.rounds)
        num_images = self.num_batches * batch_size
        speed = num_images / cpu
        row = {"name": self.name, "images_per_core_second": speed, "ms_per_image": 1e3 / speed}
        row |= {"images_per_second": num_images / wall, "kib_read": read / num_images / 2**10}
        return row | {f"cores for {GPUS} x {model}": GPUS * takes / speed for model, takes in H100.items()}


def measure(config: LoadingConfig, scratch: Path) -> list[dict[str, Any]]:
    """A row for each way."""
    ways = [Way(name, start, config.batches) for name, start in image_ways(config, scratch).items()]
    many = make_latents(scratch / "many", MANY_SHARDS, IMAGES_PER_SHARD)
    few = make_latents(scratch / "few", MANY_SHARDS // 64, 64 * IMAGES_PER_SHARD)

    def load(folder: Path) -> Callable[[], Batches]:
        return lambda: stream(LatentDataset(folder), str(folder), config.batch_size, 0, seed=0, start_step=0)

    num_batches = 10 * config.batches  # as latents are read much faster than images
    ways += [
        Way(f"latents, {MANY_SHARDS // 64} shards", load(few), num_batches, lambda: remember(few)),
        Way(f"latents, {MANY_SHARDS} shards", load(many), num_batches, lambda: remember(many)),
        Way(f"latents, {MANY_SHARDS} shards, not in memory", load(many), num_batches, lambda: forget(many)),
    ]
    for _ in range(config.rounds):
        for way in ways:
            way.run()
    return [way.row(config.batch_size) for way in ways]


def main() -> None:
    config = script_util.parse_flags(LoadingConfig, __doc__)
    torch.set_num_threads(1)
    list_image_files(config.data_dir)
    with tempfile.TemporaryDirectory(dir=config.scratch) as scratch:
        rows = measure(config, Path(scratch))
    report = {"date": datetime.date.today().isoformat(), "device": device_name("cpu"), "settings": config.values()}
    report |= {"torch": torch.__version__, "pillow": PIL.__version__, "rows": rows}
    print(f"{config.data_dir}, {config.image_size} pixels, {report['device']}, Pillow {report['pillow']}")
    print(format_table(rows, COLUMNS))
    if config.json:
        write_json(config.json, report)


if __name__ == "__main__":
    script_util.run(main)
