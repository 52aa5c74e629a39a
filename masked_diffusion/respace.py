"""Diffusions that use only some of the original timesteps."""

from numbers import Integral

import numpy as np
import torch

from .gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr

__getattr__ = module_getattr(__name__)


def space_timesteps(num_timesteps, section_counts):
    """Choose timesteps of an original process.

    :param num_timesteps: steps of the original process.
    :param section_counts: "250" evenly spread steps; "10,15,20" for so many in each of three equal sections; or
        "ddim50" for DDIM's fixed stride with exactly that many steps. A number or a list of counts works too.
    :return: set of ints.
    :raises UserError: where the counts cannot be had.
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
            raise UserError(f"timestep_respacing asks for {count} of the {section_size} steps of section {i}")
        stride = (section_size - 1) / (count - 1) if count > 1 else 1
        offset = 0.0
        for _ in range(count):  # added up, not multiplied: rounding picks the same steps as ADM's
            steps.add(start + round(offset))
            offset += stride
        start += section_size
    return steps


def _ddim_stride(num_timesteps, count):
    for stride in range(1, num_timesteps):
        steps = range(0, num_timesteps, stride)
        if len(steps) == count:
            return set(steps)
    raise UserError(f"no whole stride takes exactly {count} of {num_timesteps} steps: choose another ddim count")


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over a subset of an original process's timesteps.

    The kept steps have the original `alphas_cumprod`; models and `cond_fn`s are given original timesteps.

    :param use_timesteps: the original timesteps to keep.
    :param betas: of the original process.
    """

    def __init__(self, use_timesteps, *, betas, **options):
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = len(betas)
        if not self.timestep_map or self.timestep_map[0] < 0 or self.timestep_map[-1] >= len(betas):
            raise UserError(f"use_timesteps must be a non-empty set of steps in [0, {len(betas)})")
        kept = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **options)
        self._device_maps = {}

    def model_timesteps(self, t):
        """(N,) steps of this process -> (N,) steps of the original one, which models and `cond_fn`s are given."""
        if t.device not in self._device_maps:
            self._device_maps[t.device] = torch.tensor(self.timestep_map, device=t.device)
        t = self._device_maps[t.device][t]
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
):
    """ADM's way to make a diffusion, with ADM's defaults: a fixed variance and no Min-SNR; see `create_diffusion`."""
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
    timestep_respacing="",
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
    predict_v=False,
    snr_gamma=5.0,
):
    """Make a diffusion.

    The first eight arguments are DiT's and MDT's. The published defaults of the families differ in the loss: MDTv2
    is trained with a Min-SNR weight of 5, which is the default here; DiT and MDT are trained without, so that
    training them takes `snr_gamma=None` (`image_train.py` asks for what its model needs). Sampling does not depend
    on it.

    :param timestep_respacing: see `space_timesteps`; "" or None keeps all steps.
    :param noise_schedule: `linear` or `squaredcos_cap_v2`.
    :param use_kl: train on the variational bound instead of the MSE.
    :param sigma_small: without `learn_sigma`, the posterior's variance instead of beta.
    :param predict_xstart, predict_v: what the model predicts, instead of eps.
    :param learn_sigma: the model's output has twice the channels, and its second half makes the variance.
    :param rescale_learned_sigmas: multiply the variational term by steps / 1000.
    :param snr_gamma: Min-SNR weight of the MSE, as MDTv2 trains; None for MDT and DiT, which use no weight.
    :raises UserError: for options that exclude each other or cannot be had.
    """
    if predict_xstart and predict_v:
        raise UserError("predict_xstart and predict_v are both set: a model predicts one thing")
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
