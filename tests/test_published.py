"""Users of ADM, DiT and MDT: every public name takes the published call, or says in one sentence what to use instead.

`data/published_signatures.json` holds the names, the order of their arguments and the defaults of the three packages.
"""

import argparse
import importlib
import inspect
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import DATA, REPO

from masked_diffusion import create_diffusion, dist_util, gaussian_diffusion, logger, nn, published, script_util
from masked_diffusion.diffusion_utils import continuous_gaussian_log_likelihood, get_beta_schedule
from masked_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from masked_diffusion.image_datasets import ImageDataset
from masked_diffusion.respace import SpacedDiffusion, create_gaussian_diffusion, space_timesteps
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.not_rebuilt import NOT_REBUILT

SIGNATURES = json.loads((DATA / "published_signatures.json").read_text())
DOCS = (REPO / "docs" / "adm_dit_mdt.md").read_text()

# Where the published files are found here; elsewhere the module has the published name.
HOMES = {
    "__init__.py": "",
    "diffusion/__init__.py": "",
    "diffusion/gaussian_diffusion.py": "gaussian_diffusion",
    "diffusion/respace.py": "respace",
    "diffusion/timestep_sampler.py": "resample",
    "losses.py": "diffusion_utils",
}
FILES = [(package, file) for package, files in SIGNATURES.items() for file in files]

# Calls that differ, each with its row in the document.
DIFFERENT = {
    # ADM's positions are told from DiT's and MDT's by their types: see below.
    ("ADM guided_diffusion", "gaussian_diffusion.GaussianDiffusion.ddim_reverse_sample"),
    # None is the family's default, which is 4: see test_models.py.
    ("MDT masked_diffusion", "models.MDTv2.__init__"),
    # The logger's functions stand for these.
    *((package, f"logger.Logger.{name}") for package in SIGNATURES for name in ("set_comm", "DEFAULT", "CURRENT")),
}
# The training loop is designed otherwise.
DIFFERENT |= {
    (package, f"train_util.TrainLoop.{name}")
    for package in SIGNATURES
    for name in SIGNATURES[package].get("train_util.py", {}).get("TrainLoop", ())
}


def published_names(package, file):
    """(dotted name below our package, its published arguments), of which constants and members of a class have none."""
    home = HOMES.get(file, file.removesuffix(".py"))
    for name, entry in SIGNATURES[package][file].items():
        dotted = f"{home}.{name}".strip(".")
        if isinstance(entry, str):
            yield dotted, None if entry == "assigned" else entry
            continue
        yield from ((f"{dotted}.{member}", None) for member in entry.get("members", ()))
        yield from ((f"{dotted}.{key}", arguments) for key, arguments in entry.items() if isinstance(arguments, str))


def find(dotted):
    """What a dotted name below the package is."""
    module, *rest = dotted.split(".") if "." in dotted else ("", dotted)
    found = importlib.import_module(f"masked_diffusion.{module}".rstrip("."))
    for part in rest:
        found = getattr(found, part)
    return found


def complaint(dotted, arguments):
    """Why the published call of a name would not work here, or None."""
    ours = list(inspect.signature(find(dotted)).parameters.values())
    theirs = list(inspect.signature(eval(f"lambda {arguments}: None", {"INFO": logger.INFO})).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in theirs) and dotted.startswith("respace.SpacedDiffusion"):
        theirs = [p for p in theirs if p.name not in ("args", "kwargs")]  # passed on to what is compared elsewhere
        ours = ours[: len(theirs)]
    for i, parameter in enumerate(theirs):
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            mine = next((p for p in ours if p.name == parameter.name), None)
        else:
            mine = ours[i] if i < len(ours) and ours[i].kind is parameter.kind else None
            # The names of one and only arguments matter to nobody.
            if mine is not None and len(theirs) > 2 and mine.name.lstrip("_") != parameter.name.lstrip("_"):
                return f"{dotted} has {mine.name} in the place of {parameter.name}"
        if mine is None:
            return f"{dotted} does not take {parameter.name}"
        if parameter.default is not parameter.empty and mine.default != parameter.default:
            return f"{dotted} has {mine.default} as the default of {parameter.name}, not {parameter.default}"
    known = {p.name for p in theirs} | {p.name for p in ours[: len(theirs)]}
    if extra := [p.name for p in ours if p.name not in known and p.default is p.empty and p.kind is not p.VAR_KEYWORD]:
        return f"{dotted} cannot do without {extra}"
    return None


