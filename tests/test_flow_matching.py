"""Flow matching in closed form: the loss, the times, and solvers on a Gaussian whose velocity is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from fill import fill

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.flow_matching import FLOW_STEPS, FlowMatching, add_noise, renoise, sde_times
from masked_diffusion.resample import create_named_schedule_sampler
from masked_diffusion.sampling.image_sampler import last_sample
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.utils.random_numbers import GlobalBatchRandom

MEAN, STD = 0.7, 0.5
FLOW = {"objective": "flow"}


def velocity(x, t):
    """E[noise - x_start | x_t = x] for data of N(MEAN, STD^2), where `t` is what the network is given."""
    time = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
    share = (x - (1 - time) * MEAN) / ((1 - time) ** 2 * STD**2 + time**2)
    return time * share - (MEAN + (1 - time) * STD**2 * share)


def solve(name, num_steps, noise, **options):
    generator = torch.Generator().manual_seed(1)
    options |= {"randn_like": lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)}
    return create_solver(name, num_steps, FLOW).progressive(velocity, noise, **options)


# ---------------------------------------------------------------- training


def test_the_loss_is_the_squared_error_of_the_velocity():
    x_start, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t, seen = torch.tensor([1.0, 400.0, 999.5]), {}

    def model(x, t, y):
        seen.update(x=x, t=t, y=y)
        return 2 * x

    terms = create_diffusion(objective="flow").training_losses(model, x_start, t, {"y": 7}, noise)
    time = (t / 1000)[:, None, None, None]
    assert torch.equal(seen["t"], t) and seen["y"] == 7
    torch.testing.assert_close(seen["x"], (1 - time) * x_start + time * noise)
    torch.testing.assert_close(terms["loss"], (noise - x_start - 2 * seen["x"]).square().mean((1, 2, 3)))
    assert torch.equal(terms["loss"], terms["mse"])
    with pytest.raises(ValueError, match=r"returned \(3, 4, 4, 4\) for an input of .*learn_sigma=False"):
        FlowMatching().training_losses(lambda x, t: torch.cat([x, x], 1), x_start, t)


@pytest.mark.parametrize("name", ["MDTv2_Nano_2", "MDT_Nano_2", "DiT_Nano_2"])
def test_both_passes_share_timesteps_and_latents(name):
    masked = {} if name.startswith("DiT") else {"mask_ratio": 0.3}
    model = fill(create_model(name, input_size=8, in_channels=3, num_classes=10, learn_sigma=False, **masked))
    flow = FlowMatching("logit-normal")
    module, x, y = TwoPassObjective(model, flow).train(), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    t, weights = create_named_schedule_sampler("uniform", flow).sample(4, "cpu")
    draws = module.draw(x)
    losses = module(x, t, y, **draws)
    full = {"y": y, "drop_labels": draws["drop_labels"]}
    expected = flow.training_losses(model, x, t, full, draws["noise"])["loss"]
    if masked:
        kwargs = {
            "y": y,
            "drop_labels": draws["masked_drop_labels"],
            "enable_mask": True,
            "ids_keep": draws["ids_keep"],
        }
        expected = expected + flow.training_losses(model, x, t, kwargs, draws["masked_noise"])["loss"]
    torch.testing.assert_close(losses["loss"], expected)
    assert torch.equal(weights, torch.ones(4)) and ("masked_loss" in losses) == bool(masked)
    losses["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, cdf", [
    ("uniform", lambda t: t),
    ("logit-normal", lambda t: torch.special.ndtr(torch.logit(t))),
])  # fmt: skip
def test_times_have_their_distribution_on_any_number_of_ranks(name, cdf):
    sampler = create_named_schedule_sampler("uniform", create_diffusion(objective="flow", t_sampling=name))

    def draw(num, rank, world_size):
        return sampler.sample(num, "cpu", GlobalBatchRandom(3, 5, "cpu", rank, world_size).rand)[0]

    t = draw(20000, 0, 1)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1000
    ranks = cdf((t / 1000).double()).sort().values  # uniform, if t has the distribution: Kolmogorov's bound for 1 %
    assert (ranks - torch.arange(1, 20001) / 20001).abs().max() < 1.63 / 20000**0.5
    assert torch.equal(t, torch.cat([draw(10000, rank, 2) for rank in range(2)]))
    extremes = FlowMatching(name).draw_timesteps(2, "cpu", lambda n, device: torch.tensor([0.0, 1 - 2.0**-24]))
    assert 0 < extremes[0] < extremes[1] < 1000


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="t_sampling is 'normal': choose one of uniform, logit-normal"):
        create_diffusion(objective="flow", t_sampling="normal")
    with pytest.raises(ValueError, match="objective is 'flows': choose diffusion or flow"):
        create_diffusion(objective="flows")
    with pytest.raises(ValueError, match="schedule_sampler is 'loss-second-moment': choose one of uniform"):
        create_named_schedule_sampler("loss-second-moment", FlowMatching())


# ---------------------------------------------------------------- solvers


@pytest.mark.parametrize("name, order", [("flow-euler", 1), ("flow-heun", 2)])
def test_the_error_falls_with_the_order_of_the_solver(name, order):
    noise, errors = torch.linspace(-3, 3, 50, dtype=torch.float64).view(-1, 1, 1, 1), []
    for num_steps in (16, 32, 64, 128):  # the ODE is linear: it maps noise to MEAN + STD noise
        errors.append((last_sample(solve(name, num_steps, noise)) - MEAN - STD * noise).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert np.abs(np.array(orders) / order - 1).max() < 0.1, orders


def test_the_sde_keeps_the_marginals_on_the_way():
    num, num_steps = 20000, 250
    noise = torch.randn(num, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for time, out in zip(sde_times(num_steps)[1:], solve("flow-sde", num_steps, noise), strict=True):
        variance = (1 - time) ** 2 * STD**2 + time**2
        mean, found = out["sample"].mean().item(), out["sample"].var().item()
        assert abs(mean - (1 - time) * MEAN) < 4 * (variance / num) ** 0.5, time
        assert abs(found / variance - 1) < 4 * (2 / num) ** 0.5, time
    assert time == 0.0


def test_the_last_step_of_the_sde_is_that_of_sit():
    times = sde_times(250)
    assert len(times) == 251 and times[0] == 1 and times[-2] == pytest.approx(0.04) and times[-1] == 0
    np.testing.assert_allclose(np.diff(times[:-1]), -0.96 / 249)
    *_, before, last = solve("flow-sde", 250, torch.randn(5, 1, 1, 1, dtype=torch.float64))
    x, v = before["sample"], velocity(before["sample"], torch.full((5,), 40.0))
    score = -((1 - 0.04) * v + x) / 0.04
    torch.testing.assert_close(last["sample"], x - 0.04 * (v - 0.04 * score / 2))
    assert sde_times(1) == [1.0, 0.0]


def test_noising_in_two_steps_is_noising_in_one():
    x, generator = torch.full((200_000,), 1.5, dtype=torch.float64), torch.Generator().manual_seed(0)
    first, second = torch.randn(2, *x.shape, dtype=torch.float64, generator=generator)
    for later in (0.8, 1.0):
        noised = renoise(add_noise(x, 0.3, first), 0.3, later, second)
        assert noised.mean().item() == pytest.approx((1 - later) * 1.5, abs=4 * later / 200_000**0.5)
        assert noised.var().item() == pytest.approx(later**2, rel=4 * (2 / 200_000) ** 0.5)
    assert torch.equal(renoise(x, 0.3, 1.0, second), second)


@pytest.mark.parametrize("name", FLOW_STEPS)
def test_predictions_end_in_the_data_and_are_clipped_on_request(name):
    noise = torch.randn(200, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    *_, last = solve(name, 20, noise)
    torch.testing.assert_close(last["pred_xstart"], last["sample"], atol=0.1, rtol=0)
    outs = list(solve(name, 20, noise, clip_denoised=True))
    assert all(out["pred_xstart"].abs().max() <= 1 for out in outs) and last["sample"].max() > 1.2
    assert outs[-1]["sample"].max() <= (1 + 1e-5 if name != "flow-sde" else 1.2)
    assert len(outs) == create_solver(name, 20, FLOW).num_outputs == 20


def test_the_network_is_asked_at_1000_t_and_never_at_0():
    asked = []

    def denoise(x, t):
        asked.append(t[0].item())
        return velocity(x, t)

    for name, times in (
        ("flow-euler", [1000, 750, 500, 250]),
        ("flow-heun", [1000, 750, 750, 500, 500, 250, 250]),
        ("flow-sde", [1000, 680, 360, 40]),
    ):
        asked.clear()
        last_sample(create_solver(name, "4", FLOW).progressive(denoise, torch.randn(1, 1, 1, 1)))
        np.testing.assert_allclose(asked, times, rtol=1e-6)


def test_solvers_of_another_objective_and_odd_steps_are_refused():
    with pytest.raises(
        ValueError, match="--solver is 'ddim', but the model was trained with --objective flow: choose one"
    ):
        create_solver("ddim", 10, FLOW)
    with pytest.raises(
        ValueError, match="'flow-sde', but the model was trained with --objective diffusion: choose one"
    ):
        create_solver("flow-sde", 10, {})
    for steps in ("10,20", "ddim50", 0, 1001):
        with pytest.raises(ValueError, match="solver flow-heun takes one number from 1 to 1000"):
            create_solver("flow-heun", steps, FLOW)
    with pytest.raises(ValueError, match=r"returned \(2, 2, 1, 1\) .*learn_sigma=False"):
        last_sample(
            create_solver("flow-euler", 2, FLOW).progressive(lambda x, t: torch.cat([x, x], 1), torch.ones(2, 1, 1, 1))
        )
