"""The diffusers pipeline draws what image_sample.py draws, and comes back from a folder."""

import json
import sys

import diffusers
import image_sample
import numpy as np
import pytest
import torch
from helpers import generators, read, run_export, sample_flags, small_model

from masked_diffusion import load_model, script_util
from masked_diffusion.pipeline import MDTPipeline, build_pipeline, make_scheduler
from masked_diffusion.weights.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def pipeline_folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_export(monkeypatch, model_path=checkpoint, out=folder, format="pipeline")
    return folder


@pytest.mark.parametrize("steps, guided", [(3, True), (21, False)])
def test_the_saved_pipeline_draws_the_images_of_the_script(
    checkpoint, pipeline_folder, steps, guided, tmp_path, monkeypatch
):
    flags = sample_flags(checkpoint, tmp_path, num_sampling_steps=steps, cfg_cond=guided, seed=7)
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *flags])
    script_util.run(image_sample.main)
    images, labels = read(tmp_path / "samples_11x8x8x3.npz")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        pipeline_folder, custom_pipeline=str(pipeline_folder), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        labels.tolist(), guidance_scale=3.8 if guided else 1.0, num_inference_steps=steps,
        generator=generators(7, 11), output_type="np",
    )  # fmt: skip
    assert np.abs(np.rint(out.images * 255) - images).max() <= 1
    picture = pipe([int(labels[0])], 3.8 if guided else 1.0, steps, generators(7, 1)).images[0]
    assert picture.size == (8, 8) and np.abs(np.asarray(picture).astype(int) - images[0]).max() <= 1


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"])
def test_other_schedulers_take_the_prediction_alone(pipeline_folder, name):
    pipe = MDTPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    images = pipe([0, 1], 2.0, 4, generators(0, 2), output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all() and 0 <= images.min() <= images.max() <= 1


def test_classes_go_by_name(tmp_path, monkeypatch):
    model = small_model(num_classes=2)
    save_checkpoint(tmp_path, 5, model.state_dict(), {"0.9": model.state_dict()}, {"step": 5})
    config = {
        "model": {"name": "MDTv2_Nano_2", "options": {"input_size": 8, "in_channels": 3, "num_classes": 2}},
        "vae": "identity",
        "classes": ["n02099601", "n02120079"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_export(monkeypatch, model_path=tmp_path, out=tmp_path / "pipe", format="pipeline")
    pipe = MDTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.class_names == ["golden retriever", "Arctic fox, white fox, Alopex lagopus"]
    assert pipe.get_label_ids(["Arctic fox", 0]) == [1, 0]
    for call, message in (
        (([2],), "class 2 does not exist"),
        (([],), "class_labels is empty: give a name or number of a class for each image"),
        (([""],), "a class is ''"),
        (([0, 1], 2.0, 3, generators(0, 3)), "generator is a list of 3, but class_labels asks for 2 images"),
        (([0], 2.0, 0), "num_inference_steps is 0: it must be at least 1"),
        (([0], float("nan"), 2), "cfg_scale of the guidance is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(*call)
    torch.nn.init.constant_(pipe.transformer.model.final_layer.linear.bias, float("nan"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="image 0 has pixels that are NaN or infinite"):
        pipe([0, 1], 1.0, 2)


def test_latents_are_decoded_by_the_vae(vae_folder, tmp_path):
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder, low_cpu_mem_usage=False)
    options = {"input_size": 4, "num_classes": 3}
    model = small_model(in_channels=4, **options)
    pipe = build_pipeline({"name": "MDTv2_Nano_2", "options": options}, model.state_dict(), {}, vae)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipe")
    again = MDTPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    first, second = (p([1], 2.0, 3, generators(0, 1), output_type="np").images for p in (pipe, again))
    assert first.shape == (1, 32, 32, 3) and np.array_equal(first, second)


def test_a_safetensors_folder_samples_like_its_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    run_export(monkeypatch, model_path=checkpoint, out=tmp_path / "folder")
    model, again = load_model(checkpoint), load_model(tmp_path / "folder")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["vae"] == "identity" and config["num_classes"] == 3 and config["diffusion"]["snr_gamma"] == 5.0
    assert torch.equal(type(model).from_pretrained(tmp_path / "folder").pos_embed, model.pos_embed)
    with pytest.raises(SystemExit):
        run_export(monkeypatch, model_path=checkpoint, out=tmp_path / "folder")
    assert f"error: {tmp_path / 'folder'} is there already" in capsys.readouterr().err


def test_the_scheduler_says_how_the_model_was_trained():
    assert make_scheduler({}).config.variance_type == "learned_range"
    config = make_scheduler({"learn_sigma": False, "sigma_small": True, "predict_v": True}).config
    assert (config.variance_type, config.prediction_type) == ("fixed_small", "v_prediction")
    assert make_scheduler({"predict_xstart": True}).config.prediction_type == "sample"
