"""Both backends against each other on a full Inception-v3, and TensorFlow against numpy on a small graph."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import DATA, REPO, crops, needs_tensorflow, small_features
from inception_graphs import NODES, write_small_graph
from sklearn.datasets import load_sample_images

from evaluations import errors
from evaluations.inception_tensorflow import TensorFlowInception
from evaluations.inception_torch import TorchInception, convolutions, read_weights

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def photos():
    """Batches of real photos of several sizes: smaller than the network's 299 pixels, larger, and not square."""
    with np.load(DATA / "loader.npz") as arrays:
        for kind in ("center/256", "center/64"):
            yield np.stack([arrays[key] for key in sorted(arrays) if key.startswith(kind)])[:4]
    images = np.stack(load_sample_images().images)
    yield images
    yield images[:, 100:356, 200:456]


def test_the_names_of_the_graph():
    expected = {k.removesuffix("/conv2d_params"): v.removesuffix(".conv") for k, v in NODES.items() if "conv2d" in k}
    assert convolutions() == expected and len(expected) == 94


def relative(found, expected):
    """Largest difference, as a share of the largest feature."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def test_what_makes_it_fast_does_not_change_the_features(inception_graph, tmp_path):
    """Against torch-fidelity's own network, which is slower."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(read_weights(inception_graph), tmp_path / "weights.pth")
    published = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], tmp_path / "weights.pth")
    own = TorchInception(inception_graph)
    for images in photos():
        pool, logits = published(torch.from_numpy(images).permute(0, 3, 1, 2))
        found = own(images)
        assert relative(found["pool"], pool) < 1e-5 and relative(found["logits"], logits) < 1e-5


@pytest.mark.parametrize("count", [pytest.param(66, marks=pytest.mark.slow), 18])
@pytest.mark.parametrize("backend", [TorchInception, pytest.param(TensorFlowInception, marks=needs_tensorflow)])
def test_features_do_not_depend_on_the_batch_size(inception_graph, backend, count):
    network, images = backend(inception_graph), crops(count, seed=4)
    whole, *parts = ([network(images[start : start + size]) for start in range(0, count, size)] for size in (64, 7, 1))
    for name in ("pool", "spatial", "logits"):
        expected = np.concatenate([features[name] for features in whole])
        for part in parts:
            assert relative(np.concatenate([features[name] for features in part]), expected) < 1e-5


def cpu_time():
    times = os.times()
    return times.user + times.system


@needs_tensorflow
@pytest.mark.slow
def test_torch_is_about_as_fast_as_tensorflow(inception_graph):
    networks, images = [TorchInception(inception_graph), TensorFlowInception(inception_graph)], crops(32, 0, size=256)
    spent = [[], []]
    for _ in range(3):
        for network, times in zip(networks, spent, strict=True):
            start = cpu_time()
            network(images)
            times.append(cpu_time() - start)
    torch_time, tensorflow_time = map(min, spent)
    print(f"\nCPU time of 32 images: torch {torch_time:.2f} s, TensorFlow {tensorflow_time:.2f} s")
    assert torch_time < 1.5 * tensorflow_time


@needs_tensorflow
@pytest.mark.slow
def test_torch_and_tensorflow_see_the_same(inception_graph):
    own, published = TorchInception(inception_graph), TensorFlowInception(inception_graph)
    for images in photos():
        expected, found = published(images), own(images)
        assert [f.shape[1] for f in expected.values()] == [2048, 2023, 1008]
        for name, features in found.items():
            scale = np.abs(expected[name]).mean()
            assert expected[name].std(axis=0).mean() > 0.02 * scale  # the photos differ in it
            np.testing.assert_allclose(features.numpy() / scale, expected[name] / scale, **TOLERANCE)
    np.testing.assert_array_equal(own.logit_weights, published.logit_weights)


def test_features_are_computed_in_full_float32_also_while_training_is_not(monkeypatch):
    network, seen = object.__new__(TorchInception), []
    network.device = torch.device("cpu")
    note = lambda self, images: seen.append(torch.get_float32_matmul_precision()) or {}  # noqa: E731
    monkeypatch.setattr(TorchInception, "_features", note)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        network(np.zeros((2, 4, 4, 3), dtype=np.uint8))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_weights_come_out_of_the_graph(inception_graph, tmp_path):
    inception = TorchInception(inception_graph)
    images = next(photos())[:2]
    first = inception(images)
    assert [tuple(f.shape) for f in first.values()] == [(2, 2048), (2, 2023), (2, 1008)]
    torch.testing.assert_close(first["logits"], first["pool"] @ inception.logit_weights)
    torch.save(read_weights(inception_graph), tmp_path / "weights.pth")
    again = TorchInception(tmp_path / "weights.pth")(images)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_torch_backend_needs_no_tensorflow(inception_graph):
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3\n"
        "from evaluations.inception_torch import read_weights; print(read_weights(sys.argv[1])['fc.weight'].shape)"
    )
    command = [sys.executable, "-c", code, inception_graph]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert "[1008, 2048]" in result.stdout


def test_a_graph_without_tensorboard_is_not_to_blame(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "tensorboard" else name)
    with pytest.raises(ValueError, match=r"^tensorboard is not installed, which .* needs: pip install tensorboard$"):
        read_weights(write_small_graph(tmp_path / "small.pb"))


@needs_tensorflow
def test_tensorflow_reads_adms_tensors(tmp_path):
    path = write_small_graph(tmp_path / "small.pb")
    images = next(photos())
    found = TensorFlowInception(path)(images)
    expected = small_features(path, images)
    for name, features in expected.items():
        np.testing.assert_allclose(found[name], features.numpy(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("backend", [TorchInception, pytest.param(TensorFlowInception, marks=needs_tensorflow)])
@pytest.mark.parametrize("content", [b"", b"\x0a\xff\xff\xff", b"\x80\x04.", b"\x0a\x05\x0a\x03abc"], ids=range(4))
def test_other_files_are_refused_in_one_sentence(tmp_path, backend, content):
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "graph.pb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"graph\.pb (is not|cannot be read as) the Inception"):
        backend(path)


def test_checkpoints_of_other_networks_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds another network"):
        TorchInception(tmp_path / "other.pth")
    for value in (torch.zeros(3), [1.0, 2.0], {"fc.weight": 3}):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth cannot be read as the Inception network \(it is no table"):
            TorchInception(tmp_path / "other.pth")
    torch.save({"code": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="cannot be read as the Inception network"):
        read_weights(tmp_path / "code.pth")
