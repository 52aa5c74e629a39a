"""Scripts in the style of ADM, DiT and MDT run on this package, and draw what our own samplers draw of their noise."""

import argparse
import csv
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill
from helpers import read, run_sample, sample_flags, write_images
from PIL import Image

import masked_diffusion
from masked_diffusion import create_diffusion, create_model, dist_util, load_model, logger, script_util
from masked_diffusion.guidance import Guidance, GuidedDenoiser
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.published import model_and_diffusion_defaults
from masked_diffusion.respace import create_gaussian_diffusion
from masked_diffusion.sample_config import SampleConfig, TrainedConfig, WeightsConfig
from masked_diffusion.sampling.build import load_weights
from masked_diffusion.sampling.image_sampler import last_sample
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.utils.errors import UserError

SCRIPTS = Path(__file__).parent / "published_scripts"
SIZE = 8  # of the latents


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script of the folder in this process, with `tmp_path` as the log directory. Returns its globals."""
    monkeypatch.setattr(logger, "_current", logger.Logger())
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *dist_util.MPI_SIZES):
        monkeypatch.delenv(name, raising=False)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        return runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    yield run
    torch.set_grad_enabled(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist_util.cleanup()


def write_weights(name, path):
    """A model with weights that are functions of their names."""
    model = fill(create_model(name, input_size=SIZE)).eval()
    torch.save(model.state_dict(), path)
    return model


@torch.no_grad()
def draw(model, solver_name, num_steps, noise, labels, guidance=None):
    """Latents by our own solver. Published scripts draw noise for two rows per guided image; the first half counts."""
    solver = create_solver(solver_name, num_steps, {})
    denoise = GuidedDenoiser(model, guidance or Guidance(), model.null_label)
    rows = 2 if guidance else 1

    def randn_like(x):
        return torch.randn(rows * len(x), *x.shape[1:])[: len(x)]

    return last_sample(solver.progressive(denoise, noise, model_kwargs={"y": labels}, randn_like=randn_like))


def assert_same_pixels(ours, theirs):
    """With several threads sums are taken in another order, which moves a pixel beside a whole number by one."""
    difference = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape and difference.max() <= 1 and difference.mean() < 1e-3


def assert_same_picture(path, images, tmp_path, nrow):
    from torchvision.utils import save_image

    save_image(images, tmp_path / "expected.png", nrow=nrow, normalize=True, value_range=(-1, 1))
    assert_same_pixels(*(np.asarray(Image.open(file)) for file in (path, tmp_path / "expected.png")))
    assert images.std() > 0.05


def test_mdts_inference(run, vae_folder, tmp_path):
    model = write_weights("MDTv2_Nano_2", tmp_path / "mdt.pt")
    run("mdt_infer.py", tmp_path / "mdt.pt", vae_folder, tmp_path / "sample.png")
    torch.manual_seed(1)
    create_model("MDTv2_Nano_2", input_size=SIZE)  # the script draws its weights before the noise
    noise = torch.randn(3, 4, SIZE, SIZE)
    latents = draw(model, "ddpm", 6, noise, torch.tensor([19, 23, 106]), Guidance("power-cosine", 4.0, 0.01))
    assert_same_picture(tmp_path / "sample.png", create_first_stage(vae_folder).decode(latents), tmp_path, nrow=3)


def test_diffusion_defaults_are_mdts_at_the_top_and_adms_in_script_util():
    ours = {"diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False}
    ours |= {"predict_xstart": False, "rescale_learned_sigmas": False}
    assert masked_diffusion.diffusion_defaults() == ours | {"learn_sigma": True, "sigma_small": False}
    assert script_util.diffusion_defaults() == ours | {"learn_sigma": False, "rescale_timesteps": False}


def test_dits_sampling(run, vae_folder, tmp_path):
    model = fill(create_model("DiT_Nano_2", input_size=SIZE)).eval()
    raw = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    # As DiT's train.py saves it: find_model takes the EMA.
    content = {"model": raw, "ema": model.state_dict(), "opt": {"state": {}}, "args": argparse.Namespace(epochs=1400)}
    torch.save(content, tmp_path / "dit.pt")
    flags = ["--model", "DiT-Nano/2", "--vae", vae_folder, "--image-size", 64, "--num-sampling-steps", 5]
    run("dit_sample.py", *flags, "--seed", 3, "--ckpt", tmp_path / "dit.pt", "--out", tmp_path / "sample.png")
    torch.manual_seed(3)
    create_model("DiT_Nano_2", input_size=SIZE)
    latents = draw(model, "ddpm", 5, torch.randn(2, 4, SIZE, SIZE), torch.tensor([207, 360]), Guidance("constant", 4.0))
    assert_same_picture(tmp_path / "sample.png", create_first_stage(vae_folder).decode(latents), tmp_path, nrow=4)


@pytest.mark.parametrize("guided", [True, False])
def test_mdts_batches_of_samples(guided, run, vae_folder, tmp_path, capsys):
    model = write_weights("MDTv2_Nano_2", tmp_path / "mdt.pt")
    flags = ["--model_path", tmp_path / "mdt.pt", "--model", "MDTv2_Nano_2", "--vae_decoder", vae_folder]
    flags += ["--image_size", 64, "--decode_layer", 2, "--num_samples", 3, "--batch_size", 2, "--num_sampling_steps", 4]
    flags += ["--cfg_cond", guided, "--cfg_scale", 3.0, "--scale_pow", 2.0, "--use_ddim", not guided]
    state = torch.manual_seed(5).get_state()
    run("mdt_image_sample.py", *flags)
    out = capsys.readouterr().out
    assert "<All keys matched successfully>" in out and out.endswith("sampling complete\n")

    torch.random.set_rng_state(state)
    create_model("MDTv2_Nano_2", input_size=SIZE)
    images, labels = [], []
    guidance = Guidance("power-cosine", 3.0, 2.0) if guided else None
    for _ in range(2):
        if guided:
            labels.append(torch.randint(0, 1000, (2,)))
        noise = torch.randn(2, 4, SIZE, SIZE)
        if not guided:
            labels.append(torch.randint(0, 1000, (2,)))
        latents = draw(model, "ddpm" if guided else "ddim", 4, noise, labels[-1], guidance)
        decoded = create_first_stage(vae_folder).decode(latents)
        images.append(((decoded + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    with np.load(tmp_path / "samples_3x64x64x3.npz") as file:
        assert_same_pixels(file["arr_0"], torch.cat(images)[:3].numpy())
        np.testing.assert_array_equal(file["arr_1"], torch.cat(labels)[:3].numpy())
        assert file["arr_0"].std() > 5


@pytest.mark.parametrize(("sampler", "use_ddim"), [("uniform", False), ("loss-second-moment", True)])
def test_adms_training_bound_and_classifier_guidance(sampler, use_ddim, run, tmp_path, capsys):
    write_images(tmp_path / "data", [f"{name}_{i}.png" for name in "ab" for i in range(4)])
    flags = ["--data_dir", tmp_path / "data", "--log_dir", tmp_path / "log", "--schedule_sampler", sampler]
    flags += ["--learn_sigma", True, "--timestep_respacing", 6]
    model = run(
        "adm_train_and_nll.py", *flags, "--use_ddim", use_ddim, "--resume_checkpoint", "elsewhere/model000007.pt"
    )["trained"]
    out = capsys.readouterr().out
    assert "done 4 samples: bpd=" in out and out.endswith("sampling complete\n")
    with (tmp_path / "log" / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["7", "8"] and all(float(row["grad_norm"]) > 0 for row in rows)
    assert {key.partition("_q")[0] for key in rows[0]} == {"step", "loss", "mse", "vb", "grad_norm"}
    with np.load(tmp_path / "log" / "vb_terms.npz") as file:
        assert file["arr_0"].shape == (6,) and np.isfinite(file["arr_0"]).all()
    ema = load_model(tmp_path / "log" / "ema_0.9_000002.pt")
    last = "final_layer.linear.weight"  # starts at zero, so it tells the average
    ratio = ema.state_dict()[last].abs().sum() / model.state_dict()[last].abs().sum()
    assert 0.01 < ratio < 0.5

    # The same by our own keywords.
    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="6")
    assert diffusion.timestep_map == create_diffusion("6").timestep_map
    torch.manual_seed(1)
    labels = torch.randint(0, 1000, (4,))
    scale = torch.linspace(-1, 1, 192).view(3, 8, 8)

    def cond_fn(x, t, y):
        sign = torch.where(y % 2 == 0, 1.0, -1.0).view(-1, 1, 1, 1)
        score = (scale * x).mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)
        return sign * 2 * torch.sigmoid(-2 * sign * score) * scale / scale.numel()

    loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    expected = loop(model, shape=(4, 3, 8, 8), cond_fn=cond_fn, model_kwargs={"y": labels}, device="cpu")
    with np.load(tmp_path / "log" / "samples_4x8x8x3.npz") as file:
        pixels = ((expected + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert np.abs(file["arr_0"] - np.floor(pixels)).max() <= 1 and np.mean(file["arr_0"] != np.floor(pixels)) < 0.01
        assert file["arr_1"].tolist() == labels.tolist() and file["arr_0"].std() > 5


# ---------------------------------------------------------------- our scripts, by published commands


def test_commands_of_mdt_and_adm_draw_the_same(checkpoint, tmp_path, monkeypatch):
    words = sample_flags(checkpoint, tmp_path / "ours", num_samples=2, num_sampling_steps="ddim4", use_ddim=True)
    run_sample(monkeypatch, words)
    published = model_and_diffusion_defaults() | {"image_size": 8, "timestep_respacing": "ddim4"}
    words = ["--model_path", str(checkpoint), "--num_samples", "2", "--batch_size", "4", "--use_ddim", "True"]
    words += ["--cfg_cond", "True", "--log_dir", str(tmp_path / "theirs"), "--rank", "0", "--world_size", "1"]
    words += ["--dist_url", "env://", "--dist_on_itp", "--local-rank", "-1"]
    run_sample(monkeypatch, words + [word for key, value in published.items() for word in (f"--{key}", str(value))])
    ours, theirs = (read(tmp_path / folder / "samples_2x8x8x3.npz") for folder in ("ours", "theirs"))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)) and ours[0].std() > 5


def test_bare_weights_are_told_their_schedule_in_a_config(checkpoint, tmp_path):
    path = tmp_path / "weights.pt"
    shutil.copy(checkpoint / "ema_0.9_000005.pt", path)
    asked = TrainedConfig(class_cond=True, learn_sigma=True, noise_schedule="squaredcos_cap_v2")
    config = SampleConfig(WeightsConfig(model_path=str(path), vae_decoder="identity", trained=asked))
    with pytest.raises(
        UserError, match=r"there is no config\.json beside .*weights\.pt, .* with linear: .* into that"
    ) as e:
        load_weights(config)
    (tmp_path / "config.json").write_text(re.search(r"write (\{.*\}) into", str(e.value))[1])
    assert load_weights(config).diffusion["noise_schedule"] == "squaredcos_cap_v2"