@pytest.mark.parametrize(("package", "file"), FILES)
def test_every_name_takes_the_published_call(package, file):
    complaints, seen = [], 0
    for dotted, arguments in published_names(package, file):
        if (package, dotted) in DIFFERENT:
            continue
        seen += 1
        if any(dotted == name or dotted.startswith(f"{name}.") for name in NOT_REBUILT):
            with pytest.raises(ImportError, match="is not rebuilt here: "):
                find(dotted)
        elif arguments is not None:
            complaints.append(complaint(dotted, arguments))
        else:
            find(dotted)
    assert [text for text in complaints if text] == [] and seen


def test_what_is_not_rebuilt_says_what_to_use():
    for code in (
        "from masked_diffusion.fp16_util import MixedPrecisionTrainer",
        "import masked_diffusion.fp16_util",
        "from masked_diffusion import fp16_util",
    ):
        with pytest.raises(ImportError, match=r"^masked_diffusion.fp16_util is not rebuilt here: .*--precision fp16"):
            exec(code)
    with pytest.raises(ImportError, match=r"timestep_sampler is not rebuilt here: use masked_diffusion.resample"):
        importlib.import_module("masked_diffusion.timestep_sampler")
    with pytest.raises(ImportError, match=r"create_classifier is not rebuilt here: .* cond_fn"):
        _ = script_util.create_classifier
    with pytest.raises(ModuleNotFoundError, match=r"No module named .masked_diffusion.nothing'"):
        importlib.import_module("masked_diffusion.nothing")
    with pytest.raises(AttributeError, match=r"'masked_diffusion.logger' has no attribute 'nothing'"):
        _ = logger.nothing


def test_the_document_names_all_that_is_not_rebuilt():
    missing = [name for name in NOT_REBUILT if f"`{name.rpartition('.')[2]}`" not in DOCS]
    assert missing == []


# ---------------------------------------------------------------- the diffusion

SHAPE, T = (2, 3, 4, 4), 6
NOISE = torch.linspace(-2, 2, 96).view(SHAPE)


def network(x, t, y=None):
    shift = 0 if y is None else y.view(-1, 1, 1, 1)
    return torch.cat([torch.sin(x + t.view(-1, 1, 1, 1) / 100 + shift), torch.cos(x)], dim=1)


def cond_fn(x, t, y=None):
    return 0.1 * x + t.view(-1, 1, 1, 1) / 1000


def halved(x):
    return x / 2


KWARGS = {"y": torch.tensor([1, 2])}
KEYWORDS = {"noise": NOISE, "clip_denoised": False, "denoised_fn": halved, "cond_fn": cond_fn, "model_kwargs": KWARGS}
POSITIONS = (network, SHAPE, NOISE, False, halved, cond_fn, KWARGS, torch.device("cpu"), False)


def seeded(function, *args, **kwargs):
    torch.manual_seed(0)
    return function(*args, **kwargs)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_the_loops_take_their_arguments_by_position(loop):
    diffusion = create_diffusion(str(T))
    eta, keyword = ((0.5,), {"eta": 0.5}) if loop.startswith("ddim") else ((), {})
    draw, steps = getattr(diffusion, loop), getattr(diffusion, f"{loop}_progressive")
    by_name = seeded(draw, network, SHAPE, **KEYWORDS, **keyword)
    assert torch.equal(seeded(draw, *POSITIONS, *eta), by_name)
    assert torch.equal(seeded(lambda: [out["sample"] for out in steps(*POSITIONS, *eta)])[-1], by_name)
    assert not torch.equal(seeded(draw, network, SHAPE, NOISE, False, None, cond_fn, KWARGS), by_name)
    assert not torch.equal(seeded(draw, network, SHAPE, NOISE, False, halved, None, KWARGS), by_name)
    assert not torch.equal(seeded(draw, network, SHAPE, NOISE, False, halved, cond_fn), by_name)
    # Our own draws come behind the published arguments.
    silent = draw(*POSITIONS, *eta, torch.zeros_like)
    assert torch.equal(silent, draw(network, SHAPE, **KEYWORDS, **keyword, randn_like=torch.zeros_like))


