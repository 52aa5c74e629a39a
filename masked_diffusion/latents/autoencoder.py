"""The first stage: the frozen autoencoder that encodes images in training and decodes latents in sampling."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..utils.errors import UserError
from ..utils.precision import PRECISIONS

SD_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
KINDS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")  # classes of diffusers


def create_first_stage(
    name: str, device: torch.device | str = "cpu", precision: str = "fp32", compiled: Iterable[str] = ()
) -> "FirstStage":
    """Create a first stage by name.

    :param name: `identity` for pixels; `ema` or `mse` for the Stable Diffusion VAEs of DiT and MDT; a hub id, with
        its subfolder if there is one (`OWNER/NAME/vae`); or a local folder in diffusers' layout.
    :param precision: number format of the autoencoder, fp32 or bf16.
    :param compiled: the parts to compile when they are first called, of `encoder` and `decoder`.
    :raises UserError: when the weights are found neither on this machine nor on the hub, or are no autoencoder.
    """
    if name == "identity":
        return IdentityFirstStage()
    vae = place_autoencoder(load_autoencoder(SD_VAES.get(name, name)), device, precision)
    for part in compiled:
        getattr(vae, part).compile()
    return AutoencoderFirstStage(vae)


def place_autoencoder(vae: Any, device: torch.device | str, precision: str) -> Any:
    """Move an autoencoder of diffusers to a device and a number format, with the channels last in bf16.

    In bf16 the convolutions are fastest so; in fp32 it gains little, and would change the last bits of every image.
    """
    dtype = PRECISIONS[precision] or torch.float32
    layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
    return torch.nn.Module.to(vae, device=device, dtype=dtype, memory_format=layout)


def load_autoencoder(source: str) -> Any:
    """An autoencoder of diffusers, frozen and in eval mode, on the CPU in fp32.

    :param source: see `create_first_stage`.
    :raises UserError: as `create_first_stage`.
    """
    import diffusers

    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/([\w./-]+)", source)
    place, options = source, {}
    if hub and not Path(source).exists():
        place, options = hub[1], {"subfolder": hub[2]}
    try:
        kind = diffusers.AutoencoderKL.load_config(place, **options).get("_class_name", KINDS[0])
        if kind not in KINDS:
            raise UserError(f"{source!r} holds a {kind}: name an autoencoder of images, of {', '.join(KINDS)}")
        vae = getattr(diffusers, kind).from_pretrained(place, low_cpu_mem_usage=False, **options)
    except OSError as error:
        if Path(source, "vae", "config.json").exists():
            raise UserError(f"{source!r} is a pipeline: name the VAE in it, {Path(source, 'vae')}") from error
        raise UserError(
            f"no VAE at {source!r}: it is not a local folder of one, and the hub has none of this name or cannot "
            f"be reached; download config.json and diffusion_pytorch_model.safetensors of {SD_VAES['ema']} into a "
            "folder, and name that folder with --vae"
        ) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the VAE at {source!r} cannot be built ({type(error).__name__}: {reason}): its files are damaged or do "
            "not belong together"
        ) from error
    scale, shift = scale_and_shift(vae)
    if not (_is_number(scale) and _is_number(shift) and scale > 0 and vae.config.in_channels == 3):
        raise UserError(
            f"the VAE at {source!r} has scaling_factor {scale}, shift_factor {shift} and {vae.config.in_channels} "
            "input channels: they must be finite numbers, the first above 0, and 3 channels"
        )
    return vae.eval().requires_grad_(False)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def scale_and_shift(vae: Any) -> tuple[float, float]:
    """Scale and shift of an autoencoder of diffusers: latents = (z - shift) * scale."""
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


class IdentityFirstStage:
    """The first stage of diffusion in pixels, which changes nothing."""

    channels, downsample, num_moments, scale, shift, precision = 3, 1, 1, 1.0, 0.0, "fp32"

    def encode(self, images: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> the same."""
        return images

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 1, 3, H, W), the same."""
        return images.unsqueeze(1)

    def sample(self, moments: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """(N, 1, 3, H, W), or (N, 2, 3, H, W) of older caches with a deviation of 0 -> (N, 3, H, W), the first."""
        return moments[:, 0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> the same."""
        return latents


