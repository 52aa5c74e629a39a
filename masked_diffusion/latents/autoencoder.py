"""The first stage: the frozen autoencoder that encodes images in training and decodes latents in sampling."""

from collections.abc import Callable
from typing import TypeAlias

import torch

from ..utils.errors import UserError

SD_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def create_first_stage(name: str, device: torch.device | str = "cpu") -> "FirstStage":
    """Create a first stage by name.

    :param name: `identity` for pixels; `ema` or `mse` for the Stable Diffusion VAEs of DiT and MDT; a hub id; or a
        local folder in diffusers' layout.
    :raises UserError: when the weights are found neither on this machine nor on the hub.
    """
    if name == "identity":
        return IdentityFirstStage()
    return StableDiffusionVAE(SD_VAES.get(name, name), device)


class IdentityFirstStage:
    """The first stage of diffusion in pixels, which changes nothing."""

    channels, downsample = 3, 1

    def encode(self, images: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> the same."""
        return images

    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) in [-1, 1] -> mean and standard deviation of each pixel: the same, and 0."""
        return images, torch.zeros_like(images)

    def sample(self, mean: torch.Tensor, std: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """Mean and standard deviation -> the mean."""
        return mean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> the same."""
        return latents


class StableDiffusionVAE:
    """The first stage of diffusion in the latents of a diffusers `AutoencoderKL`.

    :param source: a hub id or a local folder.
    :raises UserError: when the weights are not found.
    """

    scale = 0.18215

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False)
        except OSError as error:
            raise UserError(
                f"no VAE at {source!r}: it is not a local folder of one, and the hub has none of this name or cannot "
                f"be reached; download config.json and diffusion_pytorch_model.safetensors of {SD_VAES['ema']} into a "
                "folder, and name that folder with --vae"
            ) from error
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.channels = vae.config.latent_channels
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, images: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> a draw from the posterior, (N, channels, H / downsample, W / downsample)."""
        return self.sample(*self.moments(images), randn_like)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) in [-1, 1] -> mean and standard deviation of the posterior, both before `scale`."""
        posterior = self.vae.encode(images).latent_dist
        # Contiguous, so that noise drawn like them does not depend on the memory layout of the convolution.
        return posterior.mean.contiguous(), posterior.std.contiguous()

    def sample(self, mean: torch.Tensor, std: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """Mean and standard deviation from `moments` -> a draw from the posterior, times `scale`."""
        return (mean + std * randn_like(mean)) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, channels, h, w) -> (N, 3, h * downsample, w * downsample), approximately in [-1, 1]."""
        return self.vae.decode(latents / self.scale).sample


FirstStage: TypeAlias = IdentityFirstStage | StableDiffusionVAE
