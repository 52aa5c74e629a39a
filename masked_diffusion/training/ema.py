"""EMA after the fact: power-function averages are saved sparsely in training, and an average of any length made later.

Karras et al. 2024, arXiv:2312.02696, appendix C. The average of steps 1 to t weights step tau in proportion to
tau^gamma, so that its width is a fixed share of the training so far: sigma_rel, the standard deviation of that profile
over t. Snapshots are plain state dicts, `phema_{sigma_rel:.3f}_{step:06d}.pt`; a reconstruction is called
`posthoc_ema_{sigma_rel}_{step:06d}.pt`, which neither `newest_ema` nor a resumed run takes for its own.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import dist_util
from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.flag_values import MAX_SIGMA_REL
from .optim import update_ema
from .parallel import gather_full, shard_like

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def posthoc_name(sigma_rel, step):
    return f"posthoc_ema_{sigma_rel}_{step:06d}.pt"


# ---------------------------------------------------------------- profiles


def sigma_rel_to_gamma(sigma_rel):
    """The exponent gamma > 0 of the profile whose width is `sigma_rel`.

    :raises UserError: outside of 0 < sigma_rel < 1 / sqrt(12).
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise UserError(f"sigma_rel is {sigma_rel}: it must be above 0 and below 12^-1/2 = {MAX_SIGMA_REL:.4f}")
    # Eq. 123: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Its cubic (Algorithm 2) has one positive root.
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_function_beta(gamma, step):
    """beta of the update average <- beta * average + (1 - beta) * weights that makes it end at `step` (eq. 127).

    :param step: counted from 1, where beta is 0: the average of one step is that step.
    """
    return (1 - 1 / step) ** (gamma + 1)


def profile_cosines(steps_a, gammas_a, steps_b, gammas_b):
    """Inner products of power-function profiles (Algorithm 3), each scaled to unit norm. Arguments broadcast.

    The scale makes the least squares well conditioned, and no base exceeds 1: nothing overflows.
    """
    ratio = np.minimum(steps_a, steps_b) / np.maximum(steps_a, steps_b)
    gamma_of_later = np.where(steps_a < steps_b, gammas_b, gammas_a)
    scale = np.sqrt((2 * gammas_a + 1) * (2 * gammas_b + 1)) / (gammas_a + gammas_b + 1)
    return scale * ratio ** (gamma_of_later + 0.5)


def profile_norm(steps, gammas):
    """The norm of power-function profiles that integrate to 1."""
    return (gammas + 1) / np.sqrt((2 * gammas + 1) * steps)


def solve_posthoc_weights(snapshot_steps, snapshot_gammas, target_steps, target_gammas):
    """Weights with which snapshots add up to averages that were not tracked: least squares over the profiles.

    :param snapshot_steps, snapshot_gammas: (S,).
    :param target_steps, target_gammas: (T,), or numbers (T = 1).
    :return: (S, T) weights, each column of sum 1; and (T,) residuals, the distance of the mixed profile from the one
        asked for relative to the latter's norm (0: exact; the square root of rounding, 1e-8, is as small as it shows).
    """
    steps, gammas = (np.asarray(v, dtype=np.float64)[:, None] for v in (snapshot_steps, snapshot_gammas))
    target_steps, target_gammas = (np.atleast_1d(np.float64(v)) for v in (target_steps, target_gammas))
    gram = profile_cosines(steps, gammas, steps.T, gammas.T)
    target = profile_cosines(steps, gammas, target_steps, target_gammas)
    # Algorithm 3 solves; lstsq, because the profiles of neighbouring steps are nearly parallel.
    norms = profile_norm(steps, gammas) / profile_norm(target_steps, target_gammas)
    weights = np.linalg.lstsq(gram, target, rcond=None)[0] / norms
    weights /= weights.sum(axis=0)  # parameters that stood still must come out unchanged
    mixed = weights * norms
    squares = 1 - 2 * (mixed * target).sum(axis=0) + (mixed * (gram @ mixed)).sum(axis=0)
    return weights, np.sqrt(squares.clip(min=0))


# ---------------------------------------------------------------- in training


