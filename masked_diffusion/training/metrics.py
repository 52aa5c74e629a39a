"""Sums of a step's losses, kept on the device until they are logged, and the time that training took."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from .. import dist_util, logger

NUM_QUARTILES = 4


class TrainMetrics:
    """Means over the steps since the last row.

    :param num_timesteps: of the diffusion; losses are also kept apart by quartile of the timestep.
    :param last_step: where the run ends, or None.
    """

    def __init__(self, device: torch.device, num_timesteps: int, global_batch: int, last_step: int | None):
        self.device, self.num_timesteps = device, num_timesteps
        self.global_batch, self.last_step = global_batch, last_step
        self.clear()

    def clear(self) -> None:
        """Forget the steps since the last row."""
        self._sums, self.steps = defaultdict(lambda: torch.zeros((), device=self.device)), 0
        self._last_row = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block (evaluation, sample grids, saving) does not count as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last_row += time.perf_counter() - start

    def add(self, losses: dict[str, torch.Tensor], t: torch.Tensor, grad_norm: float) -> None:
        """Take in one step: (N,) losses by name, and their (N,) timesteps. Nothing waits for the device."""
        for key, value in losses.items():
            self._sums[key] += value.mean()
        quartile = t * NUM_QUARTILES // self.num_timesteps
        for q in range(NUM_QUARTILES):
            inside = quartile == q
            self._sums[f"loss_q{q}"] += (losses["loss"] * inside).sum()
            self._sums[f"count_q{q}"] += inside.sum()
        self._sums["grad_norm"] += grad_norm
        self.steps += 1

    def log_row(self, step: int, lr: float, bad_steps: int, train_seconds: float) -> tuple[str, float]:
        """Log the means since the last row, over all ranks; all ranks call it together.

        What is already gathered in the logger (`eval_*`) goes into the same row, also where no step was finite.

        :param train_seconds: of the run before this row.
        :return: a summary for people, and the run's training seconds so far.
        """
        now, steps = time.perf_counter(), self.steps
        seconds, self._last_row = now - self._last_row, now
        row = {"step": step, "samples": step * self.global_batch}
        summary = "no finite step"
        if steps:
            means = self._means()
            speed = steps * self.global_batch / seconds
            row |= {key: value / steps for key, value in means.items() if "_q" not in key}
            row |= {
                f"loss_q{q}": means[f"loss_q{q}"] / means[f"count_q{q}"]
                for q in range(NUM_QUARTILES)
                if means[f"count_q{q}"]
            }
            row |= {"lr": lr, "images_per_second": speed, "train_seconds": train_seconds + seconds}
            row |= {"bad_steps": bad_steps}
            eta = ""
            if self.last_step:
                row["eta_seconds"] = (self.last_step - step) * seconds / steps
                eta = f"  ETA {timedelta(seconds=round(row['eta_seconds']))}"
            summary = f"loss {row['loss']:.4f}  {speed:.1f} images/s{eta}"
            of = f"/{self.last_step}" if self.last_step else ""
            logger.log(f"step {step}{of}  {summary}  grad_norm {row['grad_norm']:.3f}  lr {row['lr']:.2e}")
        for key, value in row.items():
            logger.logkv(key, value)
        logger.dumpkvs()
        self._sums.clear()
        self.steps = 0
        return summary, train_seconds + seconds

    def _means(self) -> dict[str, float]:
        keys = sorted(self._sums)
        means = dist_util.mean_over_ranks(torch.stack([self._sums[key] for key in keys])).tolist()
        return dict(zip(keys, means, strict=True))
