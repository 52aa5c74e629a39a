"""Guidance rules: at which timesteps a prediction is guided, and how strongly.

A rule maps timesteps to weights w(t), and `guide` applies the weights. `GuidedDenoiser` does both for a model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .utils.errors import UserError
from .utils.flag_values import check_channels

RULES = ("none", "constant", "power-cosine", "interval")

# ---------------------------------------------------------------- weights


def constant_weight(t: torch.Tensor, cfg_scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6 with w = 1 + guidance strength): w(t) = cfg_scale.

    :param t: (N,) timesteps.
    :param cfg_scale: one scale, or (N,) scales.
    :return: (N,) float32 weights.
    """
    return torch.ones(t.shape, device=t.device) * cfg_scale


def power_cosine_weight(
    t: torch.Tensor, cfg_scale: float | torch.Tensor, diffusion_steps: int = 1000, scale_pow: float = 4.0
) -> torch.Tensor:
    """Power-cosine guidance of MDT: w(t) = 1 + (s - 1) * (1 - cos(pi * (1 - t / steps)^pow)) / 2.

    During sampling, the weight grows from 1 (pure noise) to s = `cfg_scale` (image). A larger `scale_pow` delays it.

    :param t: (N,) timesteps in [0, diffusion_steps].
    :param cfg_scale: one scale, or (N,) scales.
    :return: (N,) float32 weights between 1 and cfg_scale.
    """
    progress = (1 - t.float() / diffusion_steps) ** scale_pow
    return 1 + (cfg_scale - 1) * (1 - torch.cos(math.pi * progress)) / 2


def interval_weight(t: torch.Tensor, cfg_scale: float, interval: tuple[float, float]) -> torch.Tensor:
    """Guidance in a limited interval (Kynkaanniemi et al. 2024, eq. 5): w(t) = cfg_scale inside, 1 outside.

    :param t: (N,) timesteps.
    :param interval: smallest and largest timestep of the interval, both included.
    :return: (N,) float32 weights.
    """
    first, last = interval
    return torch.where((t >= first) & (t <= last), float(cfg_scale), 1.0)


def resolve_channels(guided_channels: int | str | None, in_channels: int) -> int | None:
    """How many of a model's channels are guided.

    :param guided_channels: the first ones, this many; None for all; or `auto`. DiT and MDT guide three of the four
        channels of their latents, also in all published results, and so does `auto` with up to four channels. Of more,
        as autoencoders with 16 or 32 have, it guides all.
    :return: a number, or None for all.
    """
    if guided_channels != "auto":
        return guided_channels
    return 3 if in_channels <= 4 else None


def scale_of_pairs(cfg_scale: float | torch.Tensor, num_pairs: int, device: torch.device) -> float | torch.Tensor:
    """The guidance scale of `forward_with_cfg`: a number as it is, or float32 scales on the device of the images.

    :param cfg_scale: a number; or a tensor of one scale, of n, also as (n, 1, 1, 1), or of 2n, whose first n count.
    :param num_pairs: n.
    :return: a number, or (1,) or (n,) scales.
    :raises UserError: for another number of scales.
    """
    if not isinstance(cfg_scale, torch.Tensor):
        return cfg_scale
    count = cfg_scale.numel()
    if count not in (1, num_pairs, 2 * num_pairs):
        raise UserError(f"cfg_scale holds {count} scales: it must hold 1, {num_pairs} or {2 * num_pairs}")
    return cfg_scale.reshape(-1)[:num_pairs].to(device, torch.float32)


