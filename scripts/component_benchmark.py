"""Measure the networks beside the model by themselves: the VAE, or the Inception network of the evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from benchmark import timed

from masked_diffusion import script_util
from masked_diffusion.config import VAE_PRECISIONS
from masked_diffusion.latents.autoencoder import AutoencoderFirstStage, place_autoencoder
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.options import Config, option

WARMUP = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class ComponentConfig(Config):
    """component"""

    component: str = option("vae", "what to measure", choices=("vae", "inception"))
    batch_size: int = option(32, "images at a time", at_least=1)
    image_size: int = option(256, "height and width of the images", at_least=8)
    repeats: int = option(10, "timed calls, of which the fastest counts", at_least=1)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run", choices=("cpu", "cuda"))
    json: str | None = option(None, "file for the table and all settings")


def fastest(call: Callable[[], Any], config: ComponentConfig) -> float:
    """Seconds of the fastest call."""
    for _ in range(WARMUP):
        call()
    return min(timed(call, config.device) for _ in range(config.repeats))


def vae_rows(config: ComponentConfig) -> Iterator[Row]:
    """Encoding and decoding with an autoencoder of Stable Diffusion's size and random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512] if config.device == "cuda" else [32] * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
    ).eval()
    images = torch.zeros(config.batch_size, 3, config.image_size, config.image_size, device=config.device)
    for precision in VAE_PRECISIONS:
        first_stage = AutoencoderFirstStage(place_autoencoder(vae, config.device, precision))
        latents = first_stage.encode(images)
        calls = {"encode": partial(first_stage.encode, images), "decode": partial(first_stage.decode, latents)}
        for name, call in calls.items():
            yield image_row(f"{name} {precision}", fastest(call, config), config)


def inception_rows(config: ComponentConfig) -> Iterator[Row]:
    """The network that evaluation takes its features from, with random weights, from uint8 pixels on."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with mock.patch("torch.load"), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], "no weights")
    network = network.to(config.device)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8).to(config.device)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as evaluations/ runs it
        yield image_row("inception fp32", fastest(lambda: network(pixels), config), config)


def image_row(name: str, seconds: float, config: ComponentConfig) -> Row:
    return {"name": name, "ms": seconds * 1e3, "images_per_second": config.batch_size / seconds}


ROWS = {"vae": vae_rows, "inception": inception_rows}


def main() -> None:
    config = script_util.parse_flags(ComponentConfig, __doc__)
    try:
        report = {"settings": config.values(), "rows": list(ROWS[config.component](config))}
    except ModuleNotFoundError as error:
        report = {"settings": config.values(), "rows": [], "skipped": f"{error.name} is not installed"}
    for row in report["rows"]:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if "skipped" in report:
        print(f"skipped: {report['skipped']}")
    if config.json:
        write_json(config.json, report)


if __name__ == "__main__":
    script_util.run(main)
