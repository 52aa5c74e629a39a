"""Post-hoc EMA: training saves snapshots of power-function averages, from which an EMA of any length is made later.

Karras et al. 2024, arXiv:2312.02696, appendix C. The average of steps 1 to t weights step tau in proportion to
tau^gamma, so that its width is a fixed fraction of the training so far: sigma_rel, the standard deviation of that
profile divided by t. Snapshots are plain state dicts, `phema_{sigma_rel:.3f}_{step:06d}.pt`. Reconstructed averages are
named `posthoc_ema_{sigma_rel}_{step:06d}.pt`, which neither `newest_ema` nor a resumed run takes for a tracked EMA.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.flag_values import MAX_SIGMA_REL
from ..weights.checkpoint import parse_step, sharded_folders
from ..weights.pretrained import read_tensors
from ..weights.torch_file import LateTensor, convert_late, save_tensors
from .adan import Average
from .optim import update_ema
from .parallel import fill, gather_late
from .receive import SentTensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def posthoc_name(sigma_rel: float, step: int) -> str:
    """File name of a reconstructed average."""
    return f"posthoc_ema_{sigma_rel}_{step:06d}.pt"


# ---------------------------------------------------------------- profiles


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent gamma > 0 of the profile whose relative width is `sigma_rel`.

    :raises UserError: unless 0 < sigma_rel < 1 / sqrt(12).
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise UserError(f"sigma_rel is {sigma_rel}: it must be above 0 and below 12^-1/2 = {MAX_SIGMA_REL:.4f}")
    # Eq. 123: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Its cubic (Algorithm 2) has one positive root.
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_function_beta(gamma: float, step: int) -> float:
    """beta of the update average <- beta * average + (1 - beta) * weights at `step` (eq. 127).

    :param step: counted from 1. There beta is 0: the average of one step is its weights.
    """
    return (1 - 1 / step) ** (gamma + 1)


def profile_cosines(steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
    """Inner products of power-function profiles (Algorithm 3), each scaled to unit norm. Arguments broadcast.

    Unit norms make the least squares problem well conditioned; no base exceeds 1, so no power overflows.
    """
    ratio = np.minimum(steps_a, steps_b) / np.maximum(steps_a, steps_b)
    gamma_of_later = np.where(steps_a < steps_b, gammas_b, gammas_a)
    scale = np.sqrt((2 * gammas_a + 1) * (2 * gammas_b + 1)) / (gammas_a + gammas_b + 1)
    return scale * ratio ** (gamma_of_later + 0.5)


def profile_norm(steps: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """The norm of power-function profiles whose integral is 1. Arguments broadcast."""
    return (gammas + 1) / np.sqrt((2 * gammas + 1) * steps)


def solve_posthoc_weights(
    snapshot_steps: ArrayLike, snapshot_gammas: ArrayLike, target_steps: ArrayLike, target_gammas: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Weights for summing snapshots to an average that was not tracked: a least squares fit of the profiles.

    :param snapshot_steps, snapshot_gammas: (S,).
    :param target_steps, target_gammas: (T,), or numbers (T = 1).
    :return: (S, T) float64 weights, of which each column sums to 1; and (T,) float64 residuals: the distance between
        the mixed profile and the target profile, relative to the target's norm. An exact fit shows about 1e-8, the
        square root of the rounding error.
    """
    steps, gammas = (np.asarray(v, dtype=np.float64)[:, None] for v in (snapshot_steps, snapshot_gammas))
    target_steps, target_gammas = (np.atleast_1d(np.float64(v)) for v in (target_steps, target_gammas))
    gram = profile_cosines(steps, gammas, steps.T, gammas.T)
    target = profile_cosines(steps, gammas, target_steps, target_gammas)
    # Algorithm 3 solves the linear system. It is nearly singular when snapshots are close together, hence lstsq.
    norms = profile_norm(steps, gammas) / profile_norm(target_steps, target_gammas)
    weights = np.linalg.lstsq(gram, target, rcond=None)[0] / norms
    weights /= weights.sum(axis=0)  # parameters that did not change in training must come out unchanged
    mixed = weights * norms
    squares = 1 - 2 * (mixed * target).sum(axis=0) + (mixed * (gram @ mixed)).sum(axis=0)
    return weights, np.sqrt(squares.clip(min=0))


# ---------------------------------------------------------------- in training


class PowerEMA:
    """Power-function averages of a list of parameters.

    :param sigma_rels: relative widths, one average each. File names carry three decimals, so they may have no more.
    :raises UserError: for a width out of range, or with more decimals.
    """

    def __init__(self, params: Iterable[torch.Tensor], sigma_rels: Sequence[float] = (0.05, 0.10)) -> None:
        params = list(params)
        for sigma_rel in sigma_rels:
            if round(sigma_rel, 3) != sigma_rel:
                raise UserError(f"sigma_rel is {sigma_rel}: give three decimals at most, as file names carry no more")
        self.gammas = {f"{sigma_rel:.3f}": sigma_rel_to_gamma(sigma_rel) for sigma_rel in sigma_rels}
        self.averages = {width: [p.detach().clone() for p in params] for width in self.gammas}

    def at_step(self, step: int) -> list[Average]:
        """The averages and their betas for an update with the weights after `step`, counted from 1."""
        return [(average, power_function_beta(self.gammas[width], step)) for width, average in self.averages.items()]

    def update(self, params: Iterable[torch.Tensor], step: int) -> None:
        """Update the averages with the weights after `step`, counted from 1. Skipped steps need an update, too."""
        params = list(params)
        for average, beta in self.at_step(step):
            update_ema(average, params, beta)

    def state_dict(self) -> dict[str, list[torch.Tensor | LateTensor]]:
        """Lists of tensors by width; sharded ones are gathered when they are written."""
        return {width: list(map(gather_late, averages)) for width, averages in self.averages.items()}

    def load_state_dict(self, state: dict[str, list[torch.Tensor | SentTensor]]) -> None:
        """Load a state dict of unsharded tensors. All ranks call it together.

        :raises UserError: when it holds averages of other widths.
        """
        self.check_widths(state)
        for width, averages in self.averages.items():
            for average, saved in zip(averages, state[width], strict=True):
                fill(average, saved)

    def check_widths(self, widths: Iterable[str]) -> None:
        """Refuse the averages of a checkpoint when they are of other widths.

        :raises UserError: for other widths.
        """
        if set(widths) != self.averages.keys():
            raise UserError(
                f"the checkpoint has averages of sigma_rel {', '.join(widths) or '(none)'}, but this run tracks "
                f"{', '.join(self.averages) or '(none)'}: give the same widths to --phema, as an average cannot start "
                "in the middle of a run"
            )


