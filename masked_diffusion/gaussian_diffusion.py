"""The Gaussian diffusion process: training losses, ancestral sampling and DDIM sampling.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM), Song et al. 2021 (DDIM), Dhariwal & Nichol 2021 (ADM),
Hang et al. 2023 (Min-SNR). The names and the order of the arguments are those of ADM's `guided_diffusion`.
"""

import enum
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .diffusion_utils import (  # noqa: F401  (ADM, DiT and MDT have the schedules in this module)
    _warmup_beta,
    betas_for_alpha_bar,
    discretized_gaussian_log_likelihood,
    get_beta_schedule,
    get_named_beta_schedule,
    mean_flat,
    normal_kl,
)
from .reverse_process import ModelMeanType, ModelVarType, ReverseProcess
from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr

__getattr__ = module_getattr(__name__)


class LossType(enum.Enum):
    """What training minimizes."""

    MSE = "mse"  # MSE of the prediction, plus the variational bound if the variance is learned
    RESCALED_MSE = "rescaled_mse"  # the same, with the variational bound multiplied by num_timesteps / 1000
    KL = "kl"  # one term of the variational bound
    RESCALED_KL = "rescaled_kl"  # that term times num_timesteps: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound alone."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(ReverseProcess):
    """Training losses and sampling loops for one noise schedule.

    In all methods, `x_start`, `x`, `x_t` and `noise` are (N, C, ...) floats, `t` is (N,) int64 in [0, num_timesteps),
    and `model(x, t, **model_kwargs)` returns (N, C, ...), or (N, 2C, ...) with a learned variance.

    :param betas: noise variances, in (0, 1].
    :param rescale_timesteps: give models and `cond_fn`s the float t * 1000 / num_timesteps, as ADM's first models had.
    :param snr_gamma: gamma of the Min-SNR weight of the MSE; None for an unweighted MSE.
    :raises UserError: for betas outside (0, 1], and for `PREVIOUS_X` and `LEARNED`.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray | Sequence[float],
        model_mean_type: ModelMeanType = ModelMeanType.EPSILON,
        model_var_type: ModelVarType = ModelVarType.LEARNED_RANGE,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
        snr_gamma: float | None = None,
    ):
        super().__init__(betas, model_mean_type, model_var_type, rescale_timesteps)
        self.loss_type, self.snr_gamma = loss_type, snr_gamma

    # ------------------------------------------------------------ ancestral sampling

    def p_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> dict[str, Tensor]:
        """One ancestral step from x_t to x_{t-1} (DDPM, algorithm 2).

        :param clip_denoised, denoised_fn: see `p_mean_variance`.
        :param cond_fn: see `condition_mean`.
        :param randn_like: `randn_like(x)` draws the noise; with one generator per sample, an image does not depend on
            the other images of its batch.
        :return: dict of `sample` and `pred_xstart`, each of x's shape.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        nonzero_mask = (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        sample = out["mean"] + nonzero_mask * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Samples of the given shape, after all ancestral steps. Arguments: see `p_sample_loop_progressive`."""
        steps = self.p_sample_loop_progressive(
            model, shape, noise=noise, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, device=device, progress=progress, **_draw_option(randn_like),
        )  # fmt: skip
        return _last_sample(steps)

    def p_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `p_sample` returns, for every step from the last to step 0.

        :param shape: (N, C, ...), the shape of the samples.
        :param noise: x_T; None draws it.
        :param clip_denoised, denoised_fn, cond_fn, model_kwargs, randn_like: see `p_sample`.
        :param device: device of the samples; None is that of `noise`, or without it that of the model's parameters.
        :param progress: show a progress bar.
        """
        step = partial(
            self.p_sample, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, **_draw_option(randn_like),
        )  # fmt: skip
        yield from self._loop(step, model, shape, noise, device, progress)

    def _loop(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `step(x, t)` returns, for every step from the last to step 0."""
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in tqdm(range(self.num_timesteps)[::-1], disable=not progress):
            t = torch.full((shape[0],), i, dtype=torch.long, device=device)
            with torch.no_grad():
                out = step(x, t)
            yield out
            x = out["sample"]

    # ------------------------------------------------------------ DDIM sampling

    def ddim_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> dict[str, Tensor]:
        """One DDIM step from x_t to x_{t-1} (DDIM, eqs. 12 and 16).

        :param clip_denoised, denoised_fn, model_kwargs, randn_like: see `p_sample`.
        :param cond_fn: see `condition_score`.
        :param eta: 0 is deterministic, 1 adds as much noise as DDPM's posterior.
        :return: dict of `sample` and `pred_xstart`, each of x's shape.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar, alpha_bar_prev = self._extract("alphas_cumprod", t, x), self._extract("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        noise = randn_like(x)
        mean = out["pred_xstart"] * alpha_bar_prev.sqrt() + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        nonzero_mask = (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return {"sample": mean + nonzero_mask * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of DDIM's deterministic ODE in reverse, from x_t to x_{t+1}.

        The order of the arguments is that of DiT and MDT. ADM's has no `cond_fn` (denoised_fn, model_kwargs, eta): a
        call in that order works too, and is recognized by a dict as `cond_fn`, or a number as `model_kwargs`.

        :param eta: must be 0.
        :return: dict of `sample` and `pred_xstart`, each of x's shape.
        :raises UserError: if eta is not 0.
        :raises TypeError: if the arguments fit neither order.
        """
        if isinstance(cond_fn, Mapping) or isinstance(model_kwargs, Number):
            cond_fn, model_kwargs, eta = None, cond_fn, eta if model_kwargs is None else model_kwargs
            if callable(model_kwargs) or not isinstance(eta, Number):
                raise TypeError("ddim_reverse_sample takes (cond_fn, model_kwargs, eta), or ADM's (model_kwargs, eta)")
        if eta != 0.0:
            raise UserError(f"eta is {eta}: eta must be 0, since the reverse ODE is deterministic")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self._extract("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * alpha_bar_next.sqrt() + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Samples of the given shape, after all DDIM steps. Arguments: see `ddim_sample_loop_progressive`."""
        steps = self.ddim_sample_loop_progressive(
            model, shape, noise=noise, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, device=device, progress=progress, eta=eta, **_draw_option(randn_like),
        )  # fmt: skip
        return _last_sample(steps)

    def ddim_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `ddim_sample` returns, for every step. Arguments: as `p_sample_loop_progressive`, and `eta`."""
        step = partial(
            self.ddim_sample, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, eta=eta, **_draw_option(randn_like),
        )  # fmt: skip
        yield from self._loop(step, model, shape, noise, device, progress)

    # ------------------------------------------------------------ losses

    def _vb_terms_bpd(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The term of the variational bound at t, in bits per dimension (DDPM, eq. 5).

        It is the KL divergence of the two posteriors for t > 0, and the decoder's negative log-likelihood at t = 0.

        :return: dict of `output` (N,) and `pred_xstart`, of x_start's shape.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        output = torch.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2.0)
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def _min_snr_weight(self, t: Tensor, x_start: Tensor) -> Tensor:
        """(N,) Min-SNR weights of the MSE of what the network predicts (Hang et al. 2023, sec. 3.4)."""
        snr = self._extract("snr", t, x_start).flatten()
        clipped = snr.clamp(max=self.snr_gamma)
        if self.model_mean_type == ModelMeanType.START_X:
            return clipped
        return clipped / (snr + 1 if self.model_mean_type == ModelMeanType.VELOCITY else snr)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of each sample, from one call of the model.

        :param noise: the noise added to x_start; None draws it.
        :return: dict of (N,) tensors: `loss`; with an MSE loss also `mse`, and `vb` if the variance is learned.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        terms = {}
        prediction, variance_values = self._split_output(self._call(model, x_t, t, model_kwargs), x_t)
        if variance_values is not None:
            # The mean is detached, so that the bound trains only the variance (improved DDPM, sec. 3.1).
            frozen = torch.cat([prediction.detach(), variance_values], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = {
            ModelMeanType.EPSILON: lambda: noise,
            ModelMeanType.START_X: lambda: x_start,
            ModelMeanType.VELOCITY: lambda: self._velocity(x_start, t, noise),
        }[self.model_mean_type]()
        terms["mse"] = mean_flat((target - prediction) ** 2)
        if self.snr_gamma is not None:
            terms["mse"] = terms["mse"] * self._min_snr_weight(t, x_start)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """(N,) KL divergence of q(x_T | x_0) from the standard normal, in bits per dimension."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, dtype=torch.long, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The variational bound and all its terms, in bits per dimension.

        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :return: dict of (N,) `total_bpd` and `prior_bpd`, and of (N, num_timesteps) `vb`, `xstart_mse` and `mse` (of
            eps), whose first column is the last timestep.
        """
        vb, xstart_mse, mse = [], [], []
        for i in range(self.num_timesteps)[::-1]:
            t = torch.full((len(x_start),), i, dtype=torch.long, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))
        vb, xstart_mse, mse = (torch.stack(terms, dim=1) for terms in (vb, xstart_mse, mse))
        prior_bpd = self._prior_bpd(x_start)
        return {
            "total_bpd": vb.sum(dim=1) + prior_bpd,
            "prior_bpd": prior_bpd,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }


def _draw_option(randn_like: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """`randn_like` for the next call, unless it is the default: overrides with published arguments do not know it."""
    return {} if randn_like is torch.randn_like else {"randn_like": randn_like}


def _last_sample(steps: Iterable[dict[str, Tensor]]) -> Tensor:
    """The sample of a loop's last step; the outputs of the other steps are freed on the way."""
    return deque(steps, maxlen=1).pop()["sample"]


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """Entries of a numpy table at (N,) timesteps, as float32, expanded to `broadcast_shape`.

    Nothing here calls it; scripts of ADM's users do.
    """
    entries = torch.from_numpy(arr).to(timesteps.device)[timesteps].float()
    return entries.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
