"""Autoencoders of diffusers as first stages: their scale and shift in training, caches, samples and exports."""

import json
import shutil
import sys

import diffusers
import encode_latents
import export
import numpy as np
import pytest
import torch
from helpers import read, run_sample, run_train, sample_flags, small_model, train_flags

from masked_diffusion import script_util
from masked_diffusion.config import OLDER_AUTOENCODER, RunConfig
from masked_diffusion.latents.autoencoder import (
    SD_VAES,
    check_first_stage,
    create_first_stage,
    describe_first_stage,
    load_autoencoder,
)
from masked_diffusion.latents.cache import LatentCache
from masked_diffusion.pipeline import MDTPipeline, build_pipeline
from masked_diffusion.sample_config import SampleConfig
from masked_diffusion.sampling.build import load_image_sampler
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.random_numbers import fold_seed

# What is recorded of the folders of the fixture `autoencoders`.
FACTS = {
    "sdxl": {"channels": 4, "downsample": 8, "scale": 0.13025, "shift": 0.0},
    "flux": {"channels": 16, "downsample": 8, "scale": 0.3611, "shift": 0.1159},
    "dc": {"channels": 32, "downsample": 32, "scale": 0.41407, "shift": 0.0},
    "tiny": {"channels": 4, "downsample": 8, "scale": 1.0, "shift": 0.0},
}
every_kind = pytest.mark.parametrize("kind", FACTS)


def pixels(size=64, num=2):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def run(monkeypatch, script, **flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *(f"--{key}={value}" for key, value in flags.items())])
    script_util.run(script.main)


def test_pixels_pass_unchanged():
    stage, images = create_first_stage("identity"), torch.randn(2, 3, 8, 8)
    assert stage.decode(stage.encode(images)) is images
    assert describe_first_stage(stage) == {"channels": 3, "downsample": 1, "scale": 1.0, "shift": 0.0}


def test_a_vae_from_a_folder(vae_folder):
    stage, images = create_first_stage(vae_folder), torch.rand(2, 3, 32, 32) * 2 - 1
    assert (stage.channels, stage.downsample) == (4, 8)
    latents = stage.encode(images, torch.ones_like)
    posterior = stage.vae.encode(images).latent_dist
    torch.testing.assert_close(latents, (posterior.mean + posterior.std) * 0.18215)
    assert not latents.requires_grad
    torch.testing.assert_close(stage.decode(latents), stage.vae.decode(latents / 0.18215).sample)
    torch.manual_seed(1)
    drawn = stage.encode(images)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, posterior.sample() * stage.scale)


@every_kind
def test_latents_have_the_scale_and_shift_of_the_configuration(autoencoders, kind):
    stage, vae = create_first_stage(str(autoencoders / kind)), load_autoencoder(str(autoencoders / kind))
    assert describe_first_stage(stage) == FACTS[kind]
    encoded, draws = vae.encode(pixels()), []
    if kind in ("sdxl", "flux"):
        z = encoded.latent_dist.mean + encoded.latent_dist.std
    else:
        z = encoded.latent if kind == "dc" else encoded.latents
    # As diffusers' pipelines of Stable Diffusion 3 and FLUX go to latents and back.
    shift, scale = getattr(vae.config, "shift_factor", None) or 0, vae.config.scaling_factor
    latents = stage.encode(pixels(), lambda like: draws.append(like) or torch.ones_like(like))
    torch.testing.assert_close(latents, (z - shift) * scale, rtol=0, atol=0)
    torch.testing.assert_close(stage.decode(latents), vae.decode((latents / scale) + shift).sample, rtol=0, atol=0)
    assert len(draws) == (1 if kind in ("sdxl", "flux") else 0) and not latents.requires_grad


