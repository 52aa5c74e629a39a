"""Noise schedules, and the KL divergences and likelihoods of Gaussians for the variational bound."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .utils.errors import UserError

# ---------------------------------------------------------------- noise schedules


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas whose cumulative product of 1 - beta follows a function (improved DDPM, sec. 3.2).

    :param alpha_bar: the cumulative product as a function of t / num_diffusion_timesteps, in [0, 1].
    :param max_beta: upper bound of the betas, which avoids a singularity at the last timestep.
    :return: (num_diffusion_timesteps,) float64.
    """
    grid = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in pairwise(grid)])


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a named noise schedule.

    :param schedule_name: `linear` (1e-4 to 0.02, scaled by 1000 / num_diffusion_timesteps: DDPM's) or
        `squaredcos_cap_v2` (improved DDPM's cosine schedule).
    :return: (num_diffusion_timesteps,) float64.
    :raises UserError: for any other name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "squaredcos_cap_v2":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise UserError(f"noise_schedule is {schedule_name!r}: choose linear or squaredcos_cap_v2")


def get_beta_schedule(
    beta_schedule: str, *, beta_start: float, beta_end: float, num_diffusion_timesteps: int
) -> np.ndarray:
    """The betas of one of DDPM's named schedules, from `beta_start` to `beta_end`.

    :param beta_schedule: `linear`; `quad`: the square root of beta is linear; `warmup10` and `warmup50`: constant after
        a linear warm-up over 10 % or 50 % of the steps; `const`: `beta_end` everywhere; `jsd`: 1 / T, 1 / (T - 1), ...,
        1, which uses neither end.
    :return: (num_diffusion_timesteps,) float64.
    :raises UserError: for any other name.
    """
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, num_diffusion_timesteps, dtype=np.float64)
    if beta_schedule == "quad":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_diffusion_timesteps, dtype=np.float64) ** 2
    if beta_schedule in ("warmup10", "warmup50"):
        return _warmup_beta(beta_start, beta_end, num_diffusion_timesteps, int(beta_schedule[-2:]) / 100)
    if beta_schedule == "const":
        return np.full(num_diffusion_timesteps, beta_end, dtype=np.float64)
    if beta_schedule == "jsd":
        return 1.0 / np.linspace(num_diffusion_timesteps, 1, num_diffusion_timesteps, dtype=np.float64)
    raise UserError(f"beta_schedule is {beta_schedule!r}: choose linear, quad, warmup10, warmup50, const or jsd")


def _warmup_beta(beta_start: float, beta_end: float, num_diffusion_timesteps: int, warmup_frac: float) -> np.ndarray:
    betas = np.full(num_diffusion_timesteps, beta_end, dtype=np.float64)
    warmup = int(num_diffusion_timesteps * warmup_frac)
    betas[:warmup] = np.linspace(beta_start, beta_end, warmup, dtype=np.float64)
    return betas


# ---------------------------------------------------------------- Gaussians


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions except the first: (N, ...) -> (N,)."""
    return tensor.flatten(1).mean(dim=1)


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Element-wise KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats. Shapes are broadcast.

    :param mean1, mean2: means. :param logvar1, logvar2: logarithms of the variances.
    :raises ValueError: if no argument is a tensor.
    """
    like = next((arg for arg in (mean1, logvar1, mean2, logvar2) if isinstance(arg, torch.Tensor)), None)
    if like is None:
        raise ValueError(
            "normal_kl got four numbers: at least one argument must be a tensor, which sets device and dtype"
        )
    logvar1, logvar2 = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """A tanh approximation of the cumulative distribution function of the standard normal (Page 1977), as in ADM."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def continuous_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Element-wise log-density of (x - means) / exp(log_scales) under the standard normal, in nats.

    As in DiT and MDT, this is not the density of x itself, which would subtract `log_scales`.
    """
    standardised = (x - means) * torch.exp(-log_scales)
    return -0.5 * (standardised**2 + math.log(2 * math.pi))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Element-wise log-likelihood of 8-bit images under a Gaussian, in nats (DDPM, eq. 13).

    The Gaussian is integrated over the bin of each of the 256 intensities.

    :param x: images scaled to [-1, 1], so that a bin is 2 / 255 wide.
    :param means, log_scales: means and logarithms of the standard deviations, of x's shape.
    :raises ValueError: if the three shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"the shapes of x {tuple(x.shape)}, means {tuple(means.shape)} and log_scales {tuple(log_scales.shape)} "
            "must match"
        )
    centered, inv_std = x - means, torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_std * (centered + 1 / 255))
    cdf_min = approx_standard_normal_cdf(inv_std * (centered - 1 / 255))
    # The first bin starts at minus infinity, and the last one ends at infinity.
    probability = torch.where(x < -0.999, cdf_plus, torch.where(x > 0.999, 1 - cdf_min, cdf_plus - cdf_min))
    return probability.clamp(min=1e-12).log()
