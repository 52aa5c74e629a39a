import numpy as np
import pytest
import torch

from masked_diffusion import create_diffusion
from masked_diffusion.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler

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


class Late(UniformSampler):
    """Draws the later timesteps more often."""

    def weights(self):
        return np.arange(1.0, 11.0)


class LateByAttribute(UniformSampler):
    def __init__(self, diffusion):
        super().__init__(diffusion)
        self._weights = 3 * np.arange(1.0, diffusion.num_timesteps + 1)


@pytest.mark.parametrize("make", [Late, LateByAttribute])
def test_a_subclass_of_the_uniform_sampler_draws_by_its_weights(make):
    torch.manual_seed(0)
    t, weights = make(DIFFUSION).sample(50_000, "cpu")
    p = np.arange(1, 11) / 55
    np.testing.assert_allclose(np.bincount(t) / 50_000, p, atol=0.01)
    np.testing.assert_allclose(weights, 1 / (10 * p[t]), rtol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_weights_are_numpys_as_published(name):
    w = create_named_schedule_sampler(name, DIFFUSION).weights()
    p = w / np.sum(w)
    assert type(p) is np.ndarray and p.dtype == np.float64 and np.random.choice(10, size=3, p=p).shape == (3,)
    np.testing.assert_allclose(p, 0.1)


def test_second_moment_is_uniform_until_it_has_seen_enough():
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=2)
    sampler.update_with_local_losses(torch.arange(10), torch.rand(10))
    np.testing.assert_array_equal(sampler.weights(), np.ones(10))


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
    assert sampler._loss_history[7].tolist() == [2, 3, 4]


def test_state_is_saved_and_restored():
    restored = create_named_schedule_sampler("loss-second-moment", DIFFUSION)
    with pytest.raises(RuntimeError, match="must match the size"):
        restored.load_state_dict(warmed_up().state_dict())  # another history length
    restored = LossSecondMomentResampler(DIFFUSION, history_per_term=4)
    restored.load_state_dict(warmed_up().state_dict())
    np.testing.assert_array_equal(restored.weights(), warmed_up().weights())


def test_adms_attributes_are_saved_and_set_by_forks():
    sampler, restored = warmed_up(), LossSecondMomentResampler(DIFFUSION, history_per_term=4)
    assert sampler._warmed_up() and not restored._warmed_up() and restored.diffusion is DIFFUSION
    np.testing.assert_array_equal(sampler._loss_history, np.tile(1.0 + np.arange(10)[:, None], 4))
    assert sampler._loss_counts.tolist() == [4] * 10
    restored._loss_history, restored._loss_counts = sampler._loss_history.copy(), sampler._loss_counts.copy()
    np.testing.assert_array_equal(restored.weights(), sampler.weights())
    assert torch.equal(restored.state_dict()["loss_history"], sampler.state_dict()["loss_history"])


def test_unknown_sampler():
    with pytest.raises(ValueError, match="schedule_sampler is 'cosine'"):
        create_named_schedule_sampler("cosine", DIFFUSION)