class AutoencoderFirstStage:
    """The first stage of diffusion in the latents of an autoencoder of diffusers.

    :param vae: an `AutoencoderKL`, which has a posterior; an `AutoencoderDC` or an `AutoencoderTiny`, which have none.
        It computes in the number format of its weights. Latents go in and out in the format of images and latents.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.channels = vae.config.latent_channels
        stages = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
        self.downsample = 2 ** (len(stages) - 1)
        self.num_moments = 2 if type(vae).__name__ == "AutoencoderKL" else 1

    @property
    def scale(self) -> float:
        """What latents are multiplied by, last."""
        return scale_and_shift(self.vae)[0]

    @property
    def shift(self) -> float:
        """What is subtracted from latents, first."""
        return scale_and_shift(self.vae)[1]

    @property
    def precision(self) -> str:
        """The number format of the autoencoder."""
        return "bf16" if self.vae.dtype == torch.bfloat16 else "fp32"

    def rescale(self, scale: float, shift: float) -> None:
        """Set scale and shift, also in the configuration that is saved with the autoencoder."""
        self.vae.register_to_config(scaling_factor=scale, shift_factor=shift)

    def encode(self, images: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, channels, H / downsample, W / downsample), drawn from the posterior if any."""
        return self.sample(self.moments(images), randn_like)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """What latents are drawn from, before scale and shift.

        :param images: (N, 3, H, W) in [-1, 1].
        :return: (N, 2, C, h, w) of the dtype of the images: mean and standard deviation of the posterior; or
            (N, 1, C, h, w), the latent itself, of an autoencoder without a posterior.
        """
        encoded = self.vae.encode(images.to(self.vae.dtype), return_dict=False)[0]
        if self.num_moments == 1:
            # Contiguous, so that noise drawn like it does not depend on the memory layout of the convolution.
            return encoded.to(images.dtype).contiguous().unsqueeze(1)
        # The exponential of a logarithm in bf16 would lose what is left of its digits.
        posterior = type(encoded)(encoded.parameters.to(images.dtype))
        return torch.stack([posterior.mean.contiguous(), posterior.std.contiguous()], dim=1)

    def sample(self, moments: torch.Tensor, randn_like: Callable = torch.randn_like) -> torch.Tensor:
        """Draw latents.

        :param moments: (N, 2, C, h, w) or (N, 1, C, h, w) of `moments`; of the latter nothing is drawn.
        :return: (N, C, h, w), shifted and scaled.
        """
        z = moments[:, 0]
        if moments.shape[1] == 2:
            z = z + moments[:, 1] * randn_like(z)
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(N, channels, h, w) -> (N, 3, h * downsample, w * downsample), approximately in [-1, 1]."""
        z = latents / self.scale + self.shift
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].to(latents.dtype)


FirstStage: TypeAlias = IdentityFirstStage | AutoencoderFirstStage

# ---------------------------------------------------------------- what a checkpoint records

RECORDED = {"channels": "channels", "downsample": "downsampling", "scale": "scale", "shift": "shift"}


def describe_first_stage(first_stage: FirstStage) -> dict[str, float]:
    """What checkpoints, exports and latent caches record of an autoencoder: channels, downsample, scale and shift."""
    return {name: getattr(first_stage, name) for name in RECORDED}


def adopt_older_scale(first_stage: FirstStage, recorded: Mapping[str, float]) -> None:
    """Give an autoencoder the scale of a checkpoint of an older version, which used one number for all of them.

    :param recorded: of `describe_first_stage`; of an older version it has scale and shift alone; {} if not known.
    """
    if recorded and "channels" not in recorded and isinstance(first_stage, AutoencoderFirstStage):
        first_stage.rescale(recorded["scale"], recorded["shift"])


def check_first_stage(
    first_stage: FirstStage, in_channels: int, recorded: Mapping[str, float], flag: str = "--vae_decoder"
) -> None:
    """Hold a first stage to the model whose samples it decodes, and to what is recorded of the one in training.

    :param in_channels: of the model. :param recorded: see `adopt_older_scale`, which this calls.
    :param flag: that names the first stage, for messages.
    :raises UserError: when they differ; the message has both numbers.
    """
    adopt_older_scale(first_stage, recorded)
    wanted = {"channels": in_channels} | (recorded if "channels" in recorded else {})
    for name, value in describe_first_stage(first_stage).items():
        if name in wanted and wanted[name] != value:
            raise UserError(
                f"the autoencoder has {RECORDED[name]} {value}, but the model was trained with {wanted[name]}: name "
                f"the one that it was trained with, as {flag}"
            )
