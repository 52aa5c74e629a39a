"""The frozen first stage: what training encodes images with, and sampling decodes latents with."""

import torch

from ..utils.errors import UserError

SD_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def create_first_stage(name, device="cpu"):
    """Make a first stage.

    :param name: `identity` for pixels; `ema` or `mse` for the Stable Diffusion VAEs of DiT and MDT; a hub id; or a
        local folder in diffusers' layout.
    :raises UserError: when the weights are neither here nor to be had.
    """
    if name == "identity":
        return IdentityFirstStage()
    return StableDiffusionVAE(SD_VAES.get(name, name), device)


class IdentityFirstStage:
    """Diffusion in pixels."""

    channels, downsample = 3, 1

    def encode(self, images, randn_like=torch.randn_like):
        """(N, 3, H, W) in [-1, 1] -> the same."""
        return images

    def moments(self, images):
        """(N, 3, H, W) in [-1, 1] -> mean and standard deviation of each pixel: the same, and 0."""
        return images, torch.zeros_like(images)

    def sample(self, mean, std, randn_like=torch.randn_like):
        """Mean and standard deviation -> the mean."""
        return mean

    def decode(self, latents):
        """(N, 3, H, W) -> the same."""
        return latents


class StableDiffusionVAE:
    """Diffusion in the latents of a diffusers `AutoencoderKL`.

    :param source: a hub id or a local folder.
    """

    scale = 0.18215

    def __init__(self, source, device="cpu"):
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False)
        except OSError as error:
            raise UserError(
                f"no VAE at {source!r}, neither a local folder nor in reach on the hub: fetch config.json and "
                f"diffusion_pytorch_model.safetensors of {SD_VAES['ema']} into a folder and name that folder"
            ) from error
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.channels = vae.config.latent_channels
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, images, randn_like=torch.randn_like):
        """(N, 3, H, W) in [-1, 1] -> a draw from the posterior, (N, channels, H / downsample, W / downsample)."""
        return self.sample(*self.moments(images), randn_like)

    @torch.no_grad()
    def moments(self, images):
        """(N, 3, H, W) in [-1, 1] -> mean and standard deviation of the posterior, both before `scale`."""
        posterior = self.vae.encode(images).latent_dist
        # Contiguous, so that the noise does not depend on the memory layout that the convolution chose.
        return posterior.mean.contiguous(), posterior.std.contiguous()

    def sample(self, mean, std, randn_like=torch.randn_like):
        """Mean and standard deviation, as `moments` gives them, -> a draw from the posterior, times `scale`."""
        return (mean + std * randn_like(mean)) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """(N, channels, h, w) -> (N, 3, h * downsample, w * downsample), about in [-1, 1]."""
        return self.vae.decode(latents / self.scale).sample
