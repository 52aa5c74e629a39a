"""Looking at a model while it trains: grids of samples, and evaluation. Hooks of `train_util.TrainLoop`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .. import dist_util, logger
from ..config import RunConfig
from ..guidance import Guidance
from ..sample_config import SOLVERS_OF
from ..utils.pictures import save_grid
from .image_sampler import ImageSampler, choose_labels
from .solvers import create_solver

GRID_IMAGES, GRID_COLUMNS, GRID_SCALE, STEPS = 40, 10, 1.5, 50


def _solver(config: RunConfig, model: Any):
    """The default solver of what the run trains, with few steps."""
    diffusion = config.diffusion
    name, steps = SOLVERS_OF[diffusion.objective][0], min(STEPS, diffusion.diffusion_steps)
    return create_solver(name, str(steps), diffusion.options(model.default_snr_gamma))


class SampleGrid:
    """Draws the same images, of fixed noise and labels, with the EMA, every `--sample_interval` steps."""

    def __init__(self, config: RunConfig, model: Any, first_stage: Any):
        self.interval, self.num_classes, self.seed = config.log.sample_interval, model.num_classes, config.train.seed
        if self.interval:
            solver = _solver(config, model)
            rule = "none" if model.null_label is None or not model.num_classes else model.guidance_rule
            guidance = Guidance(rule, GRID_SCALE, scale_pow=1.0, diffusion_steps=solver.original_num_steps)
            # Whatever the weights are by then, a picture of them does not end the run.
            options = {"guidance": guidance, "precision": config.precision, "check_finite": False, "seed": self.seed}
            self.image_sampler = ImageSampler(model, solver, first_stage, **options)

    def after_step(self, loop: Any) -> bool:
        if self.interval and loop.step % self.interval == 0:
            with loop.metrics.paused(), loop.state.ema_weights():
                self._draw(loop)
        return False

    def _draw(self, loop: Any) -> None:
        labels = choose_labels(range(GRID_IMAGES), "balanced", self.num_classes, self.seed)
        images = self.image_sampler(range(GRID_IMAGES), labels)  # on all ranks: a sharded model needs them
        if dist_util.is_main():
            path = loop.log_dir / f"grid{loop.step:06d}.png"
            logger.image("samples", save_grid(path, images, columns=GRID_COLUMNS), loop.step)


class Evaluation:
    """Compares images that the EMA draws without guidance with a reference, every `--eval_interval` steps.

    :param create_comparison: of the reference's path, the images' size and the device; returns a function of an
        iterable of (n, H, W, 3) uint8 batches that returns a dict of metrics. Called where there is an evaluation.
    """

    def __init__(self, config: RunConfig, model: Any, first_stage: Any, create_comparison: Callable[..., Any]):
        self.interval, self.num_samples = config.evaluation.eval_interval, config.evaluation.eval_samples
        self.batch_size = config.train.batch_size
        if self.interval:
            size = (config.model.image_size, config.model.image_size)
            self.compare = create_comparison(config.evaluation.eval_reference, size, dist_util.dev())
            # Pixels as in the npz of image_sample.py, so that the numbers compare with the evaluator's.
            options = {"quantize": "truncate", "check_finite": False}
            options |= {"precision": config.precision, "seed": config.train.seed}
            self.image_sampler = ImageSampler(model, _solver(config, model), first_stage, **options)

    def after_step(self, loop: Any) -> bool:
        if not self.interval or loop.step % self.interval:
            return False
        with loop.metrics.paused(), loop.state.ema_weights():
            metrics = self.compare(draw_own_part(self.image_sampler, self.num_samples, self.batch_size))
        for key, value in metrics.items():
            logger.logkv(f"eval_{key}", value)
        logger.log(f"step {loop.step}  " + "  ".join(f"{key} {value:.5g}" for key, value in metrics.items()))
        return True


def draw_own_part(image_sampler: ImageSampler, num_samples: int, batch_size: int) -> Iterator[np.ndarray]:
    """This rank's images, batch by batch. All ranks draw equally often, for a sharded model needs them all."""
    count = -(-num_samples // dist_util.get_world_size())
    first = dist_util.get_rank() * count
    for start in range(first, first + count, batch_size):
        indices = range(start, min(start + batch_size, first + count))
        labels = choose_labels(indices, "balanced", image_sampler.model.num_classes, image_sampler.seed)
        images = image_sampler(indices, labels)
        kept = images[: max(num_samples - start, 0)]
        if len(kept):
            yield kept


def create_hooks(config: RunConfig, model: Any, first_stage: Any, create_comparison: Callable[..., Any]) -> Iterable:
    """Both hooks. The evaluation comes first: its values belong to the row of its step."""
    return Evaluation(config, model, first_stage, create_comparison), SampleGrid(config, model, first_stage)
