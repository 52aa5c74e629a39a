"""An image is a function of (seed, index); shards, merging, the script."""

import sys

import image_sample
import numpy as np
import pytest
import torch
from fill import fill
from PIL import Image
from test_train_util import run_script

from masked_diffusion import create_model, script_util
from masked_diffusion.autoencoder import IdentityFirstStage
from masked_diffusion.guidance import Guidance
from masked_diffusion.sampling import Sampler, ShardStore, choose_labels, to_uint8
from masked_diffusion.solvers import SOLVERS, create_solver


def small_model(**options):
    return fill(create_model("MDTv2_Nano_2", **{"input_size": 8, "in_channels": 3, "num_classes": 10} | options)).eval()


def make_sampler(model=None, solver="ddpm", **options):
    options = {"guidance": Guidance("power-cosine", 2.0), "seed": 4} | options
    return Sampler(model or small_model(), create_solver(solver, "6", {}), IdentityFirstStage(), **options)


# ---------------------------------------------------------------- images by index


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(solver):
    sampler, labels = make_sampler(solver=solver), choose_labels(range(6), "random", 10, seed=4)
    whole = sampler(range(6), labels).astype(int)
    parts = np.concatenate([sampler([5, 0], labels[[5, 0]]), sampler([3], labels[[3]])]).astype(int)
    assert np.abs(whole[[5, 0, 3]] - parts).max() <= 1
    assert np.abs(whole[0] - whole[1]).max() > 10
    assert np.abs(make_sampler(solver=solver, seed=5)(range(6), labels) - whole).max() > 10
    padded = make_sampler(solver=solver, batch_size=4, decode_batch=1)([5], labels[[5]]).astype(int)
    assert padded.shape == (1, 8, 8, 3) and np.abs(whole[[5]] - padded).max() <= 1


def test_labels_follow_the_rule():
    assert choose_labels([0, 9, 10, 23], "balanced", 10, seed=0).tolist() == [0, 9, 0, 3]
    labels = choose_labels(range(5000), "random", 10, seed=0)
    assert torch.equal(labels[7:9], choose_labels([7, 8], "random", 10, seed=0))
    assert np.abs(np.bincount(labels, minlength=10) - 500).max() < 5 * 500**0.5
    assert choose_labels(range(3), "random", 0, seed=0).tolist() == [0, 0, 0]
    assert choose_labels([0, 1, 2, 7], "list", 10, seed=0, classes=[5, 3]).tolist() == [5, 3, 5, 3]
    for rule, classes in (("sorted", []), ("list", []), ("random", [1])):
        with pytest.raises(ValueError, match=f"class_rule is '{rule}'"):
            choose_labels([0], rule, 10, seed=0, classes=classes)


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5 / 127.5]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


# ---------------------------------------------------------------- shards


def test_shards_are_merged_by_index(tmp_path):
    store, rng = ShardStore(tmp_path / "samples.npz", {"seed": 3}), np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (70, 4, 4, 3), dtype=np.uint8), np.arange(70)
    for indices in ([69, 3], list(range(10, 69)), [0, 1, 2, *range(4, 10)]):
        store.write(indices, images[indices], labels[indices])
    assert store.missing(72) == [70, 71] and not store.finished()
    with pytest.raises(ValueError, match=r"samples\.shards was made with seed 3, now it is 4"):
        ShardStore(tmp_path / "samples.npz", {"seed": 4})
    first = store.merge(70)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], labels)
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
    np.testing.assert_array_equal(first, images[:64])
    assert store.finished() and [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    with pytest.raises(ValueError, match=r"samples\.npz was made with seed 3, now it is 4"):
        ShardStore(tmp_path / "samples.npz", {"seed": 4})


# ---------------------------------------------------------------- the script


def sample_flags(checkpoint, log_dir, **options):
    flags = {"model_path": checkpoint, "log_dir": log_dir, "num_samples": 11, "batch_size": 4, "cfg_cond": True}
    flags |= {"num_sampling_steps": 3} | options
    return [word for key, value in flags.items() for word in (f"--{key}", *str(value).split("="))]


def read(path):
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int), arrays["arr_1"]


def test_one_and_two_processes_draw_the_same_images(checkpoint, tmp_path):
    run_script("image_sample.py", *sample_flags(checkpoint, tmp_path / "one"))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    run_script("image_sample.py", *sample_flags(checkpoint, tmp_path / "two", batch_size=3), launcher=launch)
    name = "samples_11x8x8x3.npz"
    (images, labels), (other, other_labels) = read(tmp_path / "one" / name), read(tmp_path / "two" / name)
    assert images.shape == (11, 8, 8, 3) and labels.shape == (11,) and set(labels) <= {0, 1, 2}
    assert np.abs(images - other).max() <= 1 and np.array_equal(labels, other_labels)
    assert Image.open(tmp_path / "one" / name.replace("npz", "png")).size == (64, 16)


def run_sample(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["image_sample.py", *flags])
    script_util.run(image_sample.main)


def test_a_stopped_run_draws_only_what_is_missing(checkpoint, tmp_path, monkeypatch, capsys):
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "whole"))
    images, _ = read(tmp_path / "whole" / "samples_11x8x8x3.npz")
    calls = []

    def stop_at_the_third(self, indices, labels, draw=Sampler.__call__):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, indices, labels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sampler, "__call__", stop_at_the_third)
        run_sample(patch, sample_flags(checkpoint, tmp_path / "parts"))
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "parts", batch_size=2))
    assert "8 of 11 images are there already" in capsys.readouterr().out
    assert np.abs(read(tmp_path / "parts" / "samples_11x8x8x3.npz")[0] - images).max() <= 1
    run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "parts", batch_size=2))
    assert "nothing to draw" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path / "parts", seed=1))
    assert "was made with seed 0, now it is 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_path": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"model": "MDTv2_S_2"}, "--model asks for MDTv2 of depth 12"),
        ({"image_size": 256}, "--image_size asks for 256, but the checkpoint has 8"),
        ({"num_sampling_steps": "fast"}, "timestep_respacing is 'fast'"),
        ({"class_rule": "list"}, "class_rule is 'list' with 0 classes"),
        ({"class_rule": "list", "classes": "3"}, "class 3 does not exist: the model has 3 classes"),
        ({"class_rule": "list", "classes": "dog"}, "the classes of this model have none"),
        ({"solver": "unipc", "num_sampling_steps": "ddim5"}, "'ddim5': solver unipc takes one number"),
        ({"solver": "heun", "use_ddim": True}, "--use_ddim True and --solver heun contradict"),
        ({"guidance": "interval", "guidance_interval": "9=3"}, "interval (9.0, 3.0) is empty"),
        ({"guide_path": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(checkpoint, tmp_path, options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_sample(monkeypatch, sample_flags(checkpoint, tmp_path, **options))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error
