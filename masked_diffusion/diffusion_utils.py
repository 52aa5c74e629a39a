"""Noise schedules, and the closed forms for Gaussians that the variational terms of the loss are made of."""

import math
from itertools import pairwise

import numpy as np
import torch

from .utils.errors import UserError

# ---------------------------------------------------------------- noise schedules


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Betas whose cumulative product of 1 - beta follows `alpha_bar`, a function on [0, 1]."""
    grid = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in pairwise(grid)])


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Betas by name.

    :param schedule_name: `linear` (1e-4 to 0.02, scaled by 1000 / steps) or `squaredcos_cap_v2`.
    :return: (num_diffusion_timesteps,) float64.
    :raises UserError: for any other name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "squaredcos_cap_v2":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise UserError(f"noise_schedule is {schedule_name!r}: choose linear or squaredcos_cap_v2")


def get_beta_schedule(beta_schedule, *, beta_start, beta_end, num_diffusion_timesteps):
    """Betas between two ends by the name of DDPM's schedules.

    :param beta_schedule: `linear`; `quad`, linear in the root; `warmup10` and `warmup50`, constant after a linear
        warm-up over that percentage of the steps; `const`; or `jsd`, 1 / T, 1 / (T - 1), ..., 1, which has no ends.
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


def _warmup_beta(beta_start, beta_end, num_diffusion_timesteps, warmup_frac):
    betas = np.full(num_diffusion_timesteps, beta_end, dtype=np.float64)
    warmup = int(num_diffusion_timesteps * warmup_frac)
    betas[:warmup] = np.linspace(beta_start, beta_end, warmup, dtype=np.float64)
    return betas


# ---------------------------------------------------------------- Gaussians


def mean_flat(tensor):
    """Mean over all dimensions but the first: (N, ...) -> (N,)."""
    return tensor.flatten(1).mean(dim=1)


def normal_kl(mean1, logvar1, mean2, logvar2):
    """Element-wise KL divergence of two diagonal Gaussians in nats; shapes broadcast, scalars are allowed.

    :raises ValueError: when no argument is a tensor.
    """
    like = next((arg for arg in (mean1, logvar1, mean2, logvar2) if isinstance(arg, torch.Tensor)), None)
    if like is None:
        raise ValueError("normal_kl needs a tensor among its four arguments, to know device and dtype")
    logvar1, logvar2 = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def approx_standard_normal_cdf(x):
    """The tanh approximation of the standard normal's distribution function (Page 1977), as in improved DDPM."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def continuous_gaussian_log_likelihood(x, *, means, log_scales):
    """Log-density in nats of the standardised value (x - means) / exp(log_scales) under the standard normal.

    As in DiT and MDT, it lacks the `- log_scales` that would make it the density of x itself.
    """
    standardised = (x - means) * torch.exp(-log_scales)
    return -0.5 * (standardised**2 + math.log(2 * math.pi))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """Log-likelihood in nats of 8-bit images under a Gaussian integrated over each intensity's bin (DDPM, eq. 13).

    :param x: images scaled to [-1, 1], so that a bin is 2 / 255 wide.
    :param means, log_scales: of x's shape.
    :raises ValueError: when the three shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, means {tuple(means.shape)} and log_scales {tuple(log_scales.shape)} must match"
        )
    centered, inv_std = x - means, torch.exp(-log_scales)
    cdf_plus = approx_standard_normal_cdf(inv_std * (centered + 1 / 255))
    cdf_min = approx_standard_normal_cdf(inv_std * (centered - 1 / 255))
    # The outermost bins reach to infinity.
    probability = torch.where(x < -0.999, cdf_plus, torch.where(x > 0.999, 1 - cdf_min, cdf_plus - cdf_min))
    return probability.clamp(min=1e-12).log()