def snapshot_files(
    step: int,
    averages: dict[str, list[torch.Tensor | LateTensor]],
    model_state: dict[str, torch.Tensor | LateTensor],
    names: Sequence[str],
    dtype: str = "fp32",
) -> dict[str, dict[str, torch.Tensor | LateTensor]]:
    """The states of the snapshots, one per width, by name of the file.

    :param averages: `PowerEMA.state_dict()`.
    :param model_state: the model's state dict, for the entries that are not averaged.
    :param names: the keys of the averaged entries in it.
    :param dtype: number format of the averages on disk, `fp32` or `fp16`.
    """
    return {
        f"phema_{width}_{step:06d}.pt": model_state
        | {name: convert_late(tensor, DTYPES[dtype]) for name, tensor in zip(names, tensors, strict=True)}
        for width, tensors in averages.items()
    }


def save_snapshots(folder: str | Path, step: int, *states: Any) -> None:
    """Write one snapshot per width.

    :param states: as `snapshot_files` takes them.
    """
    for name, state in snapshot_files(step, *states).items():
        with atomic_write(Path(folder, name)) as file:
            save_tensors(state, file)


def remove_snapshots(folder: str | Path, step: int) -> None:
    """Remove the snapshots of a step whose checkpoint could not be written."""
    for path in Path(folder).glob(f"phema_*_{step:06d}.pt"):
        path.unlink()


# ---------------------------------------------------------------- after training


class Recipe(NamedTuple):
    """How to reconstruct an average from snapshots.

    :param step: last step of the average.
    :param paths: the snapshots, in the order of their steps.
    :param weights: one per snapshot; their sum is 1.
    :param residual: relative error of the profile; see `solve_posthoc_weights`.
    """

    step: int
    paths: list[Path]
    weights: list[float]
    residual: float


def plan_reconstruction(folder: str | Path, sigma_rel: float, step: int | None = None) -> Recipe:
    """The recipe of the average of relative width `sigma_rel` that ends at `step`; None: at the newest snapshot.

    :raises UserError: for a width out of range, a folder without snapshots, or a step before the first or after the
        last snapshot.
    """
    gamma = sigma_rel_to_gamma(sigma_rel)
    names = (re.fullmatch(r"phema_(0\.\d{3})_(\d{6,})\.pt", path.name) for path in Path(folder).glob("phema_*.pt"))
    found = [(int(name[2]), name[1], name[0]) for name in names if name]
    for checkpoint in sharded_folders(folder):
        names = (re.fullmatch(r"phema_(0\.\d{3})", path.name) for path in checkpoint.glob("phema_*"))
        found += [(parse_step(checkpoint), name[1], f"{checkpoint.name}/{name[0]}") for name in names if name]
    found.sort()
    if not found:
        raise UserError(
            f"{folder} holds no snapshots (no phema_SIGMA_STEP.pt): name the folder of a run trained with --phema"
        )
    steps = [snapshot_step for snapshot_step, _, _ in found]
    step = steps[-1] if step is None else step
    if not steps[0] <= step <= steps[-1]:
        raise UserError(f"step is {step}: the snapshots of {folder} reach from step {steps[0]} to {steps[-1]}")
    gammas = [sigma_rel_to_gamma(float(width)) for _, width, _ in found]
    weights, residuals = solve_posthoc_weights(steps, gammas, step, gamma)
    return Recipe(step, [Path(folder, name) for _, _, name in found], weights[:, 0].tolist(), float(residuals[0]))


def mix_snapshots(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The state dict of a recipe's average, in float32. One snapshot is in memory at a time.

    Entries that are not floating-point are taken from the newest snapshot.

    :raises UserError: when a snapshot cannot be read, or belongs to another model than the ones before it.
    """
    mixed = {}
    for path, weight in zip(recipe.paths, recipe.weights, strict=True):
        state = read_tensors(path)
        if mixed and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in mixed.items()}:
            raise UserError(f"{path} belongs to another model than the earlier snapshots: keep one run in a folder")
        for key in list(state):
            value = state.pop(key)  # frees its memory before the next file is read
            mixed[key] = mixed.get(key, 0) + weight * value.double() if value.is_floating_point() else value
    return {key: value.float() if value.is_floating_point() else value for key, value in mixed.items()}


def reconstruct(folder: str | Path, sigma_rel: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """The state dict of an average that was not tracked; see `plan_reconstruction` and `mix_snapshots`."""
    return mix_snapshots(plan_reconstruction(folder, sigma_rel, step))
