"""Sampling loops queue their work on the device and never wait for it."""

import pytest
import torch
from fill import tensor
from helpers import small_model
from mock_device import count_waits, module_to_device, to_device

from masked_diffusion.flow_matching import FLOW_STEPS
from masked_diffusion.guidance import Guidance, GuidedDenoiser
from masked_diffusion.sample_config import SOLVERS
from masked_diffusion.sampling.image_sampler import last_sample
from masked_diffusion.sampling.solvers import create_solver

GUIDANCE = Guidance("interval", 3.0, interval=(200, 700))
NOISE, Y = tensor("noise", (2, 3, 8, 8)), torch.tensor([1, 2])


class Tiny:
    """A model of one number per row, for a solver of diffusion or of flow matching."""

    null_label = 10

    def __init__(self, solver):
        self.learn_sigma = solver not in FLOW_STEPS

    def __call__(self, x, t, y):
        out = x * (y + t * 1e-3).view(-1, 1, 1, 1) * 0.01
        return torch.cat([out, out], dim=1) if self.learn_sigma else out


def make_solver(name, steps):
    return create_solver(name, steps, {"objective": "flow" if name in FLOW_STEPS else "diffusion"})


def draw(model, noise, y, solver, steps="50"):
    generator = torch.Generator().manual_seed(0)

    def randn_like(x):
        return torch.randn(x.shape, generator=generator).to(x.device, non_blocking=True)

    denoise = GuidedDenoiser(model, GUIDANCE, model.null_label)
    steps = make_solver(solver, steps).progressive(denoise, noise, True, {"y": y}, randn_like)
    return last_sample(steps)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fifty_guided_steps_copy_nothing_to_the_host(solver):
    with count_waits() as counter:
        sample = draw(Tiny(solver), to_device(NOISE), to_device(Y), solver)
    assert counter.waits == [] and counter.operations > 50 * 10
    assert torch.equal(sample.numbers, draw(Tiny(solver), NOISE, Y, solver))


@torch.no_grad()
def test_the_network_does_not_wait_either():
    expected = draw(small_model(), NOISE, Y, "ddpm", "5")
    model = module_to_device(small_model())
    with count_waits() as counter:
        sample = draw(model, to_device(NOISE), to_device(Y), "ddpm", "5")
    assert counter.waits == []
    torch.testing.assert_close(sample.numbers, expected, rtol=1e-4, atol=1e-4)


def test_a_denoiser_that_is_told_no_timestep_waits_once():
    denoise, x, y = GuidedDenoiser(Tiny("ddpm"), GUIDANCE, 10), to_device(NOISE), to_device(Y)
    with count_waits() as counter:
        t = to_device(torch.tensor([500, 500]))
        waiting = denoise(x, t, y)
        assert len(counter.waits) == 1
        told = denoise(x, t, y, timestep=500)
        assert len(counter.waits) == 1
    assert torch.equal(waiting.numbers, told.numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gpu_is_not_waited_for(solver):
    model, noise, y = small_model(learn_sigma=solver not in FLOW_STEPS).cuda(), NOISE.cuda(), Y.cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    denoise = GuidedDenoiser(model, GUIDANCE, model.null_label)
    options = {
        "model_kwargs": {"y": y},
        "randn_like": lambda x: torch.randn(x.shape, generator=generator, device="cuda"),
    }
    made = make_solver(solver, "50")
    last_sample(made.progressive(denoise, noise, **options))  # loads kernels and libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample = last_sample(made.progressive(denoise, noise, **options))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sample.isfinite().all()
