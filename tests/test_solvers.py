"""Solvers on a distribution whose denoiser is known in closed form, and their steps."""

import numpy as np
import pytest
import torch

from masked_diffusion import create_diffusion
from masked_diffusion.sample_config import SOLVERS_OF
from masked_diffusion.sampling.image_sampler import last_sample
from masked_diffusion.sampling.solvers import SCHEDULERS, create_solver

MEAN, STD = 0.7, 0.5
FULL = create_diffusion()


def gaussian_denoiser(predict="eps", learned=True):
    """The exact prediction for data of N(MEAN, STD^2), and a learned variance that must not matter to an ODE."""
    alpha_bar = torch.from_numpy(FULL.alphas_cumprod).float()

    def denoise(x, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        x_start = MEAN + a.sqrt() * STD**2 / (a * STD**2 + 1 - a) * (x - a.sqrt() * MEAN)
        eps = (x - a.sqrt() * x_start) / (1 - a).sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x_start
        out = {"eps": eps, "x_start": x_start, "v": v}[predict]
        return torch.cat([out, torch.zeros_like(out)], dim=1) if learned else out

    return denoise


def draw(solver, denoise, num=2000, **options):
    noise = torch.randn(num, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    options |= {"randn_like": lambda x: torch.randn(x.shape, generator=generator)}
    return noise, last_sample(solver.progressive(denoise, noise, **options))


@pytest.mark.parametrize(
    "name, steps", [("ddpm", 250), ("ddim", 250), ("dpm++", 50), ("sde-dpm++", 50), ("unipc", 50), ("heun", 50)]
)
def test_samples_have_the_mean_and_deviation_of_the_data(name, steps):
    noise, samples = draw(create_solver(name, steps, {}), gaussian_denoiser())
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.02)
    if name not in ("ddpm", "sde-dpm++"):  # the ODE is linear here: it maps noise to MEAN + STD noise
        np.testing.assert_allclose(samples.numpy(), MEAN + STD * noise.numpy(), atol=0.03)


def test_higher_orders_need_fewer_steps():
    errors = {}
    for name in ("euler", "heun", "dpm++", "unipc"):
        noise, samples = draw(create_solver(name, 25, {}), gaussian_denoiser(), num=200)
        errors[name] = (samples - MEAN - STD * noise).abs().max().item()
    assert max(errors["heun"], errors["dpm++"], errors["unipc"]) < errors["euler"] / 3, errors


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("predict, config", [("x_start", {"predict_xstart": True}), ("v", {"predict_v": True})])
def test_every_prediction_gives_the_same_samples(name, predict, config):
    _, expected = draw(create_solver(name, 8, {}), gaussian_denoiser(), num=20)
    _, samples = draw(create_solver(name, 8, config), gaussian_denoiser(predict), num=20)
    torch.testing.assert_close(samples, expected, atol=2e-3, rtol=0)
    plain = create_solver(name, 8, {"learn_sigma": False})
    torch.testing.assert_close(draw(plain, gaussian_denoiser(learned=False), num=20)[1], expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_lie_on_the_trained_schedule(name):
    for steps in (1, 7, 61, 250, 999):
        timesteps = create_solver(name, steps, {}).make_scheduler("cpu").timesteps
        assert len(timesteps.unique()) == steps and timesteps[0] == 999 and timesteps.min() >= 0
        assert torch.equal(timesteps, timesteps.round())


def test_ddim_is_the_packages_own():
    noise = torch.randn(4, 1, 1, 1)
    ours = last_sample(create_solver("ddim", "ddim25", {}).progressive(gaussian_denoiser(), noise))
    direct = create_diffusion("ddim25").ddim_sample_loop(
        gaussian_denoiser(), noise.shape, noise=noise, clip_denoised=False
    )
    assert torch.equal(ours, direct)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_clipping_reaches_every_step(name):
    _, samples = draw(create_solver(name, 10, {}), gaussian_denoiser(), num=200)
    _, clipped = draw(create_solver(name, 10, {}), gaussian_denoiser(), num=200, clip_denoised=True)
    assert samples.max() > 1.2 and clipped.max() <= 1 + 1e-4


def test_every_solver_that_a_flag_offers_can_be_made():
    assert {name: create_solver(name, 5, {}).num_outputs for name in SOLVERS_OF["diffusion"]} == {
        name: 9 if name == "heun" else 5 for name in SOLVERS_OF["diffusion"]
    }


def test_wrong_names_and_steps_are_refused():
    with pytest.raises(ValueError, match=r"--solver is 'fast': choose one of ddpm, ddim, dpm\+\+"):
        create_solver("fast", 10, {})
    for steps in ("10,20", "ddim50", 0, 1000, "-3"):
        with pytest.raises(ValueError, match="solver heun takes one number from 1 to 999"):
            create_solver("heun", steps, {})
    for steps in ("0", "fast", "1001", "ddim49"):
        with pytest.raises(ValueError, match=r"^--num_sampling_steps is "):
            create_solver("ddim", steps, {})
    assert set(SCHEDULERS) | {"ddpm", "ddim"} == set(SOLVERS_OF["diffusion"])
