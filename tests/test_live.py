"""Evaluation while a model is in training: the right numbers, of the EMA, and not a bit of the run changed."""

import json

import numpy as np
import pytest
import torch
from helpers import assert_same, crops, evaluate, fork, numbers, run_train, tensors, train_flags

from evaluations import errors, live
from evaluations.inception_torch import TorchInception
from evaluations.live import LiveEvaluation
from evaluations.metrics import frechet_distance, gaussian_statistics, kernel_distance
from masked_diffusion import load_model
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.sampling import during_training
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels
from masked_diffusion.sampling.solvers import create_solver

OPTIONS = {"max_steps": 4, "save_interval": 2, "optimizer": "adan", "log_interval": 2}


@pytest.fixture(autouse=True)
def no_inception(tmp_path, monkeypatch):
    monkeypatch.delenv("INCEPTION_V3_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def reference(tmp_path):
    np.savez(tmp_path / "reference.npz", crops(40, seed=0, size=8))
    return tmp_path / "reference.npz"


def evaluation_flags(reference, **options):
    return OPTIONS | {"eval_interval": 1, "eval_samples": 11, "eval_reference": reference} | options


def rows(folder):
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def pixels(images):
    return images.reshape(len(images), 64, 3).transpose(0, 2, 1).reshape(len(images), -1) / 255


def test_evaluation_changes_nothing_and_resumes_bitwise(images, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(during_training, "STEPS", 4)
    flags = evaluation_flags(reference)
    run_train(monkeypatch, train_flags(images, tmp_path / "without", **OPTIONS))
    run_train(monkeypatch, train_flags(images, tmp_path / "with", **flags))
    run_train(monkeypatch, train_flags(images, tmp_path / "parts", **flags | {"max_steps": 2}))
    run_train(monkeypatch, train_flags(images, tmp_path / "parts", **flags))
    run_train(monkeypatch, train_flags(images, tmp_path / "switched", **flags | {"max_steps": 2}))
    run_train(monkeypatch, train_flags(images, tmp_path / "switched", **OPTIONS))
    expected = tensors(tmp_path / "without", 4)
    for kind in ("with", "parts", "switched"):
        assert_same(tensors(tmp_path / kind, 4), expected)
    values = [row["eval_frechet_pixels"] for row in rows(tmp_path / "with")]
    assert len(values) == 4 and len(set(values)) == 4
    assert [row["eval_frechet_pixels"] for row in rows(tmp_path / "parts")] == values
    assert [row["step"] for row in rows(tmp_path / "without")] == [2, 4]
    assert "eval_frechet_pixels" not in rows(tmp_path / "without")[0]
    assert (tmp_path / "with" / "progress.csv").read_text().count("eval_frechet_pixels") == 1
    assert values[-1] == pytest.approx(distance_of_the_ema(tmp_path / "with", reference), rel=1e-3)


def distance_of_the_ema(folder, reference):
    """What the evaluation of step 4 should have found, from the checkpoint."""
    model = load_model(folder / "ema_0.9_000004.pt")
    sampler = ImageSampler(model, create_solver("ddpm", "4", {"snr_gamma": 5.0}), IdentityFirstStage(), seed=0)
    drawn = sampler(range(11), choose_labels(range(11), "balanced", 3, 0))
    with np.load(reference) as arrays:
        return frechet_distance(*gaussian_statistics(pixels(drawn)), *gaussian_statistics(pixels(arrays["arr_0"])))


def test_ranks_share_the_images(images, reference, tmp_path, monkeypatch):
    flags = evaluation_flags(reference, max_steps=1, eval_samples=5)
    run_train(monkeypatch, train_flags(images, tmp_path / "one", **flags))
    fork("image_train.py", train_flags(images, tmp_path / "two", **flags | {"batch_size": 4}), ranks=2)
    one, two = (rows(tmp_path / ranks)[0]["eval_frechet_pixels"] for ranks in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_training_finds_what_the_evaluator_finds(inception_graph, tmp_path, monkeypatch, capsys):
    """The same images through both code paths, in other batches, where Inception is at hand."""
    monkeypatch.setenv("INCEPTION_V3_PATH", str(inception_graph))
    reference, samples = crops(3, seed=0), crops(4, seed=1)
    mu, sigma = gaussian_statistics(TorchInception(inception_graph)(reference)["pool"].numpy())
    np.savez(tmp_path / "ready.npz", reference, mu=mu + 1, sigma=sigma)
    np.savez(tmp_path / "samples.npz", samples)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = LiveEvaluation(tmp_path / "ready.npz", (32, 32))([samples[:3], samples[3:]])
    assert torch.equal(torch.get_rng_state(), before)
    files = [tmp_path / "ready.npz", tmp_path / "samples.npz", "--metrics=fid,kid", "--backend=torch"]
    code, output, _ = evaluate(monkeypatch, capsys, *files)
    assert code == 0 and found["fid"] > 1000
    assert found["fid"] == pytest.approx(numbers(output)["FID"], rel=1e-6)
    assert found["kid"] == pytest.approx(numbers(output)["KID"], rel=1e-5)


def test_references_that_cannot_serve_are_refused(reference, tmp_path, images, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"images of \(8, 8\), the model draws \(16, 16\)"):
        LiveEvaluation(reference, (16, 16))
    np.savez(tmp_path / "equal.npz", crops(1, seed=0, size=16).repeat(5, axis=0))
    with pytest.raises(ValueError, match="all 5 images are the same"):
        LiveEvaluation(tmp_path / "equal.npz", (16, 16))
    np.savez(tmp_path / "ready.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="is not at hand"):
        LiveEvaluation(tmp_path / "ready.npz", (16, 16))
    for options, message in (
        ({"eval_interval": 2}, "--eval_reference"),
        (evaluation_flags(reference, eval_samples=1), "--eval_samples is 1"),
        (evaluation_flags(tmp_path / "nowhere.npz"), "error: --eval_reference: "),
        (evaluation_flags(tmp_path / "ready.npz"), "is not at hand"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_train(monkeypatch, train_flags(images, tmp_path / "run", **options))
        assert stop.value.code == 2 and message in capsys.readouterr().err


class PixelInception:
    """Pixels in the place of Inception's features."""

    def __init__(self):
        self.sizes = {"pool": 48}

    def __call__(self, images):
        return {"pool": torch.from_numpy(images.reshape(len(images), 48)).float() / 64}


@pytest.mark.parametrize("ready", [False, True])
def test_the_kid_of_an_ordered_reference_is_that_of_the_whole(tmp_path, monkeypatch, ready):
    """Its images lie class by class, as make_reference.py writes them; here a class is a brightness."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (2000, 4, 4, 3))
    images = (np.repeat(np.arange(40), 50)[:, None, None, None] * 5 + noise).astype(np.uint8)
    samples = images[rng.permutation(2000)[:800]]
    pool = PixelInception()
    features, drawn = pool(images)["pool"].numpy(), pool(samples)["pool"].numpy()
    statistics = dict(zip(("mu", "sigma"), gaussian_statistics(features), strict=True)) if ready else {}
    np.savez(tmp_path / "ordered.npz", images, **statistics)
    monkeypatch.setattr(live, "inception_at_hand", lambda: "weights")
    monkeypatch.setattr(live, "KID_IMAGES", 500)
    monkeypatch.setattr(LiveEvaluation, "_inception", lambda self, weights, device: pool)
    found = LiveEvaluation(tmp_path / "ordered.npz", (4, 4))([samples[:300], samples[300:]])
    expected, deviation = kernel_distance(features, drawn)
    first = kernel_distance(features[:500], drawn)[0]
    assert abs(found["kid"] - expected) < 2 * deviation < 0.2 * first
    assert found["fid"] == frechet_distance(*gaussian_statistics(drawn), *gaussian_statistics(features))


def test_a_network_that_is_named_is_used_or_missed(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("INCEPTION_V3_PATH", str(tmp_path / "typo.pb"))
    with pytest.raises(ValueError, match=r"INCEPTION_V3_PATH names .*typo\.pb, which does not exist"):
        LiveEvaluation(reference, (8, 8))
    (tmp_path / "typo.pb").write_bytes(b"weights")
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torch-fidelity is not installed, which INCEPTION_V3_PATH=.*typo\.pb needs"):
        LiveEvaluation(reference, (8, 8))


def test_large_images_are_averaged_down():
    images = crops(2, seed=0, size=64)
    features = live.pixel_features(images)["pool"].numpy()
    expected = images.reshape(2, 16, 4, 16, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(2, -1) / 255
    np.testing.assert_allclose(features, expected, atol=1e-6)
