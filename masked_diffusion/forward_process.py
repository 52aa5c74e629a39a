"""The forward process of a Gaussian diffusion: its tables, its draws, and what noise, x_0 and v say of each other.

Ho et al. 2020 (DDPM), Salimans & Ho 2022 (v). Names are those of ADM's `guided_diffusion`.
"""

import numpy as np
import torch

from .utils.errors import UserError


class ForwardProcess:
    """q(x_t | x_0) of one noise schedule, and the posterior q(x_{t-1} | x_t, x_0).

    Everywhere: `x_start`, `x_t`, `noise` are (N, C, ...) floats; `t` is (N,) int64 in [0, num_timesteps). Tables are
    float64 numpy arrays of num_timesteps entries under ADM's names.

    :param betas: noise variances, in (0, 1].
    :raises UserError: for betas outside (0, 1].
    """

    def __init__(self, betas):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise UserError(f"betas must be one row of numbers in (0, 1], got shape {betas.shape}: {betas}")
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
