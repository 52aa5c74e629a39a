"""DINOv2 features: timm's network and preprocessing, weights from a file."""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import evaluate, needs_tensorflow, numbers
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images

from evaluations import dinov2
from evaluations.metrics import frechet_distance, gaussian_statistics

MODEL = "vit_small_patch14_dinov2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the published size, for 518 pixels, and their network."""
    torch.manual_seed(0)
    network = timm.create_model(MODEL, num_classes=0, depth=2)
    path = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Two blocks are enough to test."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def test_features_are_the_class_token(weights):
    network = dinov2.DinoV2(weights, model=MODEL)
    images = np.stack(load_sample_images().images)[:, 100:324, 200:424]
    features = network(images)["dinov2"]
    assert features.shape == (2, 384)
    plain = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    plain = (plain - torch.tensor(dinov2.MEAN).view(3, 1, 1)) / torch.tensor(dinov2.STD).view(3, 1, 1)
    with torch.no_grad():
        expected = network.network.forward_head(network.network.forward_features(plain), pre_logits=True)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert network(images.repeat(2, axis=1).repeat(2, axis=2))["dinov2"].allclose(features, atol=0.2)


def test_the_same_weights_from_a_checkpoint(weights, tmp_path):
    network = dinov2.DinoV2(weights, model=MODEL)
    torch.save(load_file(weights), tmp_path / "model.pth")
    images = np.stack(load_sample_images().images)[:, :64, :80]
    again = dinov2.DinoV2(tmp_path / "model.pth", model=MODEL)
    assert torch.equal(network(images)["dinov2"], again(images)["dinov2"])


def test_wrong_weights_end_in_one_sentence(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("other.pth", "nowhere.safetensors"):
        with pytest.raises(ValueError, match=f"{name} does not hold the weights of timm's {MODEL}"):
            dinov2.DinoV2(tmp_path / name, model=MODEL)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"cannot be downloaded .* name that file with --dinov2"):
        dinov2.DinoV2("hub", model=MODEL)


@needs_tensorflow
def test_the_evaluator_adds_its_distance(weights, batches, tmp_path, monkeypatch, capsys):
    small = partial(dinov2.DinoV2, model=MODEL)
    monkeypatch.setattr(dinov2, "DinoV2", small)
    for name in ("reference", "samples"):
        with np.load(batches / f"{name}.npz") as arrays:
            np.savez(batches / f"few_{name}.npz", arrays["arr_0"][:12])
    files = [batches / "few_reference.npz", batches / "few_samples.npz", "--inception", batches / "small.pb"]
    flags = ["--backend=tensorflow", "--metrics=fid", "--dinov2", weights, "--bootstrap=2"]
    code, output, _ = evaluate(monkeypatch, capsys, *files, *flags, "--json", tmp_path / "a.json")
    row = json.loads((tmp_path / "a.json").read_text())
    assert row["dinov2"] == {"path": str(weights), "sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest()}
    reference, samples = (small(weights)(np.load(path)["arr_0"])["dinov2"] for path in files[:2])
    expected = frechet_distance(*gaussian_statistics(samples), *gaussian_statistics(reference))
    assert code == 0 and list(numbers(output)) == ["FID", "FD-DINOv2"]
    assert numbers(output)["FD-DINOv2"] == pytest.approx(expected, rel=1e-4) and expected > 0
    assert "FD-DINOv2 interval (95 %)" in output
