"""The Gaussian diffusion process: forward process, losses, ancestral and implicit sampling.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM), Song et al. 2021 (DDIM), Dhariwal & Nichol 2021 (ADM),
Hang et al. 2023 (Min-SNR). Names and arguments are those of ADM's `guided_diffusion`.
"""

import enum
import math
from collections import deque
from collections.abc import Mapping
from numbers import Number

import torch
from tqdm.auto import tqdm

from .diffusion_utils import (  # noqa: F401  (the schedules are found here in ADM, DiT and MDT)
    _warmup_beta,
    betas_for_alpha_bar,
    discretized_gaussian_log_likelihood,
    get_beta_schedule,
    get_named_beta_schedule,
    mean_flat,
    normal_kl,
)
from .forward_process import ForwardProcess
from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr

__getattr__ = module_getattr(__name__)


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    EPSILON = "eps"
    START_X = "x_start"
    PREVIOUS_X = "x_prev"  # a published name; no diffusion is made of it
    VELOCITY = "v"  # v = sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x_start (Salimans & Ho 2022)


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED_RANGE = "learned_range"  # the second half of the output interpolates between the two fixed ones
    FIXED_SMALL = "fixed_small"  # the posterior's
    FIXED_LARGE = "fixed_large"  # beta
    LEARNED = "learned"  # a published name; no diffusion is made of it


