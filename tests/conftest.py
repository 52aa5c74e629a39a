from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fill import tensor

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
