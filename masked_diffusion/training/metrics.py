"""Monitoring: mean losses and training time since the last log row. The sums stay on the device until then."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from .. import dist_util, logger
from .data_wait import DataWait

NUM_QUARTILES = 4


class TrainMetrics:
    """Means over the steps since the last row.

    :param num_timesteps: timesteps of the diffusion; the loss is also logged per quartile of the timestep.
    :param global_batch: images per step over all ranks.
    :param last_step: the step at which the run ends, or None.
    :param data_wait: measures how much of the time goes by waiting for data.
    """

    def __init__(
        self,
        device: torch.device,
        num_timesteps: int,
        global_batch: int,
        last_step: int | None,
        data_wait: DataWait,
    ) -> None:
        self.device, self.num_timesteps = device, num_timesteps
        self.global_batch, self.last_step, self.data_wait = global_batch, last_step, data_wait
        self.paused_seconds = 0.0
        self.clear()

    def clear(self) -> None:
        """Discard the steps since the last row; the data stream begins anew."""
        self.data_wait.restart()
        self._sums, self.steps = defaultdict(lambda: torch.zeros((), device=self.device)), 0
        self._last_row = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in the block (evaluation, sample grids, saving) does not count as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._last_row += seconds
            self.paused_seconds += seconds

    def add(self, losses: dict[str, torch.Tensor], t: torch.Tensor, grad_norm: float) -> None:
        """Add one step: (N,) losses by name, and their (N,) timesteps. The host does not wait for the device."""
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
        """Log the means over all ranks since the last row. All ranks call it together.

        Values that the logger holds already (`eval_*`) go into the same row, even if no step was finite.

        :param train_seconds: training time of the run before this row.
        :return: a short summary to show, and the training time of the run so far in seconds.
        """
        now, steps = time.perf_counter(), self.steps
        seconds, self._last_row = now - self._last_row, now
        row = {"step": step, "samples": step * self.global_batch}
        summary = "no finite step"
        if steps:
            means, waited = self._means()
            speed = steps * self.global_batch / seconds
            row |= {key: value / steps for key, value in means.items() if "_q" not in key}
            row |= {
                f"loss_q{q}": means[f"loss_q{q}"] / means[f"count_q{q}"]
                for q in range(NUM_QUARTILES)
                if means[f"count_q{q}"]
            }
            row |= {"lr": lr, "images_per_second": speed, "train_seconds": train_seconds + seconds}
            row |= {"bad_steps": bad_steps, "data_wait": self.data_wait.report(waited, seconds, steps)}
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
        self.data_wait.clear()
        self.steps = 0
        return summary, train_seconds + seconds

    def _means(self) -> tuple[dict[str, float], list[float]]:
        """The sums, averaged over the ranks, and the seconds that each rank has waited for data."""
        keys, world_size = sorted(self._sums), dist_util.get_world_size()
        waited = torch.zeros(world_size, device=self.device)
        waited[dist_util.get_rank()] = self.data_wait.seconds * world_size
        means = dist_util.mean_over_ranks(torch.cat([torch.stack([self._sums[key] for key in keys]), waited])).tolist()
        return dict(zip(keys, means[: len(keys)], strict=True)), means[len(keys) :]