@every_kind
def test_a_run_in_the_latents_of_each_kind(autoencoders, kind, images, tmp_path, monkeypatch):
    facts, folder = FACTS[kind], str(autoencoders / kind)
    size = 4 * facts["downsample"]
    options = {"vae": folder, "image_size": size, "max_steps": 2, "decode_layer": 4, "num_workers": 0, "batch_size": 4}
    encode = {"data_dir": images, "latent_dir": tmp_path / "cache", "image_size": size, "vae": folder}
    run(monkeypatch, encode_latents, **encode, num_workers=0, batch_size=24)
    cache = LatentCache(tmp_path / "cache")
    moments = 2 if kind in ("sdxl", "flux") else 1
    assert cache.header | facts | {"moments": moments, "vae_precision": "fp32"} == cache.header
    assert cache.open(0).shape == (24, 2, moments, facts["channels"], 4, 4)
    run_train(monkeypatch, train_flags(images, tmp_path / "live", **options))
    run_train(monkeypatch, train_flags("", tmp_path / "cached", latent_dir=tmp_path / "cache", **options))
    rows = [(tmp_path / name / "progress.jsonl").read_text().splitlines() for name in ("live", "cached")]
    live, cached = ([json.loads(line)["loss"] for line in lines] for lines in rows)
    np.testing.assert_allclose(cached, live, rtol=2e-3)
    config = json.loads((tmp_path / "live" / "config.json").read_text())
    assert config["autoencoder"] == facts
    shape = {"input_size": 4, "in_channels": facts["channels"]}
    assert config["model"]["options"] | shape == config["model"]["options"]

    guided = {"cfg_cond": True, "cfg_scale": 3.0, "seed": 7, "num_samples": 2}
    run_sample(monkeypatch, sample_flags(tmp_path / "live", tmp_path / "samples", **guided, quantize="round"))
    drawn, labels = read(tmp_path / "samples" / f"samples_2x{size}x{size}x3.npz")
    run(monkeypatch, export, model_path=tmp_path / "live", out=tmp_path / "folder")
    assert RunConfig.from_json(json.loads((tmp_path / "folder" / "config.json").read_text())).autoencoder == facts
    run(monkeypatch, export, model_path=tmp_path / "folder", out=tmp_path / "pipe", format="pipeline")
    pipe = MDTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.config.autoencoder == facts
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(fold_seed(7, i)) for i in range(2)]
    out = pipe(labels.tolist(), 3.0, 3, generators, output_type="np").images
    assert drawn.std() > 0 and np.abs(np.rint(out * 255) - drawn).max() <= 1


# ---------------------------------------------------------------- speed


@every_kind
def test_bf16_changes_pixels_little(autoencoders, kind, capsys):
    stages = [create_first_stage(str(autoencoders / kind), precision=precision) for precision in ("fp32", "bf16")]
    exact, rounded = (stage.moments(pixels()) for stage in stages)
    latents = stages[0].encode(pixels())
    images, other = (stage.decode(latents) for stage in stages)
    assert {tensor.dtype for tensor in (exact, rounded, images, other)} == {torch.float32}
    torch.testing.assert_close(rounded, exact, rtol=0, atol=float(exact.std()) / 10)
    difference = (to_byte(images) - to_byte(other)).abs()
    with capsys.disabled():
        print(f" {kind}: pixels differ by {difference.mean():.2f} of 255 on average, {difference.max():.0f} at most")
    assert 0 < difference.mean() < 1 and difference.max() < 32
    weights = [next(p for p in stage.vae.parameters() if p.ndim == 4 and min(p.shape) > 1) for stage in stages]
    assert [w.is_contiguous(memory_format=torch.channels_last) for w in weights] == [False, True]
    assert [stage.precision for stage in stages] == ["fp32", "bf16"]


def to_byte(images):
    return ((images + 1) * 127.5).clamp(0, 255).round()


def test_a_run_in_bf16_needs_a_cache_in_bf16(autoencoders, images, tmp_path, monkeypatch, capsys):
    flags = {"vae": autoencoders / "tiny", "image_size": 32}
    encode = flags | {"data_dir": images, "latent_dir": tmp_path / "cache", "num_workers": 0, "vae_precision": "bf16"}
    run(monkeypatch, encode_latents, **encode)
    flags |= {"latent_dir": tmp_path / "cache", "decode_layer": 4, "max_steps": 1, "num_workers": 0}
    with pytest.raises(SystemExit):
        run_train(monkeypatch, train_flags("", tmp_path / "run", **flags))
    assert "was made with vae_precision bf16" in capsys.readouterr().err
    run_train(monkeypatch, train_flags("", tmp_path / "run", **flags, vae_precision="bf16"))
    with pytest.raises(SystemExit):
        run_train(monkeypatch, train_flags(images, tmp_path / "run", **flags | {"latent_dir": "", "max_steps": 2}))
    assert "--vae_precision was bf16" in capsys.readouterr().err
    sample = {"num_samples": 1, "cfg_cond": False}
    run_sample(monkeypatch, sample_flags(tmp_path / "run", tmp_path / "out", **sample, vae_precision="bf16"))
    with np.load(tmp_path / "out" / "samples_1x32x32x3.npz", allow_pickle=False) as arrays:
        assert json.loads(str(arrays["settings"]))["vae_precision"] == "bf16"
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, sample_flags(tmp_path / "run", tmp_path / "out", **sample))
    assert "was made with vae_precision bf16, now it is fp32" in capsys.readouterr().err