class LossType(enum.Enum):
    MSE = "mse"  # weighted MSE, plus the variational term when the variance is learned
    RESCALED_MSE = "rescaled_mse"  # the same with the variational term times steps / 1000
    KL = "kl"  # the variational bound
    RESCALED_KL = "rescaled_kl"  # the bound times the number of steps: an estimate of its sum

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(ForwardProcess):
    """Training losses and sampling loops for one noise schedule.

    Everywhere: `x_start`, `x`, `x_t`, `noise` are (N, C, ...) floats; `t` is (N,) int64 in [0, num_timesteps);
    `model(x, t, **model_kwargs)` returns (N, C, ...), or (N, 2C, ...) with a learned variance.

    :param betas: noise variances, in (0, 1].
    :param rescale_timesteps: give models and `cond_fn`s t * 1000 / num_timesteps as floats, as ADM's first models had.
    :param snr_gamma: Min-SNR's gamma, which weights the MSE term; None is no weight.
    :raises UserError: for betas outside (0, 1], and for `PREVIOUS_X` and `LEARNED`.
    """

    def __init__(
        self,
        *,
        betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.MSE,
        rescale_timesteps=False,
        snr_gamma=None,
    ):
        if model_mean_type == ModelMeanType.PREVIOUS_X:
            raise UserError(
                "models that predict x_{t-1} (PREVIOUS_X) are not rebuilt: use EPSILON, START_X or VELOCITY"
            )
        if model_var_type == ModelVarType.LEARNED:
            raise UserError("freely learned variances (LEARNED) are not rebuilt: use LEARNED_RANGE (learn_sigma=True)")
        super().__init__(betas)
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps, self.snr_gamma = rescale_timesteps, snr_gamma

    def model_timesteps(self, t):
        """What models and `cond_fn`s are given for this process's (N,) steps."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # ------------------------------------------------------------ reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t) and the prediction of x_0.

        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before the clipping.
        :return: dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each of x's shape.
        """
        return self._interpret(self._call(model, x, t, model_kwargs), x, t, clip_denoised, denoised_fn)

    def _call(self, function, x, t, kwargs):
        """The output of a model or a `cond_fn` at this process's steps."""
        return function(x, self.model_timesteps(t), **(kwargs or {}))

    def _interpret(self, model_output, x, t, clip_denoised, denoised_fn=None):
        """`p_mean_variance` for an output that is already there."""
        prediction, variance_values = self._split(model_output, x)
        variance, log_variance = self._variance(variance_values, x, t)
        pred_xstart = self._pred_xstart(prediction, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _split(self, model_output, x):
        """The prediction, and the variance values or None; refuses an output of another shape."""
        factor = 2 if self.model_var_type == ModelVarType.LEARNED_RANGE else 1
        expected = (x.shape[0], factor * x.shape[1], *x.shape[2:])
        if model_output.shape != expected:
            raise UserError(
                f"the model returned {tuple(model_output.shape)} for an input of {tuple(x.shape)}, but this diffusion "
                f"({self.model_var_type.name}) needs {expected}: give model and diffusion the same learn_sigma"
            )
        return model_output.chunk(2, dim=1) if factor == 2 else (model_output, None)

    def _variance(self, variance_values, x, t):
        """Variance and log variance of p(x_{t-1} | x_t), of x's shape."""
        fixed = {
            ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
            ModelVarType.FIXED_LARGE: ("fixed_large_variance", "fixed_large_log_variance"),
        }
        if self.model_var_type in fixed:
            return tuple(self._extract(name, t, x).expand_as(x) for name in fixed[self.model_var_type])
        # Improved DDPM, eq. 15, for values in [-1, 1]
        fraction = (variance_values + 1) / 2
        low, high = self._extract("posterior_log_variance_clipped", t, x), self._extract("log_betas", t, x)
        log_variance = fraction * high + (1 - fraction) * low
        return log_variance.exp(), log_variance

    def _pred_xstart(self, prediction, x, t):
        if self.model_mean_type == ModelMeanType.START_X:
            return prediction
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return self._predict_xstart_from_v(x, t, prediction)
        return self._predict_xstart_from_eps(x, t, prediction)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean shifted by a classifier's gradient `cond_fn(x, t, **model_kwargs)` (ADM, algorithm 1)."""
        gradient = self._call(cond_fn, x, t, model_kwargs)
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """`p_mean_var` with its score shifted by a classifier's gradient (ADM, algorithm 2; Song et al. 2020)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = self._call(cond_fn, x, t, model_kwargs)
        eps = eps - self._extract("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # ------------------------------------------------------------ ancestral sampling

    def p_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        randn_like=torch.randn_like,
    ):
        """One ancestral step from x_t to x_{t-1} (DDPM, algorithm 2).

        :param randn_like: where the noise comes from; a per-sample generator makes images independent of the batch.
        :return: dict of `sample` and `pred_xstart`.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = randn_like(x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        nonzero_mask = (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        sample = out["mean"] + nonzero_mask * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        randn_like=torch.randn_like,
    ):
        """Samples of `shape` by all ancestral steps; arguments as of `p_sample_loop_progressive`."""
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return _last(self.p_sample_loop_progressive(model, shape, noise, *step, device, progress, randn_like))

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        randn_like=torch.randn_like,
    ):
        """Yields `p_sample`'s dict after every step.

        :param shape: (N, C, ...) of the samples.
        :param noise: x_T; drawn where it is not given.
        :param clip_denoised, denoised_fn, cond_fn, model_kwargs, randn_like: as in `p_sample`.
        :param device: where x_T is drawn; the model's by default.
        :param progress: show a bar.
        """
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs, randn_like)
        yield from self._loop(self.p_sample, model, shape, noise, device, progress, step)

    def _loop(self, step, model, shape, noise, device, progress, step_arguments):
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in tqdm(range(self.num_timesteps)[::-1], disable=not progress):
            t = torch.full((shape[0],), i, dtype=torch.long, device=device)
            with torch.no_grad():
                out = step(model, x, t, *step_arguments)
            yield out
            x = out["sample"]

    # ------------------------------------------------------------ implicit sampling

    def ddim_sample(
        self,
        model,
        x,
        t,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        eta=0.0,
        randn_like=torch.randn_like,
    ):
        """One step from x_t to x_{t-1} (DDIM, eqs. 12 and 16); eta = 0 is deterministic, 1 ancestral."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar, alpha_bar_prev = self._extract("alphas_cumprod", t, x), self._extract("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        noise = randn_like(x)
        mean = out["pred_xstart"] * alpha_bar_prev.sqrt() + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        nonzero_mask = (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return {"sample": mean + nonzero_mask * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0
    ):
        """One step of the deterministic ODE the other way, from x_t to x_{t+1} (eta must be 0).

        The positions are DiT's and MDT's. ADM's, which has no `cond_fn` (..., denoised_fn, model_kwargs, eta), are
        told apart by their types: a dict in the place of the function, or a number in the place of the dict.
        """
        if isinstance(cond_fn, Mapping) or isinstance(model_kwargs, Number):
            cond_fn, model_kwargs, eta = None, cond_fn, eta if model_kwargs is None else model_kwargs
            if callable(model_kwargs) or not isinstance(eta, Number):
                raise TypeError("ddim_reverse_sample takes cond_fn, model_kwargs, eta, or as in ADM model_kwargs, eta")
        if eta != 0.0:
            raise UserError(f"eta is {eta}: the reverse ODE is deterministic, so eta must be 0")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self._extract("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * alpha_bar_next.sqrt() + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        randn_like=torch.randn_like,
    ):
        """Samples of `shape` by DDIM; arguments as of `ddim_sample_loop_progressive`."""
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
        return _last(self.ddim_sample_loop_progressive(model, shape, noise, *step, device, progress, eta, randn_like))

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        cond_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        randn_like=torch.randn_like,
    ):
        """Yields `ddim_sample`'s dict after every step; arguments as of `p_sample_loop_progressive`, and `eta`."""
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, randn_like)
        yield from self._loop(self.ddim_sample, model, shape, noise, device, progress, step)

    # ------------------------------------------------------------ losses

    def _vb_terms_bpd(self, model_output, x_start, x_t, t, clip_denoised):
        """One term of the variational bound in bits per dimension: KL for t > 0, the decoder's NLL at t = 0.

        :return: dict of `output` (N,) and `pred_xstart`.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._interpret(model_output, x_t, t, clip_denoised)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        output = torch.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2.0)
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def _mse_weight(self, t, like):
        """Min-SNR (Hang et al. 2023, sec. 3.4), for the quantity the network predicts; (N,)."""
        snr = self._extract("snr", t, like).flatten()
        clipped = snr.clamp(max=self.snr_gamma)
        if self.model_mean_type == ModelMeanType.START_X:
            return clipped
        return clipped / (snr + 1 if self.model_mean_type == ModelMeanType.VELOCITY else snr)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Losses of one pass, per sample.

        :param noise: drawn where it is not given.
        :return: dict of (N,) tensors: `loss`, and with an MSE loss `mse` and, for a learned variance, `vb`.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        model_output = self._call(model, x_t, t, model_kwargs)

        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model_output, x_start, x_t, t, clip_denoised=False)["output"]
            return {"loss": loss * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else loss}

        terms = {}
        prediction, variance_values = self._split(model_output, x_t)
        if variance_values is not None:
            # The bound trains the variance alone: the mean is detached (improved DDPM, sec. 3.1).
            frozen = torch.cat([prediction.detach(), variance_values], dim=1)
            terms["vb"] = self._vb_terms_bpd(frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = {
            ModelMeanType.EPSILON: lambda: noise,
            ModelMeanType.START_X: lambda: x_start,
            ModelMeanType.VELOCITY: lambda: self._velocity(x_start, t, noise),
        }[self.model_mean_type]()
        terms["mse"] = mean_flat((target - prediction) ** 2)
        if self.snr_gamma is not None:
            terms["mse"] = terms["mse"] * self._mse_weight(t, x_start)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _prior_bpd(self, x_start):
        """KL of q(x_T | x_0) to the standard normal in bits per dimension, (N,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, dtype=torch.long, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        """The whole variational bound, term by term, in bits per dimension.

        :return: dict of `total_bpd` (N,), `prior_bpd` (N,), and `vb`, `xstart_mse`, `mse` (N, num_timesteps), with
            the last step first.
        """
        vb, xstart_mse, mse = [], [], []
        for i in range(self.num_timesteps)[::-1]:
            t = torch.full((len(x_start),), i, dtype=torch.long, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with torch.no_grad():
                output = self._call(model, x_t, t, model_kwargs)
                out = self._vb_terms_bpd(output, x_start, x_t, t, clip_denoised)
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


def _last(steps):
    """The sample of the last of a loop's dicts; the others are let go as they come."""
    return deque(steps, maxlen=1).pop()["sample"]


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """ADM's name: entries of a numpy table at (N,) timesteps as float32, expanded to `broadcast_shape`."""
    entries = torch.from_numpy(arr).to(timesteps.device)[timesteps].float()
    return entries.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
