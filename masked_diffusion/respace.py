"""Diffusions that use only some of the original timesteps, and the functions that create a diffusion."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .flow_matching import FlowMatching
from .gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr

__getattr__ = module_getattr(__name__)


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> set[int]:
    """Choose some of the timesteps of the original process.

    :param num_timesteps: number of timesteps of the original process.
    :param section_counts: "250" chooses 250 evenly spaced timesteps; "10,15,20" divides the process into three equal
        sections and chooses 10, 15 and 20 timesteps of them; "ddim50" chooses 50 timesteps with an integer stride, as
        in the DDIM paper. An int or a list of ints works like the text without "ddim".
    :return: the chosen timesteps, in [0, num_timesteps).
    :raises UserError: for any other value, and for counts that the process or a section cannot give.
    """
    if isinstance(section_counts, str):
        counts = section_counts.removeprefix("ddim").split(",")
        if not all(count.strip().isdigit() for count in counts):
            raise UserError(f'timestep_respacing is {section_counts!r}: write "250", "10,15,20" or "ddim50"')
        if section_counts.startswith("ddim"):
            if len(counts) > 1:
                raise UserError(f'timestep_respacing is {section_counts!r}: ddim takes one number, such as "ddim50"')
            return _ddim_stride(num_timesteps, int(counts[0]))
        section_counts = [int(count) for count in counts]
    elif isinstance(section_counts, Integral):
        section_counts = [section_counts]
    elif not isinstance(section_counts, (list, tuple)) or not all(isinstance(n, Integral) for n in section_counts):
        raise UserError(f'timestep_respacing is {section_counts!r}: write 250, "250", "10,15,20" or "ddim50"')
    size, extra = divmod(num_timesteps, len(section_counts))
    start, steps = 0, set()
    for i, count in enumerate(section_counts):
        section_size = size + (i < extra)
        if not 1 <= count <= section_size:
            raise UserError(
                f"timestep_respacing asks for {count} of the {section_size} steps of section {i}: "
                f"choose a number from 1 to {section_size}"
            )
        stride = (section_size - 1) / (count - 1) if count > 1 else 1
        offset = 0.0
        for _ in range(count):  # a running sum, not a product: it is rounded to the same timesteps as in ADM
            steps.add(start + round(offset))
            offset += stride
        start += section_size
    return steps


def _ddim_stride(num_timesteps: int, count: int) -> set[int]:
    for stride in range(1, num_timesteps):
        steps = range(0, num_timesteps, stride)
        if len(steps) == count:
            return set(steps)
    raise UserError(f"no integer stride gives exactly {count} of {num_timesteps} steps: choose another ddim count")


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over a subset of the timesteps of an original process (improved DDPM, sec. 4).

    The chosen timesteps keep the `alphas_cumprod` of the original process; models and `cond_fn`s get its timesteps.

    :param use_timesteps: the timesteps of the original process to use.
    :param betas: the betas of the original process.
    :param options: see `GaussianDiffusion`.
    :raises UserError: for timesteps outside the original process, and as `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: np.ndarray | Sequence[float], **options: Any):
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = len(betas)
        if not self.timestep_map or self.timestep_map[0] < 0 or self.timestep_map[-1] >= len(betas):
            raise UserError(
                f"use_timesteps is {self.timestep_map}: it must be a non-empty set of steps in [0, {len(betas)})"
            )
        kept = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **options)
        self._device_maps = {}

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The (N,) timesteps of the original process that models and `cond_fn`s get for the (N,) steps `t`."""
        if t.device not in self._device_maps:
            self._device_maps[t.device] = torch.tensor(self.timestep_map).to(t.device, non_blocking=True)
        t = self._device_maps[t.device][t]
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # what `_wrap_model` returns scales them

    def _wrap_model(self, model: Callable[..., Tensor]) -> "_AtOriginalSteps":
        """The model as a function of the steps of this process, which overrides in users' scripts call directly."""
        return model if isinstance(model, _AtOriginalSteps) else _AtOriginalSteps(model, self)

    def _call(self, function: Callable[..., Tensor], x: Tensor, t: Tensor, kwargs: Mapping[str, Any] | None) -> Tensor:
        return self._wrap_model(function)(x, t, **(kwargs or {}))


