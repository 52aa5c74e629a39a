"""Monitoring: how long a run will take, said once it has shown how fast it is. A hook of `train_util.TrainLoop`."""

import time
from typing import Any

from .. import dist_util, logger
from ..config import RunConfig
from ..presets import PAPER_BATCH, paper_steps

WARMUP_STEPS, STEPS = 10, 50  # the first steps compile, fill the queues of the loader and allocate memory


class Forecast:
    """Logs, once after `STEPS` steps, the hours to the end of the run and to the paper's number of steps."""

    def __init__(self, config: RunConfig):
        self.config, self.done, self.start = config, 0, 0.0

    def after_step(self, loop: Any) -> bool:
        self.done += 1
        if self.done in (WARMUP_STEPS, STEPS):
            now = time.perf_counter() - loop.metrics.paused_seconds
            if self.done == STEPS:
                seconds = (now - self.start) / (STEPS - WARMUP_STEPS)
                logger.log(describe_duration(self.config, loop.step, loop.last_step, seconds))
            self.start = now
        return False


def describe_duration(config: RunConfig, step: int, last_step: int | None, seconds: float) -> str:
    """A line of text: the hours from `step` to the end of the run and to the paper's number of steps.

    :param last_step: where the run ends, or None. :param seconds: of one step.
    """
    batch, ranks, kind = config.global_batch, dist_util.get_world_size(), dist_util.dev().type
    paper = paper_steps(config.model.model)
    goals = {}
    if last_step:
        flag = "lr_anneal_steps" if config.train.lr_anneal_steps else "max_steps"
        goals[f"step {last_step:,} (--{flag})"] = last_step - step
    if paper:
        goals[f"the paper's {paper:,} steps of {PAPER_BATCH} images"] = paper * PAPER_BATCH / batch - step
    line = f"{seconds:.3g} s per step, {batch / seconds:.1f} images/s"
    for name, steps in goals.items():
        hours = max(steps, 0) * seconds / 3600
        line += f"; {hours:.3g} h ({hours * ranks:.3g} {'GPU hours' if kind == 'cuda' else 'process hours'}) to {name}"
    return line
