"""The pictures that infer_mdt.py draws, and what it refuses."""

import sys

import numpy as np
import pytest
from helpers import run_sample
from PIL import Image

import infer_mdt
from masked_diffusion import script_util
from masked_diffusion.utils.pictures import save_animation


def infer(monkeypatch, checkpoint, *words):
    flags = ["infer_mdt.py", "--model_path", str(checkpoint), "--num_sampling_steps", "4", *map(str, words)]
    monkeypatch.setattr(sys, "argv", flags)
    script_util.run(infer_mdt.main)


def pixels(path, scale=8):
    return np.asarray(Image.open(path))[::scale, ::scale].astype(int)


@pytest.fixture
def pictures(tmp_path):
    """An image of 8x8 pixels and a mask whose right half is white."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 8, axis=0).astype(np.uint8)).save(tmp_path / "mask.png")
    return tmp_path


def test_defaults_are_the_published_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infer_mdt.py"])
    flags = infer_mdt.parse_flags().values()
    assert flags["out"] == "sample.jpg" and flags["columns"] == 3
    assert [flags[name] for name in ("cfg_scale", "scale_pow", "num_sampling_steps", "seed")] == [4.0, 0.01, "250", 1]
    assert flags["cfg_cond"] is True and flags["model_path"] == "shgao/MDT-XL2"
    assert infer_mdt.choose_classes((), 1000) == ("19", "23", "106", "108", "278", "282")
    assert infer_mdt.choose_classes(("3",), 1000) == ("3",)
    assert infer_mdt.choose_classes((), 10) == tuple("012345") and infer_mdt.choose_classes((), 0) == ("0",)


def test_a_model_of_few_classes_draws_them(checkpoint, tmp_path, monkeypatch, capsys):
    infer(monkeypatch, checkpoint, "--out", tmp_path / "grid.png")
    assert pixels(tmp_path / "grid.png").shape == (8, 24, 3)
    assert "the first 3 of the model's 3 classes: choose others with --classes" in capsys.readouterr().out


@pytest.mark.parametrize("ending, kind", [("gif", "GIF"), ("png", "PNG"), ("webp", "WEBP")])
def test_an_animation_is_what_its_ending_says(tmp_path, ending, kind):
    frames = np.random.default_rng(0).integers(0, 256, (4, 2, 8, 8, 3), dtype=np.uint8)
    save_animation(tmp_path / f"way.{ending}", frames, columns=2)
    animation = Image.open(tmp_path / f"way.{ending}")
    assert (animation.format, animation.n_frames) == (kind, 4)
    if kind != "GIF":  # which has 256 colours
        animation.seek(3)
        assert np.array_equal(np.asarray(animation.convert("RGB")), np.concatenate(frames[3], axis=1))


def test_a_picture_is_that_of_the_sampling_script(checkpoint, tmp_path, monkeypatch):
    infer(monkeypatch, checkpoint, "--classes", 2, 0, 1, 2, "--out", tmp_path / "grid.png", "--scale_pow", 4)
    drawn = pixels(tmp_path / "grid.png")
    assert drawn.shape == (16, 24, 3) and (drawn[8:, 8:] == 255).all()
    sample = ["--model_path", checkpoint, "--log_dir", tmp_path, "--num_samples", 4, "--num_sampling_steps", 4]
    sample += ["--class_rule", "list", "--classes", 2, 0, 1, 2, "--cfg_cond", True, "--cfg_scale", 4.0, "--seed", 1]
    run_sample(monkeypatch, list(map(str, sample)))
    with np.load(tmp_path / "samples_4x8x8x3.npz", allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"].astype(int), arrays["arr_1"]
    assert labels.tolist() == [2, 0, 1, 2]
    assert np.abs(drawn[:8] - np.concatenate(images[:3], axis=1)).max() <= 1
    assert np.abs(drawn[8:, :8] - images[3]).max() <= 1


@pytest.mark.parametrize("solver", ["ddpm", "heun"])
def test_the_way_ends_at_the_picture(checkpoint, tmp_path, solver, monkeypatch):
    files = [tmp_path / name for name in ("grid.png", "strip.png", "way.gif")]
    words = ["--classes", 1, 2, "--solver", solver, "--clip_denoised", True]
    infer(monkeypatch, checkpoint, *words, "--out", files[0], "--trajectory", files[1], "--animate", files[2])
    grid, strip, animation = pixels(files[0]), pixels(files[1]), Image.open(files[2])
    frames = {"ddpm": 4, "heun": 7}[solver]
    assert strip.shape == (16, 8 * frames, 3) and animation.n_frames == frames
    for row, picture in enumerate((grid[:, :8], grid[:, 8:16])):
        assert np.abs(strip[8 * row : 8 * row + 8, -8:] - picture).max() <= 1


def test_a_hole_is_filled_and_an_image_is_varied(checkpoint, pictures, monkeypatch):
    image, words = pixels(pictures / "image.png", scale=1), ["--classes", 0, 1, "--out", pictures / "out.png"]
    infer(monkeypatch, checkpoint, *words, "--inpaint", pictures / "image.png", "--mask", pictures / "mask.png")
    drawn = pixels(pictures / "out.png")
    for place in (drawn[:, :8], drawn[:, 8:16]):
        assert np.array_equal(place[:, :4], image[:, :4]) and (place[:, 4:] != image[:, 4:]).mean() > 0.9
    filling = ["--inpaint", pictures / "image.png", "--mask", pictures / "mask.png", "--method", "side-interpolater"]
    infer(monkeypatch, checkpoint, *words, *filling)
    other = pixels(pictures / "out.png")
    assert np.array_equal(other[:, :4], image[:, :4]) and not np.array_equal(other, drawn)
    infer(monkeypatch, checkpoint, *words, "--variations", pictures / "image.png", "--strength", 0.3)
    assert not np.array_equal(pixels(pictures / "out.png"), drawn)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--inpaint", "image.png"], "--inpaint and --mask go together"),
        (["--method", "side-interpolater"], "--method side-interpolater says how a hole is filled"),
        (["--inpaint", "image.png", "--mask", "mask.png", "--variations", "image.png"], "exclude each other"),
        (["--inpaint", "absent.png", "--mask", "mask.png", "--classes", "0"], "absent.png"),
        (["--variations", "image.png", "--strength", "0"], "--strength is 0.0: it must be above 0 and at most 1"),
        (
            ["--variations", "image.png", "--solver", "euler", "--classes", "0"],
            "solver euler cannot start from an image",
        ),
        (["--classes", "3"], "class 3 does not exist"),
        (["--out", "nowhere/grid.png"], "nowhere is not a folder"),
        (["--out", "grid.txt"], "grid.txt has no extension of a picture format"),
        (["--out", "grid.psd"], "grid.psd has no extension of a picture format"),
        (["--animate", "way.jpg"], "--animate: way.jpg cannot be animated: use the extension .gif, .png or .webp"),
        (["--out", ""], "--out is '': it must be the path of a file"),
        (["--columns", "0"], "--columns is 0: it must be at least 1"),
        (["--model_path", "weights.pt"], "weights.pt does not exist"),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(checkpoint, pictures, words, message, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    with pytest.raises(SystemExit) as stop:
        infer(monkeypatch, checkpoint, *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
    assert not (pictures / "sample.jpg").exists()