def test_parts_are_compiled_one_by_one(autoencoders, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_eagerly(self, **options):
        compiled.append(self)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    source = str(autoencoders / "tiny")
    plain, stage = create_first_stage(source), create_first_stage(source, compiled=["encoder", "decoder"])
    assert compiled == [stage.vae.encoder, stage.vae.decoder]
    moments = plain.moments(pixels())
    torch.testing.assert_close(stage.moments(pixels()), moments)
    torch.testing.assert_close(stage.decode(moments[:, 0]), plain.decode(moments[:, 0]))
    assert stage.vae.state_dict().keys() == plain.vae.state_dict().keys()


# ---------------------------------------------------------------- what was recorded


def write_model(folder, vae, in_channels, **config):
    """A training folder with an untrained model of `in_channels` x 4 x 4 latents."""
    options = {"input_size": 4, "in_channels": in_channels, "num_classes": 3}
    folder.mkdir()
    torch.save(small_model(**options).state_dict(), folder / "ema_0.9_000005.pt")
    model = {"name": "MDTv2_Nano_2", "options": options}
    (folder / "config.json").write_text(json.dumps({"model": model, "vae": str(vae)} | config))
    return folder


def load(folder, **options):
    return load_image_sampler(SampleConfig().replaced(model_path=str(folder), num_sampling_steps="3", **options))[0]


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_checkpoint_of_an_older_version_samples_the_same_images(autoencoders, kind, tmp_path, monkeypatch):
    """Those gave 0.18215 to every autoencoder, and recorded nothing of it."""
    folder = write_model(tmp_path / "run", autoencoders / kind, FACTS[kind]["channels"])
    sampler, labels = load(folder), torch.tensor([0, 2])
    *_, last = sampler.progressive(range(2), labels)
    vae = diffusers.AutoencoderKL.from_pretrained(autoencoders / kind, low_cpu_mem_usage=False)
    expected = to_byte(vae.decode(last["sample"] / 0.18215).sample.detach()).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(sampler(range(2), labels), expected)
    # Exports take the scale along, also as their autoencoder's own; pipelines of older versions say nothing of it.
    run(monkeypatch, export, model_path=folder, out=tmp_path / "pipe", format="pipeline")
    index = tmp_path / "pipe" / "model_index.json"
    described = json.loads(index.read_text())
    assert described["autoencoder"] == FACTS[kind] | OLDER_AUTOENCODER
    generators = [torch.Generator().manual_seed(fold_seed(0, i)) for i in range(2)]
    del described["autoencoder"]
    shutil.copy(autoencoders / kind / "config.json", tmp_path / "pipe" / "vae")
    index.write_text(json.dumps(described))
    pipe = MDTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([0, 2], 1.0, 3, generators, output_type="np").images
    assert np.abs(np.rint(drawn * 255) - expected).max() <= 1


def test_an_older_run_goes_on_with_its_scale(autoencoders, images, tmp_path, monkeypatch, capsys):
    flags = {"vae": autoencoders / "sdxl", "image_size": 32, "max_steps": 1, "decode_layer": 4, "num_workers": 0}
    run_train(monkeypatch, train_flags(images, tmp_path, **flags))
    path = tmp_path / "config.json"
    older = json.loads(path.read_text())
    del older["autoencoder"]
    path.write_text(json.dumps(older))
    run_train(monkeypatch, train_flags(images, tmp_path, **flags | {"max_steps": 2}))
    assert json.loads(path.read_text())["autoencoder"] == FACTS["sdxl"] | OLDER_AUTOENCODER
    assert "scale 0.18215, shift 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # a run that recorded its scale needs an autoencoder of this scale
        run_train(monkeypatch, train_flags(images, tmp_path, **flags | {"max_steps": 3}))
    assert "the scale of the autoencoder was 0.18215" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recorded, other, message",
    [
        ("sdxl", "flux", "has channels 16, but the model was trained with 4"),
        ("tiny", "sdxl", "has scale 0.13025, but the model was trained with 1.0"),
        ("flux", "sdxl", "has channels 4, but the model was trained with 16"),
        (None, "dc", "has channels 32, but the model was trained with 4"),
        ("sdxl", "identity", "has channels 3, but the model was trained with 4"),
    ],
)
def test_another_autoencoder_is_refused_with_both_numbers(autoencoders, tmp_path, recorded, other, message):
    config = {"autoencoder": FACTS[recorded]} if recorded else {}
    channels = FACTS[recorded]["channels"] if recorded else 4
    folder = write_model(tmp_path / "run", autoencoders / (recorded or "sdxl"), channels, **config)
    name = other if other == "identity" else str(autoencoders / other)
    with pytest.raises(UserError, match=f"{message}: name the one that it was trained with, as --vae_decoder"):
        load(folder, vae_decoder=name)