def guide(
    out_cond: torch.Tensor, out_null: torch.Tensor, weight: torch.Tensor, guided_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extrapolate from the prediction for the null class to that for the given class: null + w (cond - null).

    :param out_cond: (n, C, H, W) model output for the given classes.
    :param out_null: (n, C, H, W) model output for the null class.
    :param weight: (n,) guidance weights.
    :param guided_channels: guide only the first channels, this many; the other channels stay unguided.
    :return: `out_cond` and `out_null` with their first channels replaced by the guided prediction.
    """
    weight = weight.view(-1, *[1] * (out_cond.ndim - 1)).to(out_cond.dtype)
    eps_cond, eps_null = out_cond[:, :guided_channels], out_null[:, :guided_channels]
    eps = eps_null + weight * (eps_cond - eps_null)
    return (
        torch.cat([eps, out_cond[:, guided_channels:]], dim=1),
        torch.cat([eps, out_null[:, guided_channels:]], dim=1),
    )


# ---------------------------------------------------------------- a guided model


def _is_finite(value: float | Sequence[float] | torch.Tensor) -> bool:
    """Whether all numbers are finite. Those on a GPU pass: to look at them, the host would wait at every step."""
    if isinstance(value, torch.Tensor):
        return value.device.type != "cpu" or bool(value.isfinite().all())
    return all(map(math.isfinite, value if isinstance(value, (tuple, list)) else (value,)))


@dataclass(frozen=True)
class Guidance:
    """The settings of a guidance rule.

    :param rule: one of `RULES`.
    :param cfg_scale: guidance scale: the largest weight; a tensor (N,) for one of each row.
    :param scale_pow: power of the `power-cosine` rule.
    :param interval: smallest and largest timestep that the `interval` rule guides.
    :param guided_channels: see `resolve_channels`.
    :param skip_below: skip the unconditional (or weaker) model at steps whose weights differ from 1 by at most this:
        0 skips it only if all weights are exactly 1, a negative number never does.
    :param diffusion_steps: number of timesteps that the model was trained with.
    :raises UserError: for an unknown rule, a number that is not finite, and an empty interval.
    """

    rule: str = "none"
    cfg_scale: float | torch.Tensor = 1.0
    scale_pow: float = 4.0
    interval: tuple[float, float] = (0, 1000)
    guided_channels: int | str | None = "auto"
    skip_below: float = 0.0
    diffusion_steps: int = 1000

    def __post_init__(self):
        if self.rule not in RULES:
            raise UserError(f"guidance is {self.rule!r}: choose one of {', '.join(RULES)}")
        for name in ("cfg_scale", "scale_pow", "interval", "skip_below"):
            value = getattr(self, name)
            if not _is_finite(value):
                raise UserError(f"{name} of the guidance is {value}: it must be finite")
        if self.guided_channels is not None and (requirement := check_channels(self.guided_channels)):
            raise UserError(f"guided_channels of the guidance is {self.guided_channels}: it must be {requirement}")
        if self.interval[0] > self.interval[1]:
            raise UserError(
                f"the guidance interval {self.interval} is empty: the first timestep must be the smaller one"
            )

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """(N,) timesteps -> (N,) weights."""
        if self.rule == "constant":
            return constant_weight(t, self.cfg_scale)
        if self.rule == "power-cosine":
            return power_cosine_weight(t, self.cfg_scale, self.diffusion_steps, self.scale_pow)
        if self.rule == "interval":
            return interval_weight(t, self.cfg_scale, self.interval)
        return torch.ones(t.shape, device=t.device)

    def is_negligible(self, t: torch.Tensor) -> bool:
        """Whether guidance is skipped at the (N,) timesteps. The host waits for the device that t is on."""
        return self.rule == "none" or bool((self.weight(t) - 1).abs().max() <= self.skip_below)

    def describe(self) -> dict[str, Any]:
        """The rule and the settings that it uses, as JSON values."""
        used = {"power-cosine": ["scale_pow"], "interval": ["interval"]}.get(self.rule, [])
        if self.rule != "none":
            used = ["cfg_scale", *used, "guided_channels", "skip_below"]
        values = {name: getattr(self, name) for name in used}
        return {"rule": self.rule} | {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


class GuidedDenoiser:
    """A model with guidance, called like the model itself.

    Without `guide_model` this is classifier-free guidance: the model also runs on the null class, in the same batch.
    With it, this is autoguidance: the weaker model takes the place of the null class (Karras et al. 2024, "Guiding a
    diffusion model with a bad version of itself", eq. 3).

    :param model: `model(x, t, y)` returns (n, C or 2C, H, W).
    :param null_label: label of the null class; None if the model has none.
    :param guide_model: a weaker model with the same inputs and outputs.
    :raises UserError: if a rule is set, but there is neither a null class nor a `guide_model`.
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

    def keeping(self, ids_keep: torch.Tensor) -> "GuidedDenoiser":
        """The same, but the model runs masked passes that keep these tokens; a `guide_model` still sees all.

        :param ids_keep: (1, K), the same for all rows; see `MDT.forward`.
        """

        def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.model(x, t, y, ids_keep=ids_keep.expand(len(x), -1))

        return GuidedDenoiser(model, self.guidance, self.null_label, self.guide_model)

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, timestep: float | None = None
    ) -> torch.Tensor:
        """(n, C, H, W) noisy input, (n,) timesteps and (n,) labels -> (n, C or 2C, H, W) guided output.

        :param timestep: the one that all of t are, if the host knows it: it then decides without waiting for the
            device whether to skip guidance.
        """
        known = t if timestep is None else torch.full(t.shape, timestep, dtype=t.dtype)
        if self.guidance.is_negligible(known):
            return self.model(x, t, y)
        if self.guide_model is not None:
            out, guiding = self.model(x, t, y), self.guide_model(x, t, y)
        else:
            labels = torch.cat([y, torch.full_like(y, self.null_label)])
            out, guiding = self.model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        channels = resolve_channels(self.guidance.guided_channels, x.shape[1]) or x.shape[1]
        return guide(out, guiding, self.guidance.weight(t), channels)[0]


def at_timestep(denoise: Callable[..., torch.Tensor], timestep: float) -> Callable[..., torch.Tensor]:
    """`denoise` for a batch whose timesteps are all `timestep`, which a `GuidedDenoiser` is told."""
    return partial(denoise, timestep=timestep) if isinstance(denoise, GuidedDenoiser) else denoise
