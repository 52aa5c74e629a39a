"""How training draws timesteps."""

import torch

from . import dist_util
from .utils.errors import UserError


def create_named_schedule_sampler(name, diffusion):
    """A timestep sampler by name: `uniform` or `loss-second-moment`."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name not in samplers:
        raise UserError(f"schedule_sampler is {name!r}: choose one of {', '.join(samplers)}")
    return samplers[name](diffusion)


class ScheduleSampler:
    """A distribution over timesteps, with the importance weights that keep the loss unbiased."""

    def __init__(self, diffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self):
        """(num_timesteps,) float64 positive weights, not normalised; a tensor, or in ADM's way a numpy array."""
        raise NotImplementedError

    def sample(self, batch_size, device, rand=torch.rand):
        """
        :param rand: where the (batch_size,) uniform numbers on `device` come from.
        :return: (batch_size,) int64 timesteps, and (batch_size,) float32 weights of their losses.
        """
        p = torch.as_tensor(self.weights()).to(device)
        p = p / p.sum()
        uniform = rand(batch_size, device=device).double()
        t = torch.searchsorted(p.cumsum(0), uniform, right=True).clamp_(max=len(p) - 1)
        return t, (1 / (len(p) * p[t])).float()

    def update_with_local_losses(self, local_ts, local_losses):
        """Learn from this rank's (N,) timesteps and (N,) losses. All ranks call it together."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class UniformSampler(ScheduleSampler):
    def weights(self):
        return torch.ones(self.num_timesteps, dtype=torch.float64)

    def sample(self, batch_size, device, rand=torch.rand):
        t = (rand(batch_size, device=device).double() * self.num_timesteps).long()
        return t, torch.ones(batch_size, device=device)


class LossAwareSampler(ScheduleSampler):
    """A timestep sampler that learns from the losses of all ranks."""

    def update_with_local_losses(self, local_ts, local_losses):
        """Learn from every rank's (N,) timesteps and (N,) losses. All ranks call it together, with the same N."""
        ts = dist_util.all_gather_rows(local_ts)
        losses = dist_util.all_gather_rows(local_losses.detach())
        self.update_with_all_losses(ts.tolist(), losses.double().tolist())

    def update_with_all_losses(self, ts, losses):
        """Learn from two lists: timesteps, and their losses; the same on every rank."""
        raise NotImplementedError


class LossSecondMomentResampler(LossAwareSampler):
    """Timesteps in proportion to the root of their losses' second moment (improved DDPM, eq. 18).

    Uniform until every timestep has been seen `history_per_term` times.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        super().__init__(diffusion)
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self.loss_history = torch.zeros(self.num_timesteps, history_per_term, dtype=torch.float64)
        self.loss_counts = torch.zeros(self.num_timesteps, dtype=torch.int64)

    def weights(self):
        if (self.loss_counts < self.history_per_term).any():
            return torch.ones(self.num_timesteps, dtype=torch.float64)
        weights = self.loss_history.square().mean(dim=1).sqrt()
        weights = weights / weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts, losses):
        for t, loss in zip(ts, losses, strict=True):
            if self.loss_counts[t] == self.history_per_term:
                self.loss_history[t] = self.loss_history[t].roll(-1)
                self.loss_history[t, -1] = loss
            else:
                self.loss_history[t, self.loss_counts[t]] = loss
                self.loss_counts[t] += 1

    def state_dict(self):
        return {"loss_history": self.loss_history, "loss_counts": self.loss_counts}

    def load_state_dict(self, state):
        self.loss_history.copy_(state["loss_history"])
        self.loss_counts.copy_(state["loss_counts"])