def test_another_factor_or_shift_is_refused(autoencoders):
    stage = create_first_stage(str(autoencoders / "flux"))
    check_first_stage(stage, 16, FACTS["flux"])
    for name, value, message in (("downsample", 4, "downsampling 8"), ("shift", 0.0609, "shift 0.1159")):
        with pytest.raises(UserError, match=f"has {message}, but the model was trained with {value}"):
            check_first_stage(stage, 16, FACTS["flux"] | {name: value})


def test_a_pipeline_refuses_another_vae(autoencoders):
    first, second = (load_autoencoder(str(autoencoders / kind)) for kind in ("sdxl", "tiny"))
    options = {"input_size": 4, "in_channels": 4, "num_classes": 3}
    model_config = {"name": "MDTv2_Nano_2", "options": options}
    pipe = build_pipeline(model_config, small_model(**options).state_dict(), {}, first)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae = second
    with pytest.raises(UserError, match=r"has scale 1\.0, but the model was trained with 0\.13025"):
        pipe([0], 1.0, 2)


# ---------------------------------------------------------------- what is no autoencoder


def test_missing_weights_say_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"download config\.json and diffusion_pytorch_model\.safetensors"):
        create_first_stage(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel: name an autoencoder of images, of AutoencoderKL"),
        ({"scaling_factor": 0}, "has scaling_factor 0, shift_factor 0.0 and 3 input channels"),
        ({"scaling_factor": "large"}, "has scaling_factor large"),
        ({"in_channels": 4}, r"cannot be built \("),
        ({"block_out_channels": "wide"}, r"cannot be built \("),
        ("truncated", r"cannot be built|no VAE at"),
    ],
    ids=str,
)
def test_a_damaged_folder_is_a_sentence(autoencoders, tmp_path, change, message):
    folder = shutil.copytree(autoencoders / "sdxl", tmp_path / "vae")
    if change == "truncated":
        weights = folder / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        create_first_stage(str(folder))


def test_the_vae_of_a_pipeline_is_named_by_its_subfolder(autoencoders, tmp_path, monkeypatch):
    shutil.copytree(autoencoders / "flux", tmp_path / "vae")
    with pytest.raises(UserError, match=f"is a pipeline: name the VAE in it, {tmp_path / 'vae'}"):
        create_first_stage(str(tmp_path))
    asked = []
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "load_config", lambda *names, **options: asked.append((names, options)) or {}
    )
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "from_pretrained", lambda *names, **options: asked.append((names, options)) or 1 / 0
    )
    for source in ("black-forest-labs/FLUX.1-schnell/vae", "ema"):
        with pytest.raises(UserError, match="cannot be built"):
            create_first_stage(source)
    hub = [(names[0], options.get("subfolder")) for names, options in asked]
    assert hub == [("black-forest-labs/FLUX.1-schnell", "vae")] * 2 + [(SD_VAES["ema"], None)] * 2


@pytest.mark.parametrize(
    "recorded",
    [[1], {"scale": "1"}, {"scale": 0.0, "shift": 0.0}, {"channels": 4}, {"scale": float("nan"), "shift": 0.0}],
    ids=str,
)
def test_a_record_of_another_form_is_a_sentence(recorded):
    with pytest.raises(UserError, match="its 'autoencoder' is"):
        RunConfig.from_json({"vae": "ema", "autoencoder": recorded})
