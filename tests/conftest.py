import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter runs the kernels; the first import of triton reads this
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fill import fill, tensor
from helpers import DATA, crops, pack, write_images
from PIL import Image

from masked_diffusion import create_model
from masked_diffusion.images import finding
from masked_diffusion.weights.checkpoint import save_checkpoint

torch.set_num_threads(min(4, torch.get_num_threads()))

ODD_NAMES = [
    "b_0.png", "b_0.jpg", "b_0.PNG", "b_0%png.png", "b_0.png.png", "b_0%2Epng.png", "b_1.5_x.png", ".c_2.png",
    "c/b_0.png", "c/b_0.gif", "c.d/b_0.png", "c/d/b_0.png", "ä_ö.png", f"{'long/' * 15}a_{'x' * 120}.png",
    "c_3..png", "c 4_(1).JPEG",
]  # fmt: skip


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
def autoencoders(tmp_path_factory):
    """Folders of small autoencoders with random weights: of the kinds of SDXL, FLUX, DC-AE and TAESD."""
    import diffusers

    folder = tmp_path_factory.mktemp("autoencoders")
    kl = {"block_out_channels": [8] * 4, "norm_num_groups": 4}
    kl |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    deep = {"block_out_channels": (8, 8, 8, 16, 16, 32), "layers_per_block": (1,) * 6, "qkv_multiscales": ((),) * 6}
    kinds = {
        "sdxl": (diffusers.AutoencoderKL, kl | {"latent_channels": 4, "scaling_factor": 0.13025}),
        "flux": (
            diffusers.AutoencoderKL,
            kl | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False},
        ),
        "dc": (
            diffusers.AutoencoderDC,
            {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in deep.items()}
            | {"latent_channels": 32, "scaling_factor": 0.41407},
        ),
        "tiny": (
            diffusers.AutoencoderTiny,
            {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4},
        ),
    }
    for name, (kind, options) in kinds.items():
        torch.manual_seed(0)
        kind(**options).save_pretrained(folder / name)
    return folder


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


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """Images of odd names, sizes and kinds; one asks for a rotation, one is tiny."""
    folder = tmp_path_factory.mktemp("folder")
    write_images(folder, ODD_NAMES, size=(20, 17))
    write_images(folder, [f"{'abc'[i % 3]}_1{i}.jpg" for i in range(7)], size=(17, 33))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    Image.fromarray(pixels, "CMYK").save(folder / "a_cmyk.jpg")
    Image.fromarray(pixels[:, :, 0]).save(folder / "a_grey.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels[:, :, :3]).save(folder / "a_rotated.jpg", exif=exif)
    Image.fromarray(pixels[:3, :3, :3]).save(folder / "a_tiny.png")
    return str(folder)


@pytest.fixture(scope="module")
def packed_folder(odd_folder, tmp_path_factory):
    return pack(odd_folder, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture
def packed_copy(packed_folder, tmp_path):
    """A copy of the packed folder, to damage."""
    return Path(shutil.copytree(packed_folder, tmp_path / "copy"))


@pytest.fixture
def made(monkeypatch):
    """How often an index was made: its arguments each time."""
    calls, make = [], finding.make_index
    monkeypatch.setattr(finding, "make_index", lambda *args: calls.append(args) or make(*args))
    return calls
