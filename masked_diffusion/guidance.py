"""Guidance rules: how the conditional and the unconditional prediction are combined.

A rule is a function from timesteps to a weight `w(t)`; `guide` applies it. They are pure functions of tensors.
"""

import math

import torch


def constant_weight(t, cfg_scale):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6 with w = 1 + guidance strength): w(t) = cfg_scale.

    :param t: (N,) timesteps.
    :return: (N,) float weights.
    """
    return torch.full(t.shape, float(cfg_scale), device=t.device)


def power_cosine_weight(t, cfg_scale, diffusion_steps=1000, scale_pow=4.0):
    """Power-cosine guidance of MDT: w(t) = 1 + (s - 1) * (1 - cos(pi * (1 - t / steps)^pow)) / 2.

    The weight grows from 1 at pure noise to `cfg_scale` at the data; a larger power delays the growth.

    :param t: (N,) timesteps in [0, diffusion_steps].
    :return: (N,) float weights in [1, cfg_scale].
    """
    progress = (1 - t.float() / diffusion_steps) ** scale_pow
    return 1 + (cfg_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2


def guide(out_cond, out_null, weight, guided_channels=3):
    """Extrapolate from the null prediction to the conditional one: null + w (cond - null).

    :param out_cond: (n, C, H, W) model output given the classes.
    :param out_null: (n, C, H, W) model output given the null class.
    :param weight: (n,) guidance weights.
    :param guided_channels: how many leading channels are guided. DiT and every published MDT number guide the first
        three of four latent channels; the others stay as each row predicted them.
    :return: two (n, C, H, W) tensors, the guided class rows and the guided null rows.
    """
    weight = weight.view(-1, *[1] * (out_cond.ndim - 1)).to(out_cond.dtype)
    eps_cond, eps_null = out_cond[:, :guided_channels], out_null[:, :guided_channels]
    eps = eps_null + weight * (eps_cond - eps_null)
    return (
        torch.cat([eps, out_cond[:, guided_channels:]], dim=1),
        torch.cat([eps, out_null[:, guided_channels:]], dim=1),
    )
