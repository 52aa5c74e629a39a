"""Power-function averages against direct sums, reconstructions against averages that were tracked, the script."""

import sys

import numpy as np
import pytest
import reconstruct_ema
import torch

from masked_diffusion import create_model, load_model, logger, script_util
from masked_diffusion.config import LogConfig
from masked_diffusion.training.ema import (
    PowerEMA,
    mix_snapshots,
    plan_reconstruction,
    posthoc_name,
    power_function_beta,
    reconstruct,
    save_snapshots,
    sigma_rel_to_gamma,
    solve_posthoc_weights,
)
from masked_diffusion.training.resume import Start, find_start
from masked_diffusion.weights.checkpoint import newest_ema, parse_step, save_checkpoint

TRACKED = (0.05, 0.10)
STEPS, EVERY = 400, 20


def profile(sigma_rel, steps):
    """(steps,) weights of steps 1, 2, ...: the integral of (gamma + 1) tau^gamma / steps^(gamma + 1) over each step."""
    return np.diff((np.arange(steps + 1) / steps) ** (sigma_rel_to_gamma(sigma_rel) + 1))


def random_walk(num_steps, *shapes):
    """(num_steps, *shape) positions for each shape."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_steps, *shape, generator=generator).cumsum(0) for shape in shapes]


def average(walk, sigma_rel, step):
    return torch.einsum("t,t...->...", torch.from_numpy(profile(sigma_rel, step)), walk[:step].double()).float()


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.972198602303447), (0.10, 6.937203937601809)])
def test_gamma_of_the_widths_of_the_paper(sigma_rel, gamma):
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-12)


@pytest.mark.parametrize("gamma", [1e-6, 0.1, 1.0, 6.94, 100.0, 1e5])
def test_gamma_inverts_the_closed_form(gamma):
    sigma_rel = np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_widths_that_cannot_be(sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel is {sigma_rel}: it must be above 0 and below .* = 0\.2887"):
        sigma_rel_to_gamma(sigma_rel)
    with pytest.raises(ValueError, match="sigma_rel is"):
        PowerEMA([], (0.05, sigma_rel))


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_an_average_is_as_wide_as_asked(sigma_rel):
    steps = 2000
    ema = PowerEMA([torch.zeros(steps, dtype=torch.float64)], (sigma_rel,))
    for row, step in zip(torch.eye(steps, dtype=torch.float64), range(1, steps + 1), strict=True):
        ema.update([row], step)
    ((weights,),) = ema.averages.values()
    torch.testing.assert_close(weights.numpy(), profile(sigma_rel, steps), rtol=1e-9, atol=1e-15)
    times = (np.arange(steps) + 0.5) / steps
    mean = (weights.numpy() * times).sum()
    assert np.sqrt((weights.numpy() * (times - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)


# ---------------------------------------------------------------- tracking


def test_the_first_step_is_copied():
    assert power_function_beta(6.94, 1) == 0
    ema = PowerEMA([torch.ones(3)])
    ema.update([torch.tensor([2.0, 3.0, 5.0])], 1)
    assert all(average.tolist() == [2.0, 3.0, 5.0] for (average,) in ema.averages.values())


def test_tracking_is_the_weighted_sum_of_all_steps():
    walks = random_walk(300, (4, 5), (7,))
    ema = PowerEMA([torch.nn.Parameter(torch.zeros(4, 5)), torch.nn.Parameter(torch.zeros(7))], (0.03, 0.05, 0.2))
    for step, params in enumerate(zip(*walks, strict=True), 1):
        ema.update((p for p in params), step)
    assert list(ema.averages) == ["0.030", "0.050", "0.200"]
    for width, averages in ema.averages.items():
        for ours, walk in zip(averages, walks, strict=True):
            torch.testing.assert_close(ours, average(walk, float(width), 300), rtol=1e-5, atol=1e-5)


def test_tracking_goes_on_from_a_state_dict(tmp_path):
    (walk,) = random_walk(20, (5,))
    whole, parts = PowerEMA([walk[0]]), PowerEMA([walk[0]])
    for step in range(1, 21):
        whole.update([walk[step - 1]], step)
        parts.update([walk[step - 1]], step)
        if step == 10:
            torch.save(parts.state_dict(), tmp_path / "state.pt")
            parts = PowerEMA([torch.zeros(5)])
            parts.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for ours, theirs in zip(parts.averages.values(), whole.averages.values(), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_other_widths_than_the_checkpoint_has_are_refused():
    with pytest.raises(ValueError, match=r"averages of sigma_rel 0\.050, 0\.100, but this run tracks 0\.050, 0\.120"):
        PowerEMA([], (0.05, 0.12)).load_state_dict(PowerEMA([]).state_dict())
    with pytest.raises(ValueError, match=r"averages of sigma_rel \(none\), but this run tracks 0\.050, 0\.100"):
        PowerEMA([]).load_state_dict({})
    with pytest.raises(ValueError, match=r"this run tracks \(none\): give the same widths to --phema"):
        PowerEMA([], ()).load_state_dict(PowerEMA([]).state_dict())
    with pytest.raises(ValueError, match=r"sigma_rel is 0\.0625: give three decimals at most"):
        PowerEMA([], (0.0625,))


# ---------------------------------------------------------------- reconstructing


@pytest.fixture(scope="module")
def walk():
    return random_walk(STEPS, (50, 20))[0]


def save_walk(folder, walk, every, dtype="fp32"):
    """Snapshots of a model whose one parameter goes along the walk, with a constant and an integer beside it."""
    ema = PowerEMA([walk[0]], TRACKED)
    for step, position in enumerate(walk, 1):
        ema.update([position], step)
        if step % every == 0:
            state = {"table": torch.tensor([0.1, -3.0]), "weight": position, "count": torch.tensor(step)}
            save_snapshots(folder, step, ema.state_dict(), state, ["weight"], dtype)
    return folder


@pytest.fixture(scope="module")
def snapshots(walk, tmp_path_factory):
    return save_walk(tmp_path_factory.mktemp("walk"), walk, EVERY)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.06, 0.08, 0.12, 0.15, 0.2])
@pytest.mark.parametrize("step", [None, 300])
def test_an_average_that_was_not_tracked(snapshots, walk, sigma_rel, step):
    state = reconstruct(snapshots, sigma_rel, step)
    assert relative_error(state["weight"], average(walk, sigma_rel, step or STEPS)) < 1e-2
    assert state["weight"].dtype == torch.float32
    assert torch.equal(state["table"], torch.tensor([0.1, -3.0])) and state["count"] == STEPS


@pytest.mark.parametrize("sigma_rel, step", [(0.05, STEPS), (0.10, STEPS), (0.10, 200)])
def test_an_average_that_was_tracked_comes_out_as_it_was(snapshots, walk, sigma_rel, step):
    recipe = plan_reconstruction(snapshots, sigma_rel, step)
    assert recipe.residual < 1e-7 and max(recipe.weights) == pytest.approx(1, abs=1e-9)
    assert relative_error(mix_snapshots(recipe)["weight"], average(walk, sigma_rel, step)) < 1e-5


def test_more_snapshots_miss_less(snapshots, walk, tmp_path):
    save_walk(tmp_path, walk, 2 * EVERY)
    sparse, dense = (plan_reconstruction(folder, 0.08) for folder in (tmp_path, snapshots))
    assert 0 < dense.residual < sparse.residual / 2 < 1e-2
    errors = [relative_error(mix_snapshots(recipe)["weight"], average(walk, 0.08, STEPS)) for recipe in (sparse, dense)]
    assert errors[1] < errors[0] < 1e-2


def test_half_precision_snapshots(walk, tmp_path):
    save_walk(tmp_path, walk, EVERY, "fp16")
    stored = torch.load(tmp_path / "phema_0.050_000400.pt", weights_only=True)
    assert stored["weight"].dtype == torch.float16 and stored["table"].dtype == torch.float32
    state = reconstruct(tmp_path, 0.08)
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    assert relative_error(state["weight"], average(walk, 0.08, STEPS)) < 1e-2


def test_the_residual_is_the_distance_of_the_profiles():
    steps = np.repeat(np.arange(1, 9) * 500, 2)
    gammas = np.tile([sigma_rel_to_gamma(sigma_rel) for sigma_rel in TRACKED], 8)
    sigma_rels = [0.02, 0.08, 0.25]
    weights, residuals = solve_posthoc_weights(steps, gammas, [4000] * 3, [sigma_rel_to_gamma(s) for s in sigma_rels])
    assert weights.shape == (16, 3) and weights.sum(axis=0) == pytest.approx([1, 1, 1])
    rows = np.zeros((16, 4000))
    for row, step, sigma_rel in zip(rows, steps, np.tile(TRACKED, 8), strict=True):
        row[:step] = profile(sigma_rel, step)
    for column, residual, sigma_rel in zip(weights.T, residuals, sigma_rels, strict=True):
        wanted = profile(sigma_rel, 4000)
        measured = np.linalg.norm(column @ rows - wanted) / np.linalg.norm(wanted)
        assert residual == pytest.approx(measured, rel=1e-2)


def test_many_snapshots_and_one_hard_on_the_heels_of_another():
    steps = np.repeat([*range(10000, 2500001, 10000), 2500001], 2)
    gammas = np.tile([sigma_rel_to_gamma(sigma_rel) for sigma_rel in TRACKED], len(steps) // 2)
    weights, residuals = solve_posthoc_weights(steps, gammas, 2500001, sigma_rel_to_gamma(0.08))
    assert residuals[0] < 1e-4 and np.abs(weights).sum() < 10


# ---------------------------------------------------------------- the script


def run_script(monkeypatch, **flags):
    monkeypatch.setattr(sys, "argv", ["reconstruct_ema.py", *(f"--{key}={value}" for key, value in flags.items())])
    try:
        script_util.run(reconstruct_ema.main)
    finally:
        monkeypatch.setattr(logger, "_current", logger.Logger())


def test_the_script_makes_a_file_that_loads(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_heads": 2, "depth": 4}
    model = create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=10, mask_ratio=0.3, **size)
    names, params = zip(*model.named_parameters(), strict=True)
    tracked, direct = PowerEMA(params, TRACKED), PowerEMA(params, (0.08,))
    for step in range(1, 41):
        with torch.no_grad():
            torch._foreach_add_(params, [0.01 * torch.randn_like(p) for p in params])
        tracked.update(params, step)
        direct.update(params, step)
        if step % 5 == 0:
            save_snapshots(tmp_path, step, tracked.state_dict(), model.state_dict(), names)
    save_checkpoint(tmp_path, 40, model.state_dict(), {"0.9": model.state_dict()}, {})

    run_script(monkeypatch, log_dir=tmp_path, sigma_rel=0.08)
    path = tmp_path / "posthoc_ema_0.08_000040.pt"
    output = capsys.readouterr().out
    assert "from 16 snapshots: relative residual of the profile 1." in output and f"wrote {path}" in output
    assert not list(tmp_path.glob(".*.partial"))
    loaded = dict(load_model(path).named_parameters())
    for name, expected in zip(names, direct.averages["0.080"], strict=True):
        assert relative_error(loaded[name], expected) < 1e-2, name
    # Neither the folder's newest EMA nor a step to resume from.
    assert newest_ema(tmp_path).name == "ema_0.9_000040.pt" and load_model(tmp_path).depth == 4
    assert find_start(tmp_path / "new_run", LogConfig(resume_checkpoint=str(path))) == Start(path, 0, True)
    with pytest.raises(ValueError, match="has no step in its name"):
        parse_step(path)

    run_script(monkeypatch, log_dir=tmp_path, sigma_rel=0.1, step=30, out=tmp_path / "mine.pt")
    ours, theirs = (torch.load(tmp_path / n, weights_only=True) for n in ("mine.pt", "phema_0.100_000030.pt"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"sigma_rel": 0.3}, "--sigma_rel is 0.3: it must be above 0 and below 0.2887"),
        ({"step": 401}, "step is 401: the snapshots of {folder} reach from step 20 to 400"),
        ({"step": 19}, "step is 19: the snapshots of {folder} reach from step 20 to 400"),
        ({"log_dir": "nowhere"}, "nowhere holds no snapshots (no phema_SIGMA_STEP.pt)"),
        ({"out": "nowhere/ema.pt"}, "nowhere/ema.pt cannot be written: nowhere is no folder"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_sentence(snapshots, flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, **({"log_dir": snapshots, "sigma_rel": 0.08} | flags))
    assert stop.value.code == 2 and f"error: {message.format(folder=snapshots)}" in capsys.readouterr().err
    assert not (snapshots / posthoc_name(0.08, STEPS)).exists()


def test_snapshots_of_two_models_are_not_mixed(tmp_path):
    for step, size in ((10, 3), (20, 4)):
        ema = PowerEMA([torch.ones(size)])
        save_snapshots(tmp_path, step, ema.state_dict(), {"weight": torch.ones(size)}, ["weight"])
    with pytest.raises(
        ValueError, match=r"phema_0\.050_000020\.pt belongs to another model than the earlier snapshots"
    ):
        reconstruct(tmp_path, 0.08)
    (tmp_path / "phema_0.050_000010.pt").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"phema_0\.050_000010\.pt cannot be read as a checkpoint"):
        reconstruct(tmp_path, 0.08)
