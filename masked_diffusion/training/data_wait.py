"""How long training waits for its data, and which flags would shorten it."""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from .. import dist_util, logger
from ..config import RunConfig
from ..images.decoding import largest_short_side

NOTABLE = 0.1  # share of the training time
QUIET_SECONDS = 6 * 3600  # between two lines about it in the log
FEW_IMAGES = 0.1  # share of the images below which a flag that concerns them is not worth naming


class DataWait:
    """Measures how long this rank waits for its batches.

    :param names: the training images, with a method `sizes` if their widths and heights are known.
    """

    def __init__(self, config: RunConfig, names: Sequence[str]) -> None:
        self.config, self.names = config, names
        self._logged = -math.inf
        self.restart()

    def restart(self) -> None:
        """The data stream begins anew. The wait for its first batch is not counted: processes start, queues fill."""
        self._first = True
        self.clear()

    def clear(self) -> None:
        """Begin a new measurement."""
        self.seconds, self.start_seconds, self.batches = 0.0, 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time spent in the block is spent waiting for a batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            if self._first:
                self.start_seconds += seconds
            else:
                self.seconds += seconds
                self.batches += 1
            self._first = False

    def report(self, waited: Sequence[float], seconds: float, steps: int) -> float:
        """Log what loading gives and what the device takes, when the wait is notable and was not for a long time.

        :param waited: seconds that each rank has waited. :param seconds: training time. :param steps: done in it.
        :return: the share of the training time that the slowest rank has waited.
        """
        rank = int(np.argmax(waited))
        wait, seconds = waited[rank], max(seconds - self.start_seconds, 1e-9)
        share, now = min(wait / seconds, 1.0), time.monotonic()
        if share > NOTABLE and now - self._logged > QUIET_SECONDS:
            self._logged = now
            batch_size = self.config.train.batch_size
            # Loading processes work all the time, this process only while nothing else happens.
            gives = steps * batch_size / seconds if self.config.data.num_workers else self.batches * batch_size / wait
            takes = steps * batch_size / max(seconds - wait, 1e-9)
            logger.log(
                f"rank {rank} waits for data in {100 * share:.0f} % of the time: loading gives {gives:.4g} images/s, "
                f"its device takes {takes:.4g}; {', or '.join(advise(self.config, self.names, gives, takes))}"
            )
        return share


def advise(config: RunConfig, names: Sequence[str], gives: float, takes: float) -> list[str]:
    """What would make loading faster, of the things that apply to a run.

    :param gives, takes: images per second of loading and of the device.
    """
    data, cores, found = config.data, cores_per_rank(), []
    wanted = min(math.ceil(max(data.num_workers, 1) * takes / gives), cores)
    if wanted > data.num_workers:
        found.append(f"raise --num_workers from {data.num_workers} to {wanted} (this rank has {cores} cores)")
    if not data.latent_dir:
        short_side = 2 * (largest_short_side(config.model.image_size) if data.random_crop else config.model.image_size)
        share = share_of_large_jpegs(names, short_side)
        if not data.fast_decode and share > FEW_IMAGES:
            found.append(f"set --fast_decode True, for the JPEGs of at least {short_side} pixels ({100 * share:.0f} %)")
        if config.model.vae != "identity" and not data.random_crop:
            found.append("encode the images once (scripts/encode_latents.py) and train with --latent_dir")
    return found or [f"no flag helps, all {cores} cores of this rank load: take more cores or a faster disk"]


def cores_per_rank() -> int:
    """The processor cores that this rank may use, if the ranks of a node share them equally."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", dist_util.get_world_size())))


def share_of_large_jpegs(names: Sequence[str], short_side: int) -> float:
    """The share of the images that are JPEGs of at least a short side. Images of unknown size count as large."""
    looked_at = range(0, len(names), max(1, len(names) // 1000))
    jpegs = np.array([names[index].lower().endswith((".jpg", ".jpeg")) for index in looked_at])
    large = names.sizes()[looked_at].min(axis=1) >= short_side if hasattr(names, "sizes") else True
    return float(np.mean(jpegs & large)) if len(jpegs) else 0.0