def test_the_reverse_step_takes_adms_call_and_dits():
    diffusion, t = create_diffusion(str(T)), torch.tensor([1, 4])
    step = diffusion.ddim_reverse_sample
    plain = step(network, NOISE, t, clip_denoised=False, denoised_fn=halved, model_kwargs=KWARGS)["sample"]
    assert torch.equal(step(network, NOISE, t, False, halved, KWARGS)["sample"], plain)  # ADM
    assert torch.equal(step(network, NOISE, t, False, halved, KWARGS, 0.0)["sample"], plain)
    assert torch.equal(step(network, NOISE, t, False, halved, KWARGS, eta=0.0)["sample"], plain)
    assert torch.equal(step(network, NOISE, t, False, halved, None, KWARGS)["sample"], plain)  # DiT and MDT
    assert torch.equal(step(network, NOISE, t, False, halved, None, KWARGS, 0.0)["sample"], plain)
    guided = step(network, NOISE, t, False, halved, cond_fn, KWARGS, 0.0)["sample"]
    assert not torch.equal(guided, plain)
    bare = step(network, NOISE, t, False, None)["sample"]
    assert torch.equal(step(network, NOISE, t, False, None, None, 0.0)["sample"], bare)
    with pytest.raises(UserError, match=r"eta is 0.5"):
        step(network, NOISE, t, False, None, KWARGS, 0.5)
    for mixed in ((KWARGS, KWARGS), (cond_fn, 0.0)):
        with pytest.raises(TypeError, match="cond_fn, model_kwargs, eta"):
            step(network, NOISE, t, False, None, *mixed)


def test_timesteps_are_rescaled_as_in_adm():
    seen = []

    def watch(x, t, **kwargs):
        seen.append(t)
        return network(x, t)

    plain = GaussianDiffusion(
        betas=np.linspace(1e-3, 0.5, 10),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=gaussian_diffusion.LossType.MSE,
        rescale_timesteps=True,
    )
    plain.p_mean_variance(watch, NOISE, torch.tensor([3, 7]))
    plain.training_losses(watch, NOISE, torch.tensor([3, 7]))
    spaced = create_gaussian_diffusion(steps=100, learn_sigma=True, rescale_timesteps=True, timestep_respacing="5")
    spaced.p_mean_variance(watch, NOISE, torch.tensor([1, 4]))
    spaced.condition_mean(
        lambda x, t: watch(x, t)[:, :3], {"mean": NOISE, "variance": NOISE}, NOISE, torch.tensor([1, 4])
    )
    assert [t.tolist() for t in seen] == [[300, 700], [300, 700], [250, 990], [250, 990]]
    assert all(t.dtype is torch.float32 for t in seen)


def test_adms_diffusion_has_adms_defaults():
    ours = create_gaussian_diffusion()
    assert ours.model_var_type is ModelVarType.FIXED_LARGE and ours.snr_gamma is None and ours.num_timesteps == 1000
    ours = create_gaussian_diffusion(
        steps=50, learn_sigma=True, noise_schedule="squaredcos_cap_v2", predict_xstart=True,
        rescale_learned_sigmas=True, timestep_respacing="ddim25",
    )  # fmt: skip
    assert (ours.num_timesteps, ours.original_num_steps, ours.loss_type.name) == (25, 50, "RESCALED_MSE")
    assert ours.model_mean_type is ModelMeanType.START_X
    # DiT's and MDT's positions: respacing, schedule, use_kl, sigma_small, predict_xstart, learn_sigma, rescaled, steps
    ours = create_diffusion("10", "squaredcos_cap_v2", True, True, True, False, True, 100)
    assert (ours.num_timesteps, ours.original_num_steps, ours.loss_type.name) == (10, 100, "RESCALED_KL")
    assert ours.model_var_type is ModelVarType.FIXED_SMALL and ours.model_mean_type is ModelMeanType.START_X


def test_min_snr_is_mdtv2s_default_and_none_is_dits():
    t, x_start = torch.tensor([10, 900]), NOISE / 2
    weighted, plain = (
        seeded(create_diffusion(snr_gamma=gamma).training_losses, network, x_start, t) for gamma in (5.0, None)
    )
    assert torch.equal(seeded(create_diffusion("").training_losses, network, x_start, t)["loss"], weighted["loss"])
    snr = torch.from_numpy(create_diffusion().snr)[t]
    torch.testing.assert_close(weighted["mse"] / plain["mse"], (snr.clamp(max=5) / snr).float())
    assert torch.equal(weighted["vb"], plain["vb"])


@pytest.mark.parametrize(
    "kinds", [{"model_mean_type": ModelMeanType.PREVIOUS_X}, {"model_var_type": ModelVarType.LEARNED}]
)
def test_published_kinds_that_are_not_rebuilt_are_refused(kinds):
    with pytest.raises(UserError, match="not rebuilt: use "):
        SpacedDiffusion(range(10), betas=np.linspace(1e-3, 0.1, 10), **kinds)


