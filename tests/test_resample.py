import numpy as np
import pytest
import torch

from masked_diffusion import create_diffusion
from masked_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler

DIFFUSION = create_diffusion("10")


def warmed_up():
    """A sampler whose losses have a second moment of (1 + t)^2."""
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=4)
    for _ in range(6):
        sampler.update_with_local_losses(torch.arange(10), 1.0 + torch.arange(10))
    return sampler


def test_uniform_draws_every_step_alike():
    torch.manual_seed(0)
    t, weights = create_named_schedule_sampler("uniform", DIFFUSION).sample(50_000, "cpu")
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10 and np.abs(counts - 5000).max() < 5 * 5000**0.5
    assert torch.equal(weights, torch.ones(50_000))


def test_second_moment_is_uniform_until_it_has_seen_enough():
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=2)
    sampler.update_with_local_losses(torch.arange(10), torch.rand(10))
    assert torch.equal(sampler.weights(), torch.ones(10, dtype=torch.float64))


def test_second_moment_follows_the_losses_and_stays_unbiased():
    torch.manual_seed(0)
    sampler = warmed_up()
    p = 0.999 * np.arange(1, 11) / 55 + 0.001 / 10
    np.testing.assert_allclose(sampler.weights(), p)
    t, weights = sampler.sample(200_000, "cpu")
    np.testing.assert_allclose(np.bincount(t) / 200_000, p, atol=5e-3)
    np.testing.assert_allclose(weights, 1 / (10 * p[t]), rtol=1e-6)
    losses = 1.0 + t
    assert abs((losses * weights).mean() - 5.5) < 0.01


def test_second_moment_forgets_the_oldest():
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=3)
    for value in range(5):
        sampler.update_with_local_losses(torch.tensor([7]), torch.tensor([float(value)]))
    assert sampler.loss_history[7].tolist() == [2, 3, 4]


def test_state_is_saved_and_restored():
    restored = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
    with pytest.raises(RuntimeError, match="must match the size"):
        restored.load_state_dict(warmed_up().state_dict())  # another history length
    restored = LossSecondMomentResampler(DIFFUSION, history_per_term=4)
    restored.load_state_dict(warmed_up().state_dict())
    assert torch.equal(restored.weights(), warmed_up().weights())


def test_unknown_sampler():
    with pytest.raises(ValueError, match="schedule_sampler is 'cosine'"):
        create_named_schedule_sampler("cosine", DIFFUSION)
