"""Runs of --objective flow, with QK-norm: training, resuming, ranks, sampling, editing, sharing; what is refused."""

import json
from dataclasses import replace
from importlib.util import find_spec

import diffusers
import numpy as np
import pytest
import torch
import web_guards
import web_requests
from helpers import (
    HOLE,
    IMAGE,
    assert_same,
    crops,
    fork,
    generators,
    make_image_sampler,
    read,
    run_export,
    run_sample,
    run_train,
    sample_config,
    sample_flags,
    tensors,
    train_flags,
)

from evaluations.live import pixel_features
from evaluations.metrics import frechet_distance, gaussian_statistics
from masked_diffusion import load_model
from masked_diffusion.guidance import Guidance
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.pipeline import MDTPipeline
from masked_diffusion.sampling import during_training
from masked_diffusion.sampling.build import load_image_sampler, load_weights
from masked_diffusion.sampling.editing import inpaint, vary_progressive
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels, last_sample
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.utils.errors import UserError

STEPS = 3  # of the solvers that draw during training


def flow_flags(images, log_dir, **options):
    flags = {
        "objective": "flow",
        "qk_norm": True,
        "t_sampling": "logit-normal",
        "schedule_sampler": "uniform",
        "max_steps": 4,
    }
    return train_flags(images, log_dir, **flags | {"save_interval": 2, "optimizer": "adan", "lr": 3e-3} | options)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A run of four steps, with evaluation and a grid."""
    folder = tmp_path_factory.mktemp("flow")
    np.savez(folder / "reference.npz", crops(40, seed=0, size=8))
    looks = {"eval_interval": 4, "eval_samples": 11, "eval_reference": folder / "reference.npz", "sample_interval": 4}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("INCEPTION_V3_PATH", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setattr(during_training, "STEPS", STEPS)
        run_train(monkeypatch, flow_flags(images, folder / "run", **looks))
    return folder / "run"


def rows(folder):
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- training


def test_a_resumed_run_is_bitwise_the_same(images, run, tmp_path, monkeypatch):
    for max_steps in (2, 4):
        run_train(monkeypatch, flow_flags(images, tmp_path, max_steps=max_steps))
    assert_same(tensors(tmp_path, 4), tensors(run, 4))
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(run)]
    assert all(f"loss_q{q}" in "".join(map(str, rows(run))) for q in range(4)) and "vb" not in rows(run)[0]


def test_two_ranks_with_sharded_weights_train_as_one(images, run, tmp_path):
    fork("image_train.py", flow_flags(images, tmp_path, batch_size=4, num_workers=0, shard="fsdp"), ranks=2)
    np.testing.assert_allclose([row["loss"] for row in rows(tmp_path)], [row["loss"] for row in rows(run)], atol=1e-5)


def test_evaluation_draws_with_eulers_method(run):
    model = load_model(run / "ema_0.9_000004.pt")
    sampler = ImageSampler(
        model, create_solver("flow-euler", STEPS, {"objective": "flow"}), IdentityFirstStage(), quantize="truncate"
    )
    drawn = sampler(range(11), choose_labels(range(11), "balanced", 3, 0))
    with np.load(run.parent / "reference.npz") as arrays:
        statistics = [gaussian_statistics(pixel_features(x)["pool"].numpy()) for x in (drawn, arrays["arr_0"])]
    assert rows(run)[-1]["eval_frechet_pixels"] == pytest.approx(
        frechet_distance(*statistics[0], *statistics[1]), rel=1e-3
    )
    assert (run / "grid000004.png").exists()


def test_a_model_knows_its_objective(images, run, tmp_path, monkeypatch, capsys):
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["options"]["learn_sigma"] is False and not load_model(run).learn_sigma
    assert config["model"]["options"]["qk_norm"] is True and load_model(run).qk_norm
    recorded = {"objective": "flow", "t_sampling": "logit-normal", "learn_sigma": False, "snr_gamma": None}
    assert config["diffusion"].items() >= recorded.items()
    for name, value, message in (
        ("objective", "diffusion", "error: --objective was flow when"),
        ("t_sampling", "uniform", "error: --t_sampling was logit-normal when"),
    ):
        options = {"t_sampling": "uniform"} | {name: value}
        with pytest.raises(SystemExit):
            run_train(monkeypatch, flow_flags(images, run, **options))
        assert message in capsys.readouterr().err
    for solver in ("ddpm", "unipc"):
        with pytest.raises(SystemExit) as stop:
            run_sample(monkeypatch, sample_flags(run, tmp_path, solver=solver))
        message = (
            f"error: --solver is '{solver}', but the model was trained with --objective flow: choose one of flow-eul"
        )
        assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("solver", ["flow-heun", "flow-sde"])
def test_the_guiding_half_is_left_out_where_it_changes_nothing(solver):
    drawn, labels = {}, torch.tensor([0, 1, 2])
    for skip in (-1, 0, 100):
        sampler = make_image_sampler(solver=solver, guidance=Guidance("power-cosine", 3.8, 4.0, skip_below=skip))
        drawn[skip] = last_sample(sampler.progressive(range(3), labels))
    torch.testing.assert_close(drawn[-1], drawn[0], rtol=1e-4, atol=1e-4)
    assert (drawn[0] - drawn[100]).abs().max() > 0.01


def test_a_guide_of_another_objective_is_refused(run, checkpoint):
    guided = ("--guide_path", str(checkpoint), "--guidance", "constant")
    with pytest.raises(UserError, match="was trained with --objective diffusion, but the model with flow"):
        load_weights(sample_config(run, *guided))


@pytest.mark.parametrize("solver", ["flow-euler", "flow-heun", "flow-sde"])
def test_holes_are_filled_and_images_varied(run, solver):
    config = sample_config(run, "--solver", solver, "--num_sampling_steps", 6)
    image_sampler, _ = load_image_sampler(config)
    labels = torch.tensor([0, 1, 2])
    filled = inpaint(image_sampler, range(3), labels, IMAGE, HOLE, jump_length=2, resamplings=2)
    assert (filled[:, ~HOLE] == IMAGE[~HOLE]).all() and (filled[:, HOLE] != IMAGE[HOLE]).mean() > 0.9
    other = np.where(HOLE[:, :, None], 255 - IMAGE, IMAGE)
    assert np.array_equal(filled, inpaint(image_sampler, range(3), labels, other, HOLE, jump_length=2, resamplings=2))
    outs = list(vary_progressive(image_sampler, range(3), labels, IMAGE, 0.5))
    assert len(outs) == 3 and outs[-1]["sample"].isfinite().all()
    near = image_sampler.decode(last_sample(vary_progressive(image_sampler, range(3), labels, IMAGE, 0.01)))
    far = image_sampler(range(3), labels)
    assert np.abs(near.astype(int) - IMAGE).mean() < np.abs(far.astype(int) - IMAGE).mean()


@pytest.mark.skipif(not find_spec("gradio"), reason="the page needs gradio")
def test_the_page_offers_the_solvers_of_the_model(run, tmp_path):
    import page

    config = sample_config(run, "--num_sampling_steps", 6, "--seed", 7)
    jobs = web_guards.Jobs(web_guards.Listeners())
    studio = page.Studio(config, web_requests.Limits(), load_weights(config), tmp_path, jobs)
    assert studio.initial.solver == "flow-euler" and studio.limits.solvers == ("flow-euler", "flow-heun", "flow-sde")
    with pytest.raises(UserError, match="solver is 'ddim': choose one of flow-euler"):
        studio.check(0, 1, 0, "ddim", 5, 1.0, 1.0)
    request = replace(studio.initial, solver="flow-heun", count=2)
    progress = list(web_requests.draw(config, studio.weights, request))
    assert progress[-1].done == progress[-1].total == 6 and progress[-1].images.shape == (2, 8, 8, 3)


# ---------------------------------------------------------------- sharing


@pytest.fixture(scope="module")
def pipeline_folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_export(monkeypatch, model_path=run, out=folder, format="pipeline")
    return folder


def test_the_pipeline_and_an_export_draw_the_images_of_the_script(run, pipeline_folder, tmp_path, monkeypatch):
    run_sample(monkeypatch, sample_flags(run, tmp_path / "script", num_sampling_steps=5, seed=7))
    images, labels = read(tmp_path / "script" / "samples_11x8x8x3.npz")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        pipeline_folder, custom_pipeline=str(pipeline_folder), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    out = pipe(labels.tolist(), 3.8, 5, generators(7, 11), output_type="np")
    assert np.abs(np.rint(out.images * 255) - images).max() <= 1
    run_export(monkeypatch, model_path=run, out=tmp_path / "folder")
    run_sample(monkeypatch, sample_flags(tmp_path / "folder", tmp_path / "again", num_sampling_steps=5, seed=7))
    assert np.array_equal(read(tmp_path / "again" / "samples_11x8x8x3.npz")[0], images)


def test_the_pipeline_takes_schedulers_of_flow_matching_only(pipeline_folder, checkpoint, tmp_path, monkeypatch):
    pipe = MDTPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for scheduler in (
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(**flow),
        diffusers.UniPCMultistepScheduler(**flow),
    ):
        pipe.scheduler = scheduler
        images = pipe([0, 1], 2.0, 4, generators(0, 2), output_type="pt").images
        assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(
        UserError, match="the scheduler is a DDIMScheduler, but the model was trained with --objective flow"
    ):
        pipe([0], 2.0, 4)
    run_export(monkeypatch, model_path=checkpoint, out=tmp_path / "pipe", format="pipeline")
    other = MDTPipeline.from_pretrained(tmp_path / "pipe")
    other.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="trained with --objective diffusion: take one of diffusion"):
        other([0], 2.0, 4)
