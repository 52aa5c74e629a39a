"""The reverse process of a Gaussian diffusion: from a network's output to p(x_{t-1} | x_t).

Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (improved DDPM), Dhariwal & Nichol 2021 (ADM). The names and the order of
the arguments are those of ADM's `guided_diffusion`.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .forward_process import ForwardProcess
from .utils.errors import UserError


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    EPSILON = "eps"
    START_X = "x_start"
    PREVIOUS_X = "x_prev"  # in ADM only: `GaussianDiffusion` refuses it
    VELOCITY = "v"  # v = sqrt(alphas_cumprod) eps - sqrt(1 - alphas_cumprod) x_start (Salimans & Ho 2022)


class ModelVarType(enum.Enum):
    """Where the variance of the reverse process comes from."""

    LEARNED_RANGE = "learned_range"  # learned: the second half of the output interpolates between the two fixed ones
    FIXED_SMALL = "fixed_small"  # the variance of the posterior q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = "fixed_large"  # beta
    LEARNED = "learned"  # in ADM only: `GaussianDiffusion` refuses it


class ReverseProcess(ForwardProcess):
    """p(x_{t-1} | x_t) of a network, with or without the gradient of a classifier.

    Shapes are those of `GaussianDiffusion`, which adds sampling loops and losses.

    :param betas: noise variances, in (0, 1].
    :param rescale_timesteps: give models and `cond_fn`s the float t * 1000 / num_timesteps, as ADM's first models had.
    :raises UserError: for betas outside (0, 1], and for `PREVIOUS_X` and `LEARNED`.
    """

    def __init__(
        self,
        betas: np.ndarray | Sequence[float],
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        rescale_timesteps: bool,
    ):
        if model_mean_type == ModelMeanType.PREVIOUS_X:
            raise UserError(
                "models that predict x_{t-1} (PREVIOUS_X) are not rebuilt: use EPSILON, START_X or VELOCITY"
            )
        if model_var_type == ModelVarType.LEARNED:
            raise UserError(
                "variances without bounds (LEARNED) are not rebuilt: use LEARNED_RANGE (create_diffusion: learn_sigma)"
            )
        super().__init__(betas)
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.rescale_timesteps = rescale_timesteps

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The (N,) timesteps that models and `cond_fn`s get for the (N,) steps `t` of this process."""
        return self._scale_timesteps(t)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """What ADM's own methods give a model instead of `t`; overrides of them in users' scripts call this."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def p_mean_variance(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) and the prediction of x_0.

        :param clip_denoised: clip the predicted x_0 to [-1, 1].
        :param denoised_fn: a function applied to the predicted x_0 before it is clipped.
        :return: dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each of x's shape. Of a model that returns
            a tuple (output, extra), also `extra`.
        :raises UserError: if the model's output has the wrong shape.
        """
        output = self._call(model, x, t, model_kwargs)
        output, *extra = output if isinstance(output, tuple) else (output,)
        prediction, variance_values = self._split_output(output, x)
        variance, log_variance = self._variance(variance_values, x, t)
        pred_xstart = self._pred_xstart(prediction, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        out = {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}
        return out | {"extra": extra[0]} if extra else out

    def _call(self, function: Callable[..., Tensor], x: Tensor, t: Tensor, kwargs: Mapping[str, Any] | None) -> Tensor:
        """The output of a model or a `cond_fn` at the steps `t` of this process."""
        return function(x, self.model_timesteps(t), **(kwargs or {}))

    def _split_output(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a model's output into the prediction and the variance values (None without a learned variance).

        :raises UserError: if the output has the wrong shape.
        """
        factor = 2 if self.model_var_type == ModelVarType.LEARNED_RANGE else 1
        expected = (x.shape[0], factor * x.shape[1], *x.shape[2:])
        if model_output.shape != expected:
            raise UserError(
                f"the model returned {tuple(model_output.shape)} for an input of {tuple(x.shape)}, but this diffusion "
                f"({self.model_var_type.name}) needs {expected}: give model and diffusion the same learn_sigma"
            )
        return model_output.chunk(2, dim=1) if factor == 2 else (model_output, None)

    def _variance(self, variance_values: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log variance of p(x_{t-1} | x_t), of x's shape."""
        fixed = {
            ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
            ModelVarType.FIXED_LARGE: ("fixed_large_variance", "fixed_large_log_variance"),
        }
        if self.model_var_type in fixed:
            return tuple(self._extract(name, t, x).expand_as(x) for name in fixed[self.model_var_type])
        # Improved DDPM, eq. 15; the network's values lie in [-1, 1], the equation's fraction in [0, 1].
        fraction = (variance_values + 1) / 2
        low, high = self._extract("posterior_log_variance_clipped", t, x), self._extract("log_betas", t, x)
        log_variance = fraction * high + (1 - fraction) * low
        return log_variance.exp(), log_variance

    def _pred_xstart(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The x_0 that follows from what the network predicts."""
        if self.model_mean_type == ModelMeanType.START_X:
            return prediction
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return self._predict_xstart_from_v(x, t, prediction)
        return self._predict_xstart_from_eps(x, t, prediction)

    def condition_mean(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The mean, shifted by the gradient of a classifier (ADM, algorithm 1); for ancestral sampling.

        :param cond_fn: `cond_fn(x, t, **model_kwargs)` returns the gradient of log p(y | x), of x's shape.
        :param p_mean_var: what `p_mean_variance` returned.
        """
        gradient = self._call(cond_fn, x, t, model_kwargs)
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: Mapping[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """`p_mean_var` with the score shifted by the gradient of a classifier (ADM, algorithm 2); for DDIM.

        Arguments are those of `condition_mean`.
        """
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = self._call(cond_fn, x, t, model_kwargs)
        eps = eps - self._extract("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}