def test_respacing_takes_numbers_and_refuses_what_it_does_not_know():
    assert create_diffusion(250).timestep_map == create_diffusion("250").timestep_map
    assert space_timesteps(1000, np.int64(4)) == space_timesteps(1000, [4]) == {0, 333, 666, 999}
    with pytest.raises(UserError, match="'ddim50,3': ddim takes one number"):
        create_diffusion("ddim50,3")
    with pytest.raises(UserError, match="asks for 0 of the 1000 steps"):
        create_diffusion(0)
    for wrong in (2.5, [2.5], {4}, "ddim", "4;5"):
        with pytest.raises(UserError, match=r"timestep_respacing is .*: write"):
            create_diffusion(wrong)


def test_ddpms_schedules():
    ends = {"beta_start": 0.01, "beta_end": 0.25, "num_diffusion_timesteps": 10}
    values = {
        name: get_beta_schedule(name, **ends) for name in ("linear", "quad", "warmup10", "warmup50", "const", "jsd")
    }
    assert all(betas.shape == (10,) and betas.dtype == np.float64 for betas in values.values())
    np.testing.assert_allclose(values["linear"][[0, 3, 9]], [0.01, 0.09, 0.25])
    np.testing.assert_allclose(values["quad"][[0, 9]], [0.01, 0.25])
    np.testing.assert_allclose(np.diff(np.sqrt(values["quad"])), 0.4 / 9)
    np.testing.assert_allclose(values["warmup10"], [0.01] + [0.25] * 9)
    np.testing.assert_allclose(values["warmup50"], [0.01, 0.07, 0.13, 0.19, 0.25] + [0.25] * 5)
    np.testing.assert_allclose(values["const"], 0.25)
    np.testing.assert_allclose(values["jsd"], [1 / n for n in range(10, 0, -1)])
    assert gaussian_diffusion.get_beta_schedule is get_beta_schedule
    with pytest.raises(UserError, match="'cosine': choose linear"):
        get_beta_schedule("cosine", **ends)


def test_small_functions():
    table, t = np.arange(5.0) ** 2, torch.tensor([1, 3])
    entries = gaussian_diffusion._extract_into_tensor(table, t, (2, 3, 1))
    assert entries.dtype is torch.float32 and entries.shape == (2, 3, 1) and entries[:, 0, 0].tolist() == [1, 9]
    x = torch.tensor([0.5, 3.0])
    log_p = continuous_gaussian_log_likelihood(x, means=torch.ones(2), log_scales=torch.full((2,), math.log(2.0)))
    torch.testing.assert_close(log_p, torch.distributions.Normal(0.0, 1.0).log_prob((x - 1) / 2))
    assert nn.mean_flat(torch.arange(8.0).view(2, 2, 2)).tolist() == [1.5, 5.5]
    embedding = nn.timestep_embedding(torch.tensor([0.0, 1.0]), 5, max_period=100)
    expected = [math.cos(1), math.cos(0.1), math.sin(1), math.sin(0.1), 0]
    torch.testing.assert_close(embedding, torch.tensor([[1.0, 1, 0, 0, 0], expected]))
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = [
        0.75 * a.detach() + 0.25 * b.detach() for a, b in zip(target.parameters(), source.parameters(), strict=True)
    ]
    nn.update_ema(target.parameters(), source.parameters(), rate=0.75)
    for parameter, value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


# ---------------------------------------------------------------- timestep samplers


def test_samplers_learn_from_all_losses():
    from masked_diffusion.resample import LossAwareSampler, LossSecondMomentResampler

    diffusion = create_diffusion("4")
    local, everybody = (LossSecondMomentResampler(diffusion, 2, 0.01) for _ in range(2))
    for value in (1.0, 3.0):
        local.update_with_local_losses(torch.arange(4), value * (1 + torch.arange(4.0)))
        everybody.update_with_all_losses([0, 1, 2, 3], [value * (1 + t) for t in range(4)])
    assert np.array_equal(local.weights(), everybody.weights()) and local.weights()[3] > local.weights()[0]
    assert isinstance(local, LossAwareSampler)


def test_a_users_own_sampler_may_return_numpy_and_call_no_constructor():
    from masked_diffusion.resample import ScheduleSampler

    class Late(ScheduleSampler):
        def __init__(self, diffusion):
            self.diffusion = diffusion

        def weights(self):
            return np.array([0.0, 0.0, 1.0, 3.0])

    t, weights = seeded(Late(create_diffusion("4")).sample, 4000, "cpu")
    assert set(t.tolist()) == {2, 3} and abs((t == 3).float().mean() - 0.75) < 0.03
    torch.testing.assert_close(weights, torch.where(t == 3, 1 / 3, 1.0))


# ---------------------------------------------------------------- data


