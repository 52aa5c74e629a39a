"""The forward process of a Gaussian diffusion: coefficients, noisy samples, conversions between eps, x_0 and v.

Ho et al. 2020 (DDPM), Salimans & Ho 2022 (v-prediction). The names are those of ADM's `guided_diffusion`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .utils.errors import UserError


class ForwardProcess:
    """q(x_t | x_0) of one noise schedule, and the posterior q(x_{t-1} | x_t, x_0).

    In all methods, `x_start`, `x_t` and `noise` are (N, C, ...) floats, and `t` is (N,) int64 in [0, num_timesteps).
    The coefficient tables are attributes with ADM's names: float64 numpy arrays with num_timesteps entries.

    :param betas: noise variances, in (0, 1].
    :raises UserError: for betas outside (0, 1].
    """

    def __init__(self, betas: np.ndarray | Sequence[float]):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise UserError(
                f"betas must be a 1-D array of numbers in (0, 1], but have the shape {betas.shape}: {betas}"
            )
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
        # The variance is 0 at t = 0, so its logarithm there is that of t = 1 (of beta, if there is only one step).
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)

        # FIXED_LARGE: beta, except at t = 0, where the small variance gives a better likelihood (as in DDPM's code).
        self.fixed_large_variance = np.append(first, betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)

    def _extract(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries of the table `name` at t as float32, shaped to broadcast against `like`.

        A copy of each table is kept on every device that was asked for.
        """
        key = name, t.device
        if key not in self._device_tables:
            self._device_tables[key] = torch.from_numpy(getattr(self, name)).float().to(t.device, non_blocking=True)
        return self._device_tables[key][t].view(-1, *[1] * (like.ndim - 1))

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), of x_start's shape."""
        mean = self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self._extract("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        variance = 1.0 - self._extract("alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, variance, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of q(x_t | x_0), of x_start's shape.

        :param noise: the standard normal noise to add; None draws it.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        return (
            self._extract("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), of x_t's shape."""
        mean = (
            self._extract("posterior_mean_coef1", t, x_t) * x_start
            + self._extract("posterior_mean_coef2", t, x_t) * x_t
        )
        variance = self._extract("posterior_variance", t, x_t).expand_as(x_t)
        log_variance = self._extract("posterior_log_variance_clipped", t, x_t).expand_as(x_t)
        return mean, variance, log_variance

    # ------------------------------------------------------------ conversions between predictions

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return (
            self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._extract("sqrt_recipm1_alphas_cumprod", t, x_t) * eps
        )

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return (self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t - pred_xstart) / self._extract(
            "sqrt_recipm1_alphas_cumprod", t, x_t
        )

    def _predict_xstart_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return (
            self._extract("sqrt_alphas_cumprod", t, x_t) * x_t
            - self._extract("sqrt_one_minus_alphas_cumprod", t, x_t) * v
        )

    def _velocity(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (
            self._extract("sqrt_alphas_cumprod", t, x_start) * noise
            - self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start
        )
