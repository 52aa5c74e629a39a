"""Flow matching on the linear path between data and noise: the training loss, and the steps of its solvers.

Lipman et al. 2023 ("Flow matching for generative modeling"), Ma et al. 2024 (SiT). With time t from 0 (data) to 1
(noise), x_t = (1 - t) x_start + t noise, and the network predicts the velocity v = d x_t / dt = noise - x_start.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .diffusion_utils import mean_flat
from .utils.errors import UserError

NUM_TIMESTEPS = 1000  # the network is given 1000 t, so that embedding and guidance rules mean what they do in diffusion
LAST_SDE_STEP = 0.04
T_SAMPLINGS = ("uniform", "logit-normal")


class FlowMatching:
    """The linear path and its training loss; it takes the place of a `GaussianDiffusion` in training.

    In all methods, `x_start`, `x_t` and `noise` are (N, C, ...) floats and `t` is (N,) float timesteps in
    (0, num_timesteps), as the network gets them: 1000 times the time of the equations.

    :param t_sampling: one of `T_SAMPLINGS`.
    :raises UserError: for another one.
    """

    num_timesteps = NUM_TIMESTEPS

    def __init__(self, t_sampling: str = "uniform"):
        if t_sampling not in T_SAMPLINGS:
            raise UserError(f"t_sampling is {t_sampling!r}: choose one of {', '.join(T_SAMPLINGS)}")
        self.t_sampling = t_sampling

    def draw_timesteps(
        self, batch_size: int, device: torch.device | str, rand: Callable[..., Tensor] = torch.rand
    ) -> Tensor:
        """Draw timesteps: t uniform, or logit-normal, where logit(t) is N(0, 1) (Esser et al. 2024, sec. 3.1).

        :param rand: `rand(batch_size, device=device)` draws the uniform numbers in [0, 1).
        :return: (batch_size,) float32 in (0, num_timesteps).
        """
        time = rand(batch_size, device=device).clamp(min=2.0**-25)  # half of the smallest number that `rand` draws
        if self.t_sampling == "logit-normal":
            # A CPU's sigmoid rounds the last numbers of a tensor otherwise: in float64 that does not show.
            time = torch.special.ndtri(time.double()).sigmoid().float()
        return time * self.num_timesteps

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = (1 - t) x_start + t noise; of x_start's shape.

        :param noise: None draws it.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        return add_noise(x_start, (t / self.num_timesteps).view(-1, *[1] * (x_start.ndim - 1)), noise)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of each sample, from one call of the model: the MSE of the velocity, without a weight.

        :param model: `model(x_t, t, **model_kwargs)` returns (N, C, ...).
        :param noise: None draws it.
        :return: dict of (N,) `mse` and `loss`, which are the same.
        :raises UserError: if the model's output has another shape than x_start.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        velocity = model(self.q_sample(x_start, t, noise), t, **(model_kwargs or {}))
        check_velocity(velocity, x_start)
        mse = mean_flat((noise - x_start - velocity) ** 2)
        return {"mse": mse, "loss": mse}


def check_velocity(velocity: Tensor, x: Tensor) -> None:
    """Refuse the output of a model that was not made for flow matching.

    :raises UserError: if it has not the shape of x.
    """
    if velocity.shape != x.shape:
        raise UserError(
            f"the model returned {tuple(velocity.shape)} for an input of {tuple(x.shape)}, but flow matching has no "
            "learned variance: create the model with learn_sigma=False"
        )


def add_noise(x_start: Tensor, time: Tensor | float, noise: Tensor) -> Tensor:
    """x_t = (1 - t) x_start + t noise."""
    return (1 - time) * x_start + time * noise


def renoise(x: Tensor, time: float, later: float, noise: Tensor) -> Tensor:
    """From x at a time to x at a later, noisier one: what `add_noise` with independent noise leads to.

    Scaled by a = (1 - later) / (1 - time), x has the right share of the data and noise of variance a^2 time^2; the rest
    of later^2 is added.
    """
    scale = (1 - later) / (1 - time)
    return scale * x + (later**2 - (scale * time) ** 2) ** 0.5 * noise


# ---------------------------------------------------------------- solvers: one function per algorithm


class Prediction(NamedTuple):
    """What a network predicts at one time.

    :param velocity: (N, C, ...). :param x_start: (N, C, ...) x - t velocity, the data at the end of the straight line.
    """

    velocity: Tensor
    x_start: Tensor


Predict = Callable[[Tensor, float], Prediction]  # of x and a time in (0, 1]
RandnLike = Callable[[Tensor], Tensor]


def euler_step(predict: Predict, x: Tensor, time: float, following: float, randn_like: RandnLike) -> dict[str, Tensor]:
    """One step of Euler's method on the ODE dx = v dt (SiT, sec. 2.1): first order, one evaluation.

    :param time, following: of x and of the result, 1 >= time > following >= 0.
    :param randn_like: not called.
    :return: dict of `sample` and `pred_xstart`, each of x's shape.
    """
    now = predict(x, time)
    return {"sample": x + (following - time) * now.velocity, "pred_xstart": now.x_start}


def heun_step(predict: Predict, x: Tensor, time: float, following: float, randn_like: RandnLike) -> dict[str, Tensor]:
    """One step of Heun's method on the same ODE (Karras et al. 2022, algorithm 1): second order, two evaluations.

    As there, the step to time 0 is one of Euler's: the network has not been trained at 0, and one step of first order
    leaves the order of the whole at two. Arguments: see `euler_step`.
    """
    now = predict(x, time)
    sample = x + (following - time) * now.velocity
    if following > 0:
        then = predict(sample, following)
        sample = x + (following - time) * (now.velocity + then.velocity) / 2
    return {"sample": sample, "pred_xstart": now.x_start}


def sde_step(predict: Predict, x: Tensor, time: float, following: float, randn_like: RandnLike) -> dict[str, Tensor]:
    """One Euler-Maruyama step on the reverse SDE with the marginals of the ODE (SiT, sec. 2.2, w_t = sigma_t = t).

    dx = (v - w score / 2) dt + sqrt(w) dW backwards in time. The score is -((1 - t) v + x) / t, so that w score has
    no pole at 0. The step to time 0 has no noise, as in SiT. Arguments: see `euler_step`.

    :param randn_like: draws the noise of the step.
    """
    now, step = predict(x, time), time - following
    weighted_score = -((1 - time) * now.velocity + x)
    noise = randn_like(x)
    sample = x - step * (now.velocity - weighted_score / 2)
    if following > 0:
        sample = sample + (time * step) ** 0.5 * noise
    return {"sample": sample, "pred_xstart": now.x_start}


def even_times(num_steps: int) -> list[float]:
    """1 to 0 in even steps: num_steps + 1 times."""
    return [1 - i / num_steps for i in range(num_steps)] + [0.0]


def sde_times(num_steps: int) -> list[float]:
    """1 to 0.04 in even steps, then 0, as in SiT: num_steps + 1 times."""
    if num_steps == 1:
        return [1.0, 0.0]
    return [1 - (1 - LAST_SDE_STEP) * i / (num_steps - 1) for i in range(num_steps)] + [0.0]


# name: the step, and its times for a number of steps
FLOW_STEPS = {
    "flow-euler": (euler_step, even_times),
    "flow-heun": (heun_step, even_times),
    "flow-sde": (sde_step, sde_times),
}
