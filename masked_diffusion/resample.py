"""Timestep samplers: how training draws the timestep of each sample."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .flow_matching import FlowMatching
from .gaussian_diffusion import GaussianDiffusion
from .utils.errors import UserError


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion | FlowMatching) -> "ScheduleSampler":
    """Create the timestep sampler of a name.

    :param name: `uniform` or `loss-second-moment`; for flow matching `uniform`: its `t_sampling` as it is.
    :raises UserError: for any other name.
    """
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if isinstance(diffusion, FlowMatching):
        samplers = {"uniform": FlowSampler}
    if name not in samplers:
        raise UserError(f"schedule_sampler is {name!r}: choose one of {', '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler:
    """A distribution over timesteps, with importance weights that keep the mean of the loss unbiased."""

    def __init__(self, diffusion: GaussianDiffusion | FlowMatching):
        self.diffusion, self.num_timesteps = diffusion, diffusion.num_timesteps

    def weights(self) -> np.ndarray | Tensor:
        """The relative probability of each timestep: (num_timesteps,) float64, not negative, of any sum."""
        raise NotImplementedError

    def sample(
        self, batch_size: int, device: torch.device | str, rand: Callable[..., Tensor] = torch.rand
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps.

        :param rand: `rand(batch_size, device=device)` draws the uniform numbers in [0, 1).
        :return: (batch_size,) timesteps, int64, or float32 of flow matching; and (batch_size,) float32 factors to
            multiply their losses by.
        """
        p = torch.as_tensor(self.weights()).to(device)
        p = p / p.sum()
        uniform = rand(batch_size, device=device).double()
        t = torch.searchsorted(p.cumsum(0), uniform, right=True).clamp_(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Adapt to the (N,) timesteps and (N,) losses of this rank. All ranks call it together."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the sampler; empty for a sampler that does not adapt."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""


class UniformSampler(ScheduleSampler):
    """All timesteps are equally likely, unless a subclass has other `weights`."""

    def __init__(self, diffusion: GaussianDiffusion):
        super().__init__(diffusion)
        self._weights = np.ones(self.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights

    def sample(
        self, batch_size: int, device: torch.device | str, rand: Callable[..., Tensor] = torch.rand
    ) -> tuple[Tensor, Tensor]:
        weights = torch.as_tensor(self.weights())
        if (weights != weights[0]).any():
            return super().sample(batch_size, device, rand)
        # Without the rounding of a cumulative sum, and what runs have drawn from their seeds since the beginning.
        t = (rand(batch_size, device=device).double() * len(weights)).long()
        return t, torch.ones(batch_size, device=device)


class FlowSampler(ScheduleSampler):
    """Fractional timesteps, from the distribution that a `FlowMatching` has."""

    def sample(
        self, batch_size: int, device: torch.device | str, rand: Callable[..., Tensor] = torch.rand
    ) -> tuple[Tensor, Tensor]:
        return self.diffusion.draw_timesteps(batch_size, device, rand), torch.ones(batch_size, device=device)


class LossAwareSampler(ScheduleSampler):
    """A timestep sampler that adapts to the losses of all ranks."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Gather the (N,) timesteps and (N,) losses of all ranks. All ranks call it together, with the same N."""
        ts = dist_util.all_gather_rows(local_ts)
        losses = dist_util.all_gather_rows(local_losses.detach())
        self.update_with_all_losses(ts.tolist(), losses.double().tolist())

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Adapt to timesteps and their losses, which are the same on every rank."""
        raise NotImplementedError


class LossSecondMomentResampler(LossAwareSampler):
    """Probabilities in proportion to the root mean square of each timestep's recent losses (improved DDPM, eq. 18).

    Until every timestep was drawn `history_per_term` times, all are equally likely.

    :param history_per_term: number of recent losses that are kept for each timestep.
    :param uniform_prob: share of the probability that is spread evenly over all timesteps.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(diffusion)
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self._loss_history = np.zeros((self.num_timesteps, history_per_term))
        self._loss_counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())

    def weights(self) -> np.ndarray:
        if not self._warmed_up():
            return np.ones(self.num_timesteps)
        # torch adds in another order than numpy, and runs resume bitwise.
        weights = torch.from_numpy(self._loss_history).square().mean(dim=1).sqrt()
        weights = weights / weights.sum()
        return (weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)).numpy()

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "loss_history": torch.from_numpy(self._loss_history),
            "loss_counts": torch.from_numpy(self._loss_counts),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, own in self.state_dict().items():  # which share the arrays' memory
            own.copy_(state[name])
