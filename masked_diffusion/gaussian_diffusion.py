"""The Gaussian diffusion process: forward process, losses, ancestral and implicit sampling.

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM), Song et al. 2021 (DDIM), Dhariwal & Nichol 2021 (ADM),
Hang et al. 2023 (Min-SNR). Names and arguments are those of ADM's `guided_diffusion`.
"""

import enum
import math
from collections import deque
from itertools import pairwise

import numpy as np
import torch
from tqdm.auto import tqdm

from .diffusion_utils import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .utils.errors import UserError


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    EPSILON = "eps"
    START_X = "x_start"
    VELOCITY = "v"  # v = sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x_start (Salimans & Ho 2022)


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED_RANGE = "learned_range"  # the second half of the output interpolates between the two fixed ones
    FIXED_SMALL = "fixed_small"  # the posterior's
    FIXED_LARGE = "fixed_large"  # beta


class LossType(enum.Enum):
    MSE = "mse"  # weighted MSE, plus the variational term when the variance is learned
    RESCALED_MSE = "rescaled_mse"  # the same with the variational term times steps / 1000
    KL = "kl"  # the variational bound
    RESCALED_KL = "rescaled_kl"  # the bound times the number of steps: an estimate of its sum

    def is_vb(self):
        return self in (LossType.KL, LossType.RESCALED_KL)


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


class GaussianDiffusion:
    """Training losses and samplers for one noise schedule.

    Everywhere: `x_start`, `x`, `x_t`, `noise` are (N, C, ...) floats; `t` is (N,) int64 in [0, num_timesteps);
    `model(x, t, **model_kwargs)` returns (N, C, ...), or (N, 2C, ...) with a learned variance. Tables are float64
    numpy arrays of num_timesteps entries under ADM's names.

    :param betas: noise variances, in (0, 1].
    :param snr_gamma: Min-SNR's gamma, which weights the MSE term; None is no weight.
    :raises UserError: for betas outside (0, 1].
    """

    def __init__(
        self,
        *,
        betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.MSE,
        snr_gamma=None,
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise UserError(f"betas must be one row of numbers in (0, 1], got shape {betas.shape}: {betas}")
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.snr_gamma = snr_gamma
        self.betas = betas
        self.num_timesteps = len(betas)
        self._device_tables = {}

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0): DDPM, eq. 4
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        self.log_betas = np.log(betas)
        self.snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)

        # q(x_{t-1} | x_t, x_0): DDPM, eqs. 6 and 7
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        # The variance is 0 at t = 0: its logarithm takes the next step's (or beta, where there is no next step).
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        # The large fixed variance is beta, but at t = 0 the small one, which gives a better likelihood.
        self.fixed_large_variance = np.append(first, betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)

    def _extract(self, name, t, like):
        """Entries of the table `name` at t, shaped to broadcast against `like`; the table stays on its device."""
        key = name, t.device
        if key not in self._device_tables:
            self._device_tables[key] = torch.from_numpy(getattr(self, name)).float().to(t.device)
        return self._device_tables[key][t].view(-1, *[1] * (like.ndim - 1))

    # ------------------------------------------------------------ forward process

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log variance of q(x_t | x_0), of x_start's shape."""
        mean = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._extract("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        variance = 1.0 - self._extract("alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, variance, log_variance

    def q_sample(self, x_start, t, noise=None):
        """A draw from q(x_t | x_0), made of `noise` where it is given."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return (
            self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        mean = (
            self._extract("posterior_mean_coef1", t, x_t) * x_start
            + self._extract("posterior_mean_coef2", t, x_t) * x_t
        )
        variance = self._extract("posterior_variance", t, x_t).expand_as(x_t)
        log_variance = self._extract("posterior_log_variance_clipped", t, x_t).expand_as(x_t)
        return mean, variance, log_variance

    # ------------------------------------------------------------ conversions between predictions

    def _predict_xstart_from_eps(self, x_t, t, eps):
        return (
            self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._extract("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        return (self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._extract(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    def _predict_xstart_from_v(self, x_t, t, v):
        return (
            self._extract("sqrt_alphas_cumprod", t, x_t) * x_t
            - self._extract("sqrt_one_minus_alphas_cumprod", t, x_t) * v
        )

    def _velocity(self, x_start, t, noise):
        return (
            self._extract("sqrt_alphas_cumprod", t, x_start) * noise
            - self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start
        )

    # ------------------------------------------------------------ reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t) and the prediction of x_0.

        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before the clipping.
        :return: dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each of x's shape.
        """
        return self._interpret(model(x, t, **(model_kwargs or {})), x, t, clip_denoised, denoised_fn)

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
        gradient = cond_fn(x, t, **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """`p_mean_var` with its score shifted by a classifier's gradient (ADM, algorithm 2; Song et al. 2020)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = cond_fn(x, t, **(model_kwargs or {}))
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

    def p_sample_loop(self, model, shape, **options):
        """Samples of `shape` by all ancestral steps; options as in `p_sample_loop_progressive`."""
        return _last(self.p_sample_loop_progressive(model, shape, **options))

    def p_sample_loop_progressive(self, model, shape, noise=None, device=None, progress=False, **step_options):
        """Yields `p_sample`'s dict after every step.

        :param shape: (N, C, ...) of the samples.
        :param noise: x_T; drawn where it is not given.
        :param device: where x_T is drawn; the model's by default.
        :param progress: show a bar.
        :param step_options: `clip_denoised, denoised_fn, cond_fn, model_kwargs, randn_like`, as in `p_sample`.
        """
        yield from self._loop(self.p_sample, model, shape, noise, device, progress, step_options)

    def _loop(self, step, model, shape, noise, device, progress, step_options):
        if device is None:
            device = noise.device if noise is not None else next(model.parameters()).device
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in tqdm(range(self.num_timesteps)[::-1], disable=not progress):
            t = torch.full((shape[0],), i, dtype=torch.long, device=device)
            with torch.no_grad():
                out = step(model, x, t, **step_options)
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
        """One step of the deterministic ODE the other way, from x_t to x_{t+1} (eta must be 0)."""
        if eta != 0.0:
            raise UserError(f"eta is {eta}: the reverse ODE is deterministic, so eta must be 0")
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = self._extract("alphas_cumprod_next", t, x)
        sample = out["pred_xstart"] * alpha_bar_next.sqrt() + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(self, model, shape, **options):
        """Samples of `shape` by DDIM; options as in `ddim_sample_loop_progressive`."""
        return _last(self.ddim_sample_loop_progressive(model, shape, **options))

    def ddim_sample_loop_progressive(self, model, shape, noise=None, device=None, progress=False, **step_options):
        """Yields `ddim_sample`'s dict after every step; options as in `p_sample_loop_progressive`, and `eta`."""
        yield from self._loop(self.ddim_sample, model, shape, noise, device, progress, step_options)

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
        model_output = model(x_t, t, **(model_kwargs or {}))

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
                output = model(x_t, t, **(model_kwargs or {}))
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
