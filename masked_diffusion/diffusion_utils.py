"""Closed forms for Gaussians, used by the variational terms of the loss."""

import math

import torch


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
