"""Guidance rules: how strongly, when, and by what a prediction is guided.

A rule is a function from timesteps to a weight `w(t)`; `guide` applies it. `GuidedDenoiser` puts both around a model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .utils.errors import UserError

RULES = ("none", "constant", "power-cosine", "interval")

# ---------------------------------------------------------------- weights


def constant_weight(t: torch.Tensor, cfg_scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6 with w = 1 + guidance strength): w(t) = cfg_scale.

    :param t: (N,) timesteps.
    :return: (N,) float weights.
    """
    return torch.full(t.shape, float(cfg_scale), device=t.device)


def power_cosine_weight(
    t: torch.Tensor, cfg_scale: float, diffusion_steps: int = 1000, scale_pow: float = 4.0
) -> torch.Tensor:
    """Power-cosine guidance of MDT: w(t) = 1 + (s - 1) * (1 - cos(pi * (1 - t / steps)^pow)) / 2.

    The weight grows from 1 at pure noise to `cfg_scale` at the data; a larger power delays the growth.

    :param t: (N,) timesteps in [0, diffusion_steps].
    :return: (N,) float weights in [1, cfg_scale].
    """
    progress = (1 - t.float() / diffusion_steps) ** scale_pow
    return 1 + (cfg_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2


def interval_weight(t: torch.Tensor, cfg_scale: float, interval: tuple[float, float]) -> torch.Tensor:
    """Guidance in a limited interval (Kynkaanniemi et al. 2024, eq. 5): w(t) = cfg_scale inside, 1 outside.

    :param t: (N,) timesteps. :param interval: its first and last timestep.
    :return: (N,) float weights.
    """
    first, last = interval
    return torch.where((t >= first) & (t <= last), float(cfg_scale), 1.0)


def guide(
    out_cond: torch.Tensor, out_null: torch.Tensor, weight: torch.Tensor, guided_channels: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
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


# ---------------------------------------------------------------- a guided model


@dataclass(frozen=True)
class Guidance:
    """The settings of a guidance rule.

    :param rule: one of `RULES`.
    :param cfg_scale: the largest weight. :param scale_pow: of `power-cosine`. :param interval: of `interval`.
    :param guided_channels: leading channels that are guided; None guides all that the model denoises.
    :param skip_below: where the weight is within this of 1, the guiding half is not computed; the default skips where
        the weight is 1 exactly, a negative number never skips.
    :param diffusion_steps: timesteps of the trained schedule.
    :raises UserError: for an unknown rule, a number that is not finite, and an interval that is empty.
    """

    rule: str = "none"
    cfg_scale: float = 1.0
    scale_pow: float = 4.0
    interval: tuple[float, float] = (0, 1000)
    guided_channels: int | None = 3
    skip_below: float = 0.0
    diffusion_steps: int = 1000

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"guidance is {self.rule!r}: choose one of {', '.join(RULES)}")
        for name in ("cfg_scale", "scale_pow", "interval", "skip_below"):
            value = getattr(self, name)
            if not all(map(math.isfinite, value if name == "interval" else (value,))):
                raise UserError(f"{name} of the guidance is {value}: it must be finite")
        if self.interval[0] > self.interval[1]:
            raise UserError(f"the guidance interval {self.interval} is empty: its first timestep is the smaller one")

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """(N,) timesteps -> (N,) weights."""
        if self.rule == "constant":
            return constant_weight(t, self.cfg_scale)
        if self.rule == "power-cosine":
            return power_cosine_weight(t, self.cfg_scale, self.diffusion_steps, self.scale_pow)
        if self.rule == "interval":
            return interval_weight(t, self.cfg_scale, self.interval)
        return torch.ones(t.shape, device=t.device)

    def describe(self) -> dict[str, Any]:
        """What the rule depends on, as JSON values."""
        used = {"power-cosine": ["scale_pow"], "interval": ["interval"]}.get(self.rule, [])
        if self.rule != "none":
            used = ["cfg_scale", *used, "guided_channels", "skip_below"]
        values = {name: getattr(self, name) for name in used}
        return {"rule": self.rule} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


class GuidedDenoiser:
    """A model of n rows that runs, where it must, a second n rows to be guided by.

    :param model: `model(x, t, y)` -> (n, C or 2C, H, W).
    :param null_label: of the class-free half (classifier-free guidance).
    :param guide_model: a weaker model of the same kind that guides instead of the null class: autoguidance (Karras et
        al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 3).
    :raises UserError: when there is nothing to be guided by.
    """

    def __init__(
        self,
        model: Callable[..., torch.Tensor],
        guidance: Guidance,
        null_label: int | None = None,
        guide_model: Callable[..., torch.Tensor] | None = None,
    ):
        if guidance.rule != "none" and null_label is None and guide_model is None:
            raise UserError("guidance needs a null class, which this model was trained without: use --cfg_cond False")
        self.model, self.guidance, self.null_label, self.guide_model = model, guidance, null_label, guide_model

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) noisy input, (n,) timesteps, (n,) labels -> (n, C or 2C, H, W), guided."""
        weight = self.guidance.weight(t)
        # Which batch to run is the host's to decide: a step waits for the device here, once.
        if self.guidance.rule == "none" or (weight - 1).abs().max() <= self.guidance.skip_below:
            return self.model(x, t, y)
        if self.guide_model is not None:
            out, guiding = self.model(x, t, y), self.guide_model(x, t, y)
        else:
            labels = torch.cat([y, torch.full_like(y, self.null_label)])
            out, guiding = self.model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        channels = self.guidance.guided_channels or x.shape[1]
        return guide(out, guiding, weight, channels)[0]
