"""Weights of random numbers, in the files and layouts that the published ones have."""

from pathlib import Path
from unittest import mock

import torch

from masked_diffusion import create_model
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write
from masked_diffusion.weights.torch_file import LateTensor, save_tensors

CLASSES = 1000  # of ImageNet
SD_CHANNELS = (128, 256, 512, 512)  # of the blocks of Stable Diffusion's autoencoder


def write_checkpoint(path: Path, model: str, input_size: int) -> Path:
    """A state dict in the published layout, of N(0, 0.02^2) numbers. One tensor is in memory at a time.

    :param input_size: height and width of the latents.
    """
    with torch.device("meta"):
        built = create_model(model, input_size=input_size, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    kept = {name: value for name, value in built.named_buffers() if not value.is_floating_point()}
    if kept:  # tables of indices are what they are
        kept = dict(create_model(model, input_size=input_size, num_classes=CLASSES).named_buffers())

    def late(value: torch.Tensor) -> LateTensor:
        return LateTensor(value.shape, value.dtype, lambda: 0.02 * torch.randn(value.shape, generator=generator))

    state = {name: kept.get(name) if name in kept else late(value) for name, value in built.state_dict().items()}
    with atomic_write(path) as file:
        save_tensors(state, file)
    return path


def write_vae(folder: Path, channels: tuple[int, ...] = SD_CHANNELS) -> Path:
    """A folder of diffusers with an autoencoder of Stable Diffusion's kind.

    :param channels: of its blocks.
    """
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(channels),
            up_block_types=["UpDecoderBlock2D"] * len(channels),
            block_out_channels=list(channels),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=min(32, *channels),
        )
    vae.save_pretrained(folder)
    return folder


def write_inception(path: Path) -> Path:
    """torch-fidelity's file of Inception-v3. Its convolutions keep the variance of what they are given.

    :raises UserError: when torch-fidelity is missing.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("Inception of random numbers needs torch-fidelity: pip install torch-fidelity") from error
    with mock.patch("torch.load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("inception", ["2048"], "no weights")
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for value in state.values():
        if value.ndim == 4:
            torch.nn.init.kaiming_normal_(value, nonlinearity="relu", generator=generator)
    with atomic_write(path) as file:
        torch.save(state, file)
    return path
