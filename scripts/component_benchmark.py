"""Measure parts of the whole by themselves: attention with the relative bias, the VAE, or the Inception network."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from benchmark import matmul_peak, timed

from masked_diffusion import script_util
from masked_diffusion.layers.attention import gather_pairs, relative_position_index
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.options import Config, option

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP = 3
Row = dict[str, Any]


@dataclass(frozen=True)
class ComponentConfig(Config):
    """component"""

    component: str = option("attention", "what to measure", choices=("attention", "vae", "inception"))
    batch_size: int = option(32, "images at a time", at_least=1)
    heads: int = option(16, "heads of the attention", at_least=1)
    head_width: int = option(72, "width of each head", at_least=1)
    grid: int = option(16, "rows and columns of the grid of tokens", at_least=1)
    lengths: tuple[int, ...] = option((256,), "numbers of kept tokens; all of the grid: without positions", at_least=1)
    image_size: int = option(256, "height and width of the images", at_least=8)
    repeats: int = option(10, "timed calls, of which the fastest counts", at_least=1)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run", choices=("cpu", "cuda"))
    json: str | None = option(None, "file for the table and all settings")


def fastest(call: Callable[[], Any], config: ComponentConfig) -> float:
    """Seconds of the fastest call."""
    for _ in range(WARMUP):
        call()
    return min(timed(call, config.device)[0] for _ in range(config.repeats))


# ---------------------------------------------------------------- attention


def sdpa_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, pairs: torch.Tensor
) -> torch.Tensor:
    """Attention with the bias of the pairs of tokens, as a block of the model computes it without a kernel of its own.

    :param q, k, v: (N, heads, K, d). :param table: (rows, heads) fp32. :param pairs: (N or 1, K, K) rows of the table.
    """
    bias = F.embedding(pairs, table).permute(0, 3, 1, 2).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


IMPLEMENTATIONS = {"sdpa": sdpa_attention}


def attention_rows(config: ComponentConfig) -> Iterator[Row]:
    """Forward, and backward with the gradients of q, k, v and table, in bf16; alone and as a share of the peak."""
    peak = matmul_peak(config.device, "bf16")
    index = relative_position_index(config.grid, config.grid)
    for length in config.lengths:
        torch.manual_seed(0)
        shape = (config.batch_size, config.heads, length, config.head_width)
        inputs = [torch.randn(shape, dtype=torch.bfloat16, device=config.device, requires_grad=True) for _ in range(3)]
        table = torch.randn(int(index.max()) + 1, config.heads, device=config.device, requires_grad=True)
        scores = torch.rand(config.batch_size, config.grid**2)
        kept = scores.argsort(dim=1)[:, :length].sort(dim=1).values
        pairs = (index[None] if length == config.grid**2 else gather_pairs(index, kept)).to(config.device)
        gradient = torch.randn(shape, dtype=torch.bfloat16, device=config.device)
        for name, attend in IMPLEMENTATIONS.items():

            def both(attend: Callable = attend, inputs: list = inputs, table: torch.Tensor = table) -> None:
                for tensor in (*inputs, table):
                    tensor.grad = None
                attend(*inputs, table, pairs).backward(gradient)  # noqa: B023  (called before the next round)

            with torch.no_grad():
                forward = fastest(lambda: attend(*inputs, table, pairs), config)  # noqa: B023
            seconds = fastest(both, config)
            flops = 3 * 4 * config.batch_size * config.heads * length**2 * config.head_width
            yield {
                "name": name,
                "tokens": length,
                "head_width": config.head_width,
                "forward_ms": forward * 1e3,
                "both_ms": seconds * 1e3,
                "share_of_peak": flops / seconds / peak,
            }


# ---------------------------------------------------------------- networks beside the model


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
    for precision, dtype in DTYPES.items():
        torch.nn.Module.to(vae, config.device, dtype)  # without diffusers' warning of modules that there are none of
        images = torch.zeros(config.batch_size, 3, config.image_size, config.image_size, device=config.device)
        images = images.to(dtype)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
            calls = {"encode": lambda: vae.encode(images), "decode": lambda: vae.decode(latents)}  # noqa: B023
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


ROWS = {"attention": attention_rows, "vae": vae_rows, "inception": inception_rows}


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