def test_datasets_take_adms_shards(tmp_path):
    from PIL import Image

    paths = [str(tmp_path / f"a_{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(path)
    shard = ImageDataset(8, paths, [10, 11, 12, 13, 14], 1, 2, False, False)
    assert len(shard) == 2
    assert [int(shard[i][1]["y"]) for i in range(2)] == [11, 13]
    assert [round((float(shard[i][0][0, 0, 0]) + 1) * 127.5) for i in range(2)] == [50, 150]
    assert shard.random_crop is False and len(ImageDataset(8, paths)) == 5


# ---------------------------------------------------------------- scripts' helpers


def test_flags_are_made_of_a_dict():
    parser = argparse.ArgumentParser()
    defaults = {"steps": 4, "lr": 0.5, "name": "a", "use_ddim": False, "path": None}
    script_util.add_dict_to_argparser(parser, defaults | script_util.model_and_diffusion_defaults())
    args = parser.parse_args(
        ["--steps", "7", "--use_ddim", "True", "--path", "12", "--mask_ratio", "0.3", "--decode_layer", "2"]
    )
    assert script_util.args_to_dict(args, defaults) == {**defaults, "steps": 7, "use_ddim": True, "path": "12"}
    assert (args.mask_ratio, args.decode_layer, args.image_size, args.learn_sigma) == (0.3, 2, 256, True)
    config = script_util.args_to_dict(args, published.diffusion_defaults().keys())
    assert create_diffusion(**config | {"timestep_respacing": "8"}).num_timesteps == 8
    assert script_util.NUM_CLASSES == 1000
    with pytest.raises(SystemExit):
        parser.parse_args(["--use_ddim", "perhaps"])


def test_checkpoints_are_found_by_adms_names(tmp_path, monkeypatch):
    from masked_diffusion import train_util

    assert [
        train_util.parse_resume_step_from_filename(name)
        for name in ("log/model000120.pt", "model7.pt", "a_model/model000003.pt", "weights.pt", "modelx.pt", "12.pt")
    ] == [120, 7, 3, 0, 0, 0]
    (tmp_path / "ema_0.9999_000120.pt").touch()
    main = str(tmp_path / "model000120.pt")
    assert train_util.find_ema_checkpoint(main, 120, "0.9999") == str(tmp_path / "ema_0.9999_000120.pt")
    assert train_util.find_ema_checkpoint(main, 120, 0.9) is None
    assert train_util.find_ema_checkpoint(None, 120, 0.9) is None
    assert train_util.find_resume_checkpoint() is None
    monkeypatch.setattr(logger, "_current", logger.Logger(str(tmp_path)))
    assert train_util.get_blob_logdir() == str(tmp_path)


def test_losses_are_logged_by_quarters(monkeypatch):
    monkeypatch.setattr(logger, "_current", logger.Logger())
    diffusion = create_diffusion("8")
    published.log_loss_dict(diffusion, torch.tensor([0, 1, 7]), {"mse": torch.tensor([1.0, 3.0, 5.0])})
    assert logger.getkvs() == {"mse": 3.0, "mse_q0": 2.0, "mse_q3": 5.0}


# ---------------------------------------------------------------- process groups


@pytest.fixture
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *dist_util.MPI_SIZES):
        monkeypatch.delenv(name, raising=False)
    yield
    dist_util.cleanup()


def test_setup_dist_makes_a_group_of_one_for_published_scripts(alone):
    dist_util.join_process_group()
    assert not dist_util.is_dist_avail_and_initialized()  # our own scripts need none
    dist_util.synchronize()
    args = argparse.Namespace(rank=3, world_size=9, dist_url="env://", local_rank=-1)
    dist_util.setup_dist_multinode(args)
    dist_util.setup_dist()
    assert dist_util.is_dist_avail_and_initialized()
    assert (args.rank, args.world_size, args.local_rank, args.gpu, args.distributed) == (0, 1, 0, 0, True)
    gathered = [torch.zeros(2)]
    dist.all_gather(gathered, torch.ones(2))
    dist.barrier()
    dist_util.synchronize()
    assert gathered[0].tolist() == [1, 1] and dist.get_rank() == 0 and dist_util.any_rank(True)
    parameter = torch.nn.Parameter(torch.ones(3))
    dist_util.sync_params([parameter])
    assert parameter.tolist() == [1, 1, 1]


def test_weights_are_read_with_adms_keyword(tmp_path):
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    state = dist_util.load_state_dict(str(tmp_path / "a.pt"), map_location="cpu")
    assert state["a"].tolist() == [0, 1, 2]


def test_module_names_are_in_the_document():
    for name in ("TrainLoop", "create_diffusion", "snr_gamma", "setup_dist", "logger.configure", "join_process_group"):
        assert re.search(rf"\b{re.escape(name)}\b", DOCS), name
