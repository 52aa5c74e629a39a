import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fill import fill, tensor

from masked_diffusion import create_model
from masked_diffusion.weights.checkpoint import save_checkpoint

DATA = Path(__file__).parent / "data"
REPO = Path(__file__).parent.parent
needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="TensorFlow is not installed")
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
