"""One run of the learning study: train a variant through `image_train.py`, and judge its EMA on the way."""

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from masked_diffusion import logger
from masked_diffusion.config import RunConfig
from masked_diffusion.models import model_class
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training.guardian import TrainingFault
from masked_diffusion.training.resume import own_log_dir
from masked_diffusion.utils.files import atomic_write, write_json
from masked_diffusion.utils.flops import training_flops

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the folder of image_train.py, which is no package
import image_train

UNMASKED = "MDTv2-unmasked"  # MDTv2 trained without the masked pass
VARIANTS = ("MDTv2", UNMASKED, "MDT", "DiT")
SNR_GAMMA = 5.0  # of Min-SNR, where it is on
SAMPLE_SEED, DRAWN_AT_ONCE, KEPT_SAMPLES = 0, 250, 40
CPU_INFO = Path("/proc/cpuinfo")
Judge = Callable[[np.ndarray, np.ndarray], dict[str, float]]  # of (N, H, W, 3) uint8 images and (N,) labels


def evenly(total: int, count: int) -> np.ndarray:
    """Places of at most `count` of `total` things, at even distances from the first to the last."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


class Cell(NamedTuple):
    """What is compared: a variant, its optimizer, and whether Min-SNR weights its loss."""

    variant: str
    optimizer: str
    min_snr: bool

    @property
    def family(self) -> str:
        return "MDTv2" if self.variant == UNMASKED else self.variant

    @property
    def masked(self) -> bool:
        return self.variant in ("MDTv2", "MDT")

    def __str__(self) -> str:
        return f"{self.variant}, {self.optimizer}, {'with' if self.min_snr else 'without'} Min-SNR"


def published_cell(variant: str) -> Cell:
    """A variant with the optimizer and the loss weighting of its paper."""
    family = model_class(f"{Cell(variant, '', False).family}_S_2")
    return Cell(variant, family.default_optimizer, family.default_snr_gamma is not None)


@dataclass(frozen=True)
class Run:
    """One training run.

    :param steps: its length. :param eval_interval: steps between two evaluations, of which the last is at the end.
    """

    cell: Cell
    lr: float
    seed: int
    steps: int
    eval_interval: int

    @property
    def name(self) -> str:
        cell = "-".join((self.cell.variant, self.cell.optimizer, "snr" if self.cell.min_snr else "plain"))
        return f"{cell}-lr{self.lr:g}-seed{self.seed}-{self.steps}steps"


class Curve:
    """A hook of the training loop: draws images with the EMA at fixed steps, judges them, and keeps what was found.

    Its file lies beside the checkpoints, which are written at the same steps, so a run that resumes goes on with it.
    The last evaluation's first images lie beside the folder, which a finished run loses.

    :param folder: the log directory of the run. :param solver: name and number of steps, for `create_solver`.
    """

    def __init__(self, run: Run, folder: Path, judge: Judge, solver: tuple[str, str], num_samples: int) -> None:
        self.run, self.path, self.judge = run, folder / "curve.json", judge
        self.samples = folder.parent / f"{run.name}.npz"
        self.solver, self.num_samples = solver, num_samples
        self.rows: list[dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else []
        self.image_sampler: ImageSampler | None = None
        self.images = np.zeros((0, 1, 1, 3), np.uint8)

    def after_step(self, loop: TrainLoop) -> bool:
        if self.image_sampler is None:
            self._start(loop)
        if loop.step % self.run.eval_interval == 0:
            cpu_seconds = self._cpu_seconds(loop.step)
            with loop.metrics.paused(), loop.state.ema_weights():
                self.rows.append(self._row(loop, cpu_seconds))
            with atomic_write(self.samples) as file:
                np.savez_compressed(file, images=self.images[:KEPT_SAMPLES])
            write_json(self.path, self.rows)
            self.clock, self.clock_step = time.process_time(), loop.step
        return False

    def _start(self, loop: TrainLoop) -> None:
        """Make the image sampler, and drop what an interrupted process found after its last checkpoint."""
        self.rows = [row for row in self.rows if row["step"] < loop.step]
        solver = create_solver(*self.solver, loop.config.diffusion.options(loop.model.default_snr_gamma))
        options = {"quantize": "truncate", "check_finite": False, "precision": loop.config.precision}
        self.image_sampler = ImageSampler(loop.model, solver, loop.first_stage, seed=SAMPLE_SEED, **options)
        self.flop_per_image = training_flops(loop.model)
        self.clock, self.clock_step = time.process_time(), loop.step

    def _cpu_seconds(self, step: int) -> float:
        """CPU time of training until a step: that of the last row, and the cost of a step times the steps since.

        The cost is measured over the steps of this process, without its first, at whose end the clock is started.
        """
        last_step, last_seconds = (self.rows[-1]["step"], self.rows[-1]["cpu_seconds"]) if self.rows else (0, 0.0)
        if step > self.clock_step:
            per_step = (time.process_time() - self.clock) / (step - self.clock_step)
        else:  # an evaluation after the first step: as before, or at worst with all that came before that step
            per_step = last_seconds / last_step if last_step else time.process_time() / step
        return last_seconds + per_step * (step - last_step)

    def _row(self, loop: TrainLoop, cpu_seconds: float) -> dict[str, float]:
        labels = choose_labels(range(self.num_samples), "balanced", loop.model.num_classes, SAMPLE_SEED)
        parts = torch.arange(self.num_samples).split(DRAWN_AT_ONCE)
        self.images = np.concatenate([self.image_sampler(part.numpy(), labels[part]) for part in parts])
        images_seen = loop.step * loop.config.train.batch_size
        position = {"step": loop.step, "images": images_seen, "flop": images_seen * self.flop_per_image}
        return position | {"cpu_seconds": round(cpu_seconds, 3)} | self.judge(self.images, labels.numpy())


def processor() -> str:
    """The processor's name, and on Linux its family and model, which tell generations of one name apart."""
    if not CPU_INFO.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in CPU_INFO.read_text().splitlines())
    found: dict[str, str] = {}
    for key, _, value in lines:
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    return f"{name}, family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def train(run: Run, flags: dict[str, Any], size: dict[str, int], curve_options: dict[str, Any], work: Path) -> dict:
    """Train one run, from its last checkpoint if it was interrupted, and return its row of the study's JSON.

    :param flags: of `RunConfig`, the same for all runs. :param size: see `image_train.train`.
    :param curve_options: `judge`, `solver` and `num_samples` of `Curve`.
    :param work: the run's folder and its last images go here.
    """
    folder, began = work / run.name, time.process_time()
    cell = run.cell
    flags = flags | {
        "model": f"{cell.family}_{flags['model']}",
        "mask_ratio": flags["mask_ratio"] if cell.masked else None,
        "optimizer": cell.optimizer,
        "snr_gamma": SNR_GAMMA if cell.min_snr else None,
        "grad_clip": 1.0,
        "lr": run.lr,
        "seed": run.seed,
        "max_steps": run.steps,
        "save_interval": run.eval_interval,
        "log_interval": run.eval_interval,
        "keep": 1,
        "log_dir": str(folder),
    }
    config = RunConfig.from_values(flags).check()
    logger.configure(str(folder), ["log", "json"])
    curve, fault = Curve(run, folder, **curve_options), None
    try:
        with own_log_dir(folder):
            image_train.train(config, str(folder), size, [curve])
    except TrainingFault as error:
        fault = str(error)
    finally:
        logger.reset()
    return {
        **cell._asdict(),
        "lr": run.lr,
        "seed": run.seed,
        "steps": run.steps,
        "complete": bool(curve.rows) and curve.rows[-1]["step"] == run.steps,
        "fault": fault,
        "process_cpu_seconds": round(time.process_time() - began, 3),
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "curve": curve.rows,
    }
