"""Parity with the published diffusion, and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from fill import tensor

from masked_diffusion import create_diffusion
from masked_diffusion.diffusion_utils import discretized_gaussian_log_likelihood, normal_kl
from masked_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from masked_diffusion.respace import SpacedDiffusion, space_timesteps

X, NOISE = tensor("x", (2, 4, 8, 8)), tensor("noise", (2, 4, 8, 8))
OPTIONS = [{}, {"learn_sigma": False}, {"learn_sigma": False, "sigma_small": True}, {"use_kl": True},
           {"noise_schedule": "squaredcos_cap_v2"}]  # fmt: skip


def network(x, t, **kwargs):
    return torch.cat([0.3 * x + 1e-5 * t.view(-1, 1, 1, 1).float(), 0.2 * torch.tanh(x)], dim=1)


def network_mean(x, t, **kwargs):
    return network(x, t)[:, : x.shape[1]]


def close(ours, golden, rtol=1e-5):
    np.testing.assert_allclose(np.asarray(ours), golden, rtol=rtol, atol=rtol * np.abs(golden).max())


# ---------------------------------------------------------------- parity


def test_schedules_and_spacing(golden):
    vectors = golden("diffusion")
    for name in ("linear", "squaredcos_cap_v2"):
        np.testing.assert_allclose(get_named_beta_schedule(name, 1000), vectors[f"betas/{name}"], rtol=1e-12)
    for key in (k for k in vectors.files if k.startswith("space/")):
        _, steps, counts = key.split("/")
        assert sorted(space_timesteps(int(steps), counts)) == vectors[key].tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_moments(options, golden):
    vectors, key = golden("diffusion"), json.dumps(options)
    diffusion = create_diffusion(**options)
    model = network if options.get("learn_sigma", True) else network_mean
    for t in (0, 500, 999):
        steps = torch.tensor([t, t])
        for term, value in diffusion.training_losses(model, X, steps, noise=NOISE).items():
            close(value, vectors[f"loss/{key}/{t}/{term}"])
        for term, value in diffusion.p_mean_variance(model, X, steps).items():
            close(value, vectors[f"pmv/{key}/{t}/{term}"])


def find_t(vectors, key):
    """The vectors of q(...) do not name their timesteps: they are those whose variance they hold."""
    alphas_cumprod = create_diffusion(**json.loads(key)).alphas_cumprod
    return torch.tensor([np.abs(1 - alphas_cumprod - v).argmin() for v in vectors[f"q/{key}/var"][:, 0, 0, 0]])


@pytest.mark.parametrize("options", OPTIONS[:3] + OPTIONS[4:], ids=str)
def test_forward_process(options, golden):
    vectors, key = golden("diffusion"), json.dumps(options)
    diffusion, t = create_diffusion(**options), find_t(vectors, key)
    for name, value in zip(("mean", "var", "logvar"), diffusion.q_mean_variance(X, t), strict=True):
        close(value, vectors[f"q/{key}/{name}"])
    close(diffusion.q_sample(X, t, NOISE), vectors[f"q_sample/{key}"])


@pytest.mark.parametrize("respacing", ["8", "ddim10"])
def test_sampling_loops_and_bound(respacing, golden):
    vectors, diffusion = golden("diffusion"), create_diffusion(respacing)
    for name, clip in (("p_sample_loop", False), ("p_sample_loop_clip", True)):
        torch.manual_seed(3)
        close(diffusion.p_sample_loop(network, X.shape, noise=X, clip_denoised=clip), vectors[f"{name}/{respacing}"])
    for eta in (0.0, 0.7):
        torch.manual_seed(3)
        out = diffusion.ddim_sample_loop(network, X.shape, noise=X, clip_denoised=False, eta=eta)
        close(out, vectors[f"ddim/{respacing}/{eta}"])
    torch.manual_seed(4)
    for name, value in diffusion.calc_bpd_loop(network, X).items():
        close(value, vectors[f"bpd/{respacing}/{name}"])


@pytest.mark.parametrize("respacing", ["8", "ddim10"])
def test_reverse_ode(respacing, golden):
    diffusion = create_diffusion(respacing)
    out = diffusion.ddim_reverse_sample(network, X, torch.tensor([3, 3]))
    close(out["sample"], golden("diffusion")[f"ddim_reverse/{respacing}"])


def test_reverse_ode_leads_back():
    diffusion = create_diffusion("ddim500")
    x = X
    for i in range(250):
        x = diffusion.ddim_reverse_sample(network, x, torch.tensor([i, i]), clip_denoised=False)["sample"]
    for i in range(1, 251)[::-1]:
        x = diffusion.ddim_sample(network, x, torch.tensor([i, i]), clip_denoised=False)["sample"]
    assert (x - X).abs().max() < 0.05


# ---------------------------------------------------------------- closed forms


def perfect(diffusion, x_start):
    """A network that knows the answer, for every kind of prediction."""

    def model(x, t, **kwargs):
        alpha_bar = torch.from_numpy(create_diffusion().alphas_cumprod)[t].float().view(-1, 1, 1, 1)
        eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        return {
            ModelMeanType.EPSILON: eps,
            ModelMeanType.START_X: x_start.expand_as(x),
            ModelMeanType.VELOCITY: alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_start,
        }[diffusion.model_mean_type]

    return model


PREDICTIONS = [{}, {"predict_xstart": True}, {"predict_v": True}]


@pytest.mark.parametrize("options", PREDICTIONS, ids=str)
def test_the_true_prediction_recovers_x_start(options):
    diffusion = create_diffusion("ddim50", learn_sigma=False, sigma_small=True, **options)
    x_start = X.clamp(-1, 1)
    for loop in (diffusion.ddim_sample_loop, diffusion.p_sample_loop):
        out = loop(perfect(diffusion, x_start), X.shape, noise=NOISE, clip_denoised=False)
        assert (out - x_start).abs().max() < 2e-4
    losses = diffusion.training_losses(perfect(diffusion, x_start), x_start, torch.tensor([0, 30]), noise=NOISE)
    assert losses["loss"].max() < 1e-6


@pytest.mark.parametrize("options", PREDICTIONS, ids=str)
def test_min_snr_weights_the_mse_only(options):
    t = torch.tensor([3, 700])
    losses = [
        create_diffusion(snr_gamma=gamma, **options).training_losses(network, X, t, noise=NOISE)
        for gamma in (5.0, None)
    ]
    alpha_bar = create_diffusion().alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    weight = np.minimum(snr, 5) / {"predict_xstart": np.ones(2), "predict_v": snr + 1}.get(next(iter(options), ""), snr)
    close((losses[0]["mse"] / losses[1]["mse"]).numpy(), weight)
    assert torch.equal(losses[0]["vb"], losses[1]["vb"])
    torch.testing.assert_close(losses[0]["loss"], losses[0]["mse"] + losses[0]["vb"])


def test_q_sample_has_the_stated_moments():
    diffusion, t = create_diffusion(), torch.full((200_000,), 300)
    draws = diffusion.q_sample(torch.full((200_000, 1), 0.7), t).double()
    alpha_bar = diffusion.alphas_cumprod[300]
    assert abs(draws.mean() - 0.7 * math.sqrt(alpha_bar)) < 5 * math.sqrt((1 - alpha_bar) / 200_000)
    assert abs(draws.var() / (1 - alpha_bar) - 1) < 5 * math.sqrt(2 / 200_000)


def test_posterior_is_bayes_rule():
    diffusion, t = create_diffusion(), 400
    beta, before = diffusion.betas[t], diffusion.alphas_cumprod[t - 1]
    # Precision-weighted product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}), both Gaussian in x_{t-1}
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * X / (1 - before) + math.sqrt(1 - beta) * NOISE / beta) / precision
    ours = diffusion.q_posterior_mean_variance(X, NOISE, torch.tensor([t, t]))
    close(ours[0], mean.numpy())
    close(ours[1], np.full(X.shape, 1 / precision))
    close(ours[2], np.full(X.shape, -math.log(precision)))


def test_kl_and_likelihood_against_torch_distributions():
    from torch.distributions import Normal, kl_divergence

    mean1, logvar1, mean2, logvar2 = (tensor(name, (64,)).double() for name in ("a", "b", "c", "d"))
    expected = kl_divergence(Normal(mean1, (0.5 * logvar1).exp()), Normal(mean2, (0.5 * logvar2).exp()))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), expected)
    with pytest.raises(ValueError, match="tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)

    levels = (torch.arange(256).double() - 127.5) / 127.5
    log_scales = torch.full_like(levels, math.log(0.1))
    log_p = discretized_gaussian_log_likelihood(levels, means=torch.full_like(levels, 0.2), log_scales=log_scales)
    assert abs(log_p.exp().sum() - 1) < 1e-6
    normal = Normal(torch.tensor(0.2).double(), 0.1)
    exact = (normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255))[100:200]
    torch.testing.assert_close(log_p.exp()[100:200], exact, rtol=0.05, atol=1e-4)
    with pytest.raises(ValueError, match="must match"):
        discretized_gaussian_log_likelihood(levels, means=levels[:1], log_scales=levels)


@pytest.mark.parametrize("respacing", ["8", "250", "ddim50", "10,15,20"])
def test_respaced_betas_keep_alphas_cumprod(respacing):
    full, spaced = create_diffusion(), create_diffusion(respacing)
    np.testing.assert_allclose(spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map], rtol=1e-12)
    assert spaced.original_num_steps == 1000 and spaced.num_timesteps == len(spaced.timestep_map)


def test_one_step_samples():
    out = create_diffusion("1").p_sample_loop(network, X.shape, noise=X)
    assert out.abs().max() <= 1


def test_bound_as_a_loss():
    t, betas = torch.tensor([0, 6]), np.linspace(0.1, 0.8, 8)
    terms = {
        kind: GaussianDiffusion(betas=betas, loss_type=kind).training_losses(network, X, t, noise=NOISE)
        for kind in LossType
    }
    close(terms[LossType.RESCALED_KL]["loss"], 8 * terms[LossType.KL]["loss"].numpy())
    close(terms[LossType.RESCALED_MSE]["vb"], 8 / 1000 * terms[LossType.MSE]["vb"].numpy())
    close(terms[LossType.KL]["loss"], terms[LossType.MSE]["vb"].numpy())


def test_the_bound_trains_the_variance_alone():
    output = network(X, torch.tensor([500, 500])).requires_grad_()
    create_diffusion().training_losses(lambda x, t: output, X, torch.tensor([500, 500]))["vb"].sum().backward()
    assert output.grad[:, :4].abs().max() == 0 and output.grad[:, 4:].abs().min() > 0


def test_a_classifiers_gradient_shifts_mean_and_score():
    diffusion = create_diffusion("ddim50")
    t, seen = torch.tensor([20, 20]), []

    def cond_fn(x, t, strength):
        seen.append(t.tolist())
        return strength * torch.ones_like(x)

    plain = diffusion.p_mean_variance(network, X, t, clip_denoised=False)
    shifted = diffusion.condition_mean(cond_fn, plain, X, t, {"strength": 2.0})
    close(shifted, (plain["mean"] + 2 * plain["variance"]).numpy())
    score = diffusion.condition_score(cond_fn, plain, X, t, {"strength": 2.0})
    alpha_bar = diffusion.alphas_cumprod[20]
    close(score["pred_xstart"], (plain["pred_xstart"] + 2 * (1 - alpha_bar) / math.sqrt(alpha_bar)).numpy(), 1e-4)
    assert seen == [[diffusion.timestep_map[20]] * 2] * 2
    guided = diffusion.ddim_sample_loop(
        lambda x, t, strength: network(x, t), X.shape, noise=X, cond_fn=cond_fn, model_kwargs={"strength": 2.0}
    )
    assert guided.mean() > diffusion.ddim_sample_loop(network, X.shape, noise=X).mean()


def test_noise_can_come_from_elsewhere():
    diffusion = create_diffusion("8")
    silent = diffusion.p_sample_loop(network, X.shape, noise=X, randn_like=torch.zeros_like)
    assert torch.equal(silent, diffusion.p_sample_loop(network, X.shape, noise=X, randn_like=torch.zeros_like))
    assert not torch.equal(silent, diffusion.p_sample_loop(network, X.shape, noise=X))


def test_model_and_diffusion_must_agree_on_the_variance():
    with pytest.raises(ValueError, match="same learn_sigma"):
        create_diffusion().training_losses(network_mean, X, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="same learn_sigma"):
        create_diffusion(learn_sigma=False).training_losses(network, X, torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create_diffusion("ddim333"), "choose another ddim count"),
        (lambda: create_diffusion("2000"), "asks for 2000 of the 1000 steps"),
        (lambda: create_diffusion("0"), "asks for 0"),
        (lambda: create_diffusion("fast"), "timestep_respacing is 'fast'"),
        (lambda: create_diffusion(noise_schedule="sqrt"), "noise_schedule is 'sqrt'"),
        (lambda: create_diffusion(predict_v=True, predict_xstart=True), "both set"),
        (lambda: create_diffusion(snr_gamma=-1.0), "snr_gamma is -1.0"),
        (lambda: GaussianDiffusion(betas=[0.1, 0.0]), "betas must be"),
        (lambda: SpacedDiffusion([7], betas=[0.1]), "use_timesteps"),
        (
            lambda: create_diffusion().ddim_reverse_sample(network, X, torch.tensor([1, 1]), eta=0.5),
            "eta must be 0",
        ),
    ],
)
def test_bad_options_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_variance_types():
    assert create_diffusion(learn_sigma=False).model_var_type == ModelVarType.FIXED_LARGE
    small = create_diffusion(learn_sigma=False, sigma_small=True)
    out = small.p_mean_variance(network_mean, X, torch.tensor([0, 9]))
    close(out["variance"][:, 0, 0, 0], small.posterior_variance[[0, 9]])