class PowerEMA:
    """Power-function averages of a list of parameters.

    :param sigma_rels: widths, one average each, with no more decimals than the file names carry: three.
    :raises UserError: for a width that cannot be.
    """

    def __init__(self, params, sigma_rels=(0.05, 0.10)):
        params = list(params)
        for sigma_rel in sigma_rels:
            if round(sigma_rel, 3) != sigma_rel:
                raise UserError(f"sigma_rel is {sigma_rel}: give three decimals at most, as file names carry no more")
        self.gammas = {f"{sigma_rel:.3f}": sigma_rel_to_gamma(sigma_rel) for sigma_rel in sigma_rels}
        self.averages = {width: [p.detach().clone() for p in params] for width in self.gammas}

    def update(self, params, step):
        """Take in the weights after step `step`, counted from 1; after a skipped step, too."""
        params = list(params)
        for width, averages in self.averages.items():
            update_ema(averages, params, power_function_beta(self.gammas[width], step))

    def state_dict(self):
        """Lists of whole tensors by width. All ranks call it."""
        return {width: list(map(gather_full, averages)) for width, averages in self.averages.items()}

    def load_state_dict(self, state):
        """Go on from a state dict of whole tensors.

        :raises UserError: when it is of other widths.
        """
        if state.keys() != self.averages.keys():
            raise UserError(
                f"the checkpoint has averages of sigma_rel {', '.join(state) or '(none)'}, but this run tracks "
                f"{', '.join(self.averages) or '(none)'}: repeat the widths, as an average cannot begin half-way"
            )
        for width, averages in self.averages.items():
            for average, saved in zip(averages, state[width], strict=True):
                average.copy_(shard_like(saved, average))


def save_snapshots(folder, step, averages, model_state, names, dtype="fp32"):
    """Write one snapshot per width.

    :param averages: `PowerEMA.state_dict()`.
    :param model_state: the model's state dict, for what is not averaged.
    :param names: the keys in it of what is averaged.
    :param dtype: of the averages on disk, `fp32` or `fp16`.
    """
    for width, tensors in averages.items():
        tensors = [tensor.to(DTYPES[dtype]) for tensor in tensors]
        with atomic_write(Path(folder, f"phema_{width}_{step:06d}.pt")) as file:
            torch.save(model_state | dict(zip(names, tensors, strict=True)), file)


def remove_snapshots(folder: str | Path, step: int) -> None:
    """Remove the snapshots of a step, whose checkpoint could not be written."""
    for path in Path(folder).glob(f"phema_*_{step:06d}.pt"):
        path.unlink()


# ---------------------------------------------------------------- after training


class Recipe(NamedTuple):
    """Which snapshots make an average: `paths` in the order of their steps, a weight each, and what is missed."""

    step: int
    paths: list
    weights: list
    residual: float


def plan_reconstruction(folder, sigma_rel, step=None):
    """The recipe of the average of width `sigma_rel` that ends at `step`; None is the newest snapshot's.

    :raises UserError: for a width that cannot be, a folder without snapshots, or a step that they do not enclose.
    """
    gamma = sigma_rel_to_gamma(sigma_rel)
    names = (re.fullmatch(r"phema_(0\.\d{3})_(\d{6,})\.pt", path.name) for path in Path(folder).glob("phema_*.pt"))
    found = sorted((int(name[2]), name[1], name[0]) for name in names if name)
    if not found:
        raise UserError(
            f"{folder} holds no snapshots (no phema_SIGMA_STEP.pt): name a folder whose training saved some"
        )
    steps = [snapshot_step for snapshot_step, _, _ in found]
    step = steps[-1] if step is None else step
    if not steps[0] <= step <= steps[-1]:
        raise UserError(f"step is {step}: the snapshots of {folder} reach from step {steps[0]} to {steps[-1]}")
    gammas = [sigma_rel_to_gamma(float(width)) for _, width, _ in found]
    weights, residuals = solve_posthoc_weights(steps, gammas, step, gamma)
    return Recipe(step, [Path(folder, name) for _, _, name in found], weights[:, 0].tolist(), float(residuals[0]))


def mix_snapshots(recipe):
    """The state dict that a recipe makes, in float32, with one snapshot in memory at a time.

    What is no float is taken from the newest snapshot.

    :raises UserError: when a snapshot cannot be read, or is of another model than the ones before it.
    """
    mixed = {}
    for path, weight in zip(recipe.paths, recipe.weights, strict=True):
        state = dist_util.load_state_dict(str(path))
        if mixed and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in mixed.items()}:
            raise UserError(f"{path} is of another model than the snapshots before it: keep one run in a folder")
        for key in list(state):
            value = state.pop(key)  # what is added leaves memory before the next file comes
            mixed[key] = mixed.get(key, 0) + weight * value.double() if value.is_floating_point() else value
    return {key: value.float() if value.is_floating_point() else value for key, value in mixed.items()}


def reconstruct(folder, sigma_rel, step=None):
    """The state dict of an average that was not tracked; see `plan_reconstruction` and `mix_snapshots`."""
    return mix_snapshots(plan_reconstruction(folder, sigma_rel, step))
