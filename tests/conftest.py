import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from fill import fill, tensor
from helpers import DATA, crops
from PIL import Image

from masked_diffusion import create_model
from masked_diffusion.weights.checkpoint import save_checkpoint

torch.set_num_threads(min(4, torch.get_num_threads()))


@pytest.fixture
def golden():
    """Loader of a vector file made by the published implementation."""
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture
def latents():
    return tensor("x", (2, 4, 32, 32))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A small AutoencoderKL of the Stable Diffusion kind, with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        norm_num_groups=4,
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def inception_graph(tmp_path_factory):
    """A full Inception-v3 graph with the published node names and random weights."""
    extractors = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    from inception_graphs import write_inception_graph

    network = extractors.FeatureExtractorInceptionV3
    with mock.patch("torch.load"), mock.patch.object(network, "load_state_dict"), torch.device("meta"):
        modules = network("inception", ["2048"], "no weights")
    return write_inception_graph(tmp_path_factory.mktemp("inception") / "graph.pb", modules)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A training folder with an untrained model of three classes of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("model")
    model = fill(create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=3))
    save_checkpoint(folder, 5, model.state_dict(), {"0.9": model.state_dict()}, {"step": 5})
    config = {
        "model": {"name": "MDTv2_Nano_2", "options": {"input_size": 8, "in_channels": 3, "num_classes": 3}},
        "diffusion": {"snr_gamma": 5.0},
        "vae": "identity",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def named_checkpoint(checkpoint, tmp_path_factory):
    """`checkpoint` with names for its classes."""
    folder = tmp_path_factory.mktemp("named") / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"classes": ["zero", "one", "two"]}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 24 images of 16x16 pixels, of three classes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{'abc'[i % 3]}_{i}.png")
    return folder


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Crops of photos as reference.npz, samples.npz and other_seed.npz, and a small Inception graph, small.pb."""
    from inception_graphs import write_small_graph

    folder = tmp_path_factory.mktemp("batches")
    np.savez(folder / "reference.npz", crops(150, seed=0))
    darker = (crops(120, seed=1) * 0.8).astype(np.uint8)
    np.savez(folder / "samples.npz", darker, settings=np.array('{"cfg_scale": 3.8}'))
    np.savez_compressed(folder / "other_seed.npz", (crops(120, seed=2) * 0.8).astype(np.uint8))
    write_small_graph(folder / "small.pb")
    return folder