@dataclass
class _AtOriginalSteps:
    """A model, or a `cond_fn`, that is called with the steps of a `SpacedDiffusion`."""

    model: Callable[..., Tensor]
    diffusion: SpacedDiffusion

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.model(x, self.diffusion.model_timesteps(t), **kwargs)


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | int | Sequence[int] = "",
) -> SpacedDiffusion:
    """`create_diffusion` with the argument names and defaults of ADM: a fixed variance, and no Min-SNR weight.

    :param steps: number of timesteps of the original process.
    :param rescale_timesteps: see `GaussianDiffusion`. The other arguments: see `create_diffusion`.
    """
    diffusion = create_diffusion(
        timestep_respacing,
        noise_schedule,
        use_kl,
        sigma_small,
        predict_xstart,
        learn_sigma,
        rescale_learned_sigmas,
        diffusion_steps=steps,
        snr_gamma=None,
    )
    diffusion.rescale_timesteps = rescale_timesteps
    return diffusion


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None = "",
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    predict_v: bool = False,
    snr_gamma: float | None = 5.0,
    objective: str = "diffusion",
    t_sampling: str = "uniform",
) -> SpacedDiffusion | FlowMatching:
    """Create a diffusion, or with `objective="flow"` a `FlowMatching`, for which only `t_sampling` matters.

    The first eight arguments are those of DiT and MDT, in their order. The default of `snr_gamma` is right for
    training MDTv2. DiT and MDT are trained without Min-SNR: pass `snr_gamma=None` to train them with a loop of your
    own (`image_train.py` chooses by the model's family). Sampling does not depend on `snr_gamma`.

    :param timestep_respacing: which timesteps to use, see `space_timesteps`; "" or None uses all.
    :param noise_schedule: `linear` or `squaredcos_cap_v2`.
    :param use_kl: train on the variational bound instead of the MSE.
    :param sigma_small: without `learn_sigma`: use the variance of the posterior instead of beta.
    :param predict_xstart: the model predicts x_0 instead of eps.
    :param predict_v: the model predicts v instead of eps.
    :param learn_sigma: the model's output has twice the channels; the second half gives the variance.
    :param rescale_learned_sigmas: multiply the variational bound in the loss by num_timesteps / 1000.
    :param diffusion_steps: number of timesteps of the original process.
    :param snr_gamma: gamma of the Min-SNR weight of the MSE; None for no weight.
    :param objective: `diffusion` or `flow`. :param t_sampling: see `FlowMatching`.
    :raises UserError: for unknown names, values out of range, and options that exclude each other.
    """
    if objective not in ("diffusion", "flow"):
        raise UserError(f"objective is {objective!r}: choose diffusion or flow")
    if objective == "flow":
        return FlowMatching(t_sampling)
    if predict_xstart and predict_v:
        raise UserError("predict_xstart and predict_v are both set: choose at most one")
    if snr_gamma is not None and snr_gamma <= 0:
        raise UserError(f"snr_gamma is {snr_gamma}: it must be positive, or None for no weight")
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    mean_type = ModelMeanType.EPSILON
    if predict_xstart or predict_v:
        mean_type = ModelMeanType.START_X if predict_xstart else ModelMeanType.VELOCITY
    if timestep_respacing is None or timestep_respacing == "":
        timestep_respacing = diffusion_steps
    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing),
        betas=get_named_beta_schedule(noise_schedule, diffusion_steps),
        model_mean_type=mean_type,
        model_var_type=var_type,
        loss_type=loss_type,
        snr_gamma=snr_gamma,
    )
