"""What a training run costs: GPU days, disk and memory of a model, from a measured speed.

The speed is given (`--images_per_second`) or read (`--measured`) from the log directory of a run, which may be a short
one, or from a report of `benchmark.py` or `measure_gpu.py`.
"""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark import format_table
from plot_run import read_rows
from typing_extensions import Self

from masked_diffusion import create_model, script_util
from masked_diffusion.config import OPTIMIZERS
from masked_diffusion.presets import PAPER_BATCH
from masked_diffusion.training.preflight import memory_estimate
from masked_diffusion.utils import flag_values
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.options import Config, option
from masked_diffusion.weights.checkpoint import read_config

IMAGENET_IMAGES = 1_281_167
DAY, GIB = 86400, 2**30


@dataclass(frozen=True)
class PlanConfig(Config):
    """plan"""

    model: str | None = option(None, "the model; None: that of --measured, else MDTv2_XL_2")
    measured: str | None = option(None, "log directory of a run, or the JSON of a benchmark, to read the speed from")
    images_per_second: float | None = option(None, "training speed of one GPU on cached latents", above=0)
    encode_images_per_second: float | None = option(
        None, "speed of the VAE's encoder on one GPU, for training on images; None: as --measured has it", above=0
    )
    gpus: int = option(8, "number of GPUs", at_least=1)
    steps: tuple[int, ...] = option((400_000, 2_500_000), "numbers of steps to plan for", at_least=1)
    global_batch_size: int = option(PAPER_BATCH, "images of all GPUs together in one step", at_least=1)
    num_images: int = option(IMAGENET_IMAGES, "images of the dataset", at_least=1)
    image_size: int = option(256, "height and width of the images in pixels", at_least=8)
    latent_channels: int = option(
        4, "channels of the autoencoder's latents: 16 of SD3 and FLUX, 32 of DC-AE", at_least=1
    )
    downsample: int = option(8, "pixels per latent along a side: 32 of DC-AE", at_least=1)
    optimizer: str | None = option(None, "optimizer; None: that of the model's family", choices=OPTIMIZERS)
    ema_rate: str = option(
        "0.9999", "EMA rates, separated by commas", read=flag_values.read_list, check=flag_values.check_ema_rates
    )
    save_interval: int = option(10000, "steps between checkpoints", at_least=1)
    keep: int = option(3, "newest checkpoints to keep, beside every EMA; 0: all", at_least=0)

    def check(self) -> Self:
        super().check()
        if (self.measured is None) == (self.images_per_second is None):
            raise UserError("name one source of the speed: --images_per_second NUMBER, or --measured FOLDER_OR_JSON")
        if self.image_size % self.downsample:
            raise UserError(f"--image_size {self.image_size} must be a multiple of --downsample, {self.downsample}")
        return self


class Speed(NamedTuple):
    """Images per second of one GPU.

    :param latents, live: of training on cached latents, and on images that are encoded on the way; None: unknown.
    :param encode: of the VAE's encoder alone. :param source: what was measured, in words.
    """

    latents: float | None
    live: float | None
    encode: float | None
    source: str
    model: str | None = None

    def completed(self, encode: float | None) -> Self:
        """With what follows: a GPU encodes and trains one after the other, so the times of an image add up."""
        latents, live, encode = self.latents, self.live, encode or self.encode
        if encode and latents and live is None:
            live = 1 / (1 / latents + 1 / encode)
        elif encode and live and latents is None and live < encode:
            latents = 1 / (1 / live - 1 / encode)
        return self._replace(latents=latents, live=live, encode=encode)


# ---------------------------------------------------------------- measured speeds


def read_speed(path: str, model: str | None) -> Speed:
    """The speed that a run's log directory or a benchmark's JSON holds.

    :param model: the model to look for, or None.
    :raises UserError: for anything else, and where the model was not measured.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"--measured {path} does not exist: name a log directory or the JSON of a benchmark")
    if place.is_dir() or place.name in ("progress.jsonl", "progress.csv"):
        return read_run(place if place.is_dir() else place.parent)
    try:
        report = json.loads(place.read_text())
        rows = report["rows"]
        found = read_gpu_report(rows, model) if isinstance(rows, dict) else read_benchmark(report)
        source = f"{report['device']}, {place.name}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"--measured {path} is no report of benchmark.py or measure_gpu.py ({error!r}): name one, or a log folder"
        ) from error
    if found.latents is None:
        raise UserError(f"--measured {path} has no training step of {model}: measure it with scripts/benchmark.py")
    return found._replace(source=f"{found.source}, {source}")


def read_run(folder: Path) -> Speed:
    """The median speed of the second half of a run's log, in which nothing compiles any more."""
    speeds = [row["images_per_second"] for row in read_rows(folder) if "images_per_second" in row]
    if not speeds:
        raise UserError(f"the log in {folder} holds no speed yet: wait for its first row (--log_interval)")
    run = read_config(folder)
    if run is None:
        raise UserError(f"{folder} holds no config.json, which tells the model and the number of ranks")
    ranks = (run.global_batch or run.train.batch_size) // run.train.batch_size
    speed = statistics.median(speeds[len(speeds) // 2 :]) / ranks
    cached = bool(run.data.latent_dir) or run.model.vae == "identity"
    source = f"run in {folder}, {ranks} ranks, {'latents' if cached else 'encoding on the way'}"
    return Speed(speed if cached else None, None if cached else speed, None, source, run.model.model)


def read_benchmark(report: dict[str, Any]) -> Speed:
    """The first row of a report of `benchmark.py`, which is the whole step."""
    settings = report["settings"]
    if settings["mode"] != "train":
        raise UserError(f"--measured is of --mode {settings['mode']}: measure a training step with --mode train")
    row, note = report["rows"][0], "" if settings["optimizer"] else ", without the optimizer's step (--optimizer)"
    source = f"{row['name']} {settings['precision']}{note}"
    return Speed(row["images_per_second"], None, None, source, settings["model"])


def read_gpu_report(rows: dict[str, Any], model: str | None) -> Speed:
    """The fastest training step of a model, and of the encoder, in a report of `measure_gpu.py`."""
    size = re.sub(r"^.*?_(.+)_(\d+)$", r"\1/\2", model or "MDTv2_XL_2")
    steps = {name: row["rows"][0]["images_per_second"] for name, row in rows.items() if row.get("rows") and
             name.startswith(f"train {size} ")}  # fmt: skip
    encoders = [row["images_per_second"] for row in rows.get("vae", {}).get("rows", ()) if "encode" in row["name"]]
    best = max(steps, key=steps.get, default=None)
    return Speed(steps.get(best), None, max(encoders, default=None), best or "", model or "MDTv2_XL_2")


# ---------------------------------------------------------------- the table


def plan(config: PlanConfig, speed: Speed) -> str:
    """The tables, as text."""
    name = config.model or speed.model or "MDTv2_XL_2"
    with torch.device("meta"):
        model = create_model(name, in_channels=config.latent_channels)
    num_params, num_emas = sum(param.numel() for param in model.parameters()), len(config.ema_rate.split(","))
    optimizer = config.optimizer or model.default_optimizer
    times = []
    for steps in config.steps:
        for kind in ("latents", "live"):
            per_gpu = getattr(speed, kind)
            days = steps * config.global_batch_size / per_gpu / DAY if per_gpu else None
            times.append(
                {
                    "training on": {"latents": "cached latents", "live": "images, encoded on the way"}[kind],
                    "steps": f"{steps:,}",
                    "images/s per GPU": f"{per_gpu:.4g}" if per_gpu else "unknown",
                    "GPU days": f"{days:.4g}" if days else "-",
                    f"days on {config.gpus} GPUs": f"{days / config.gpus:.4g}" if days else "-",
                }
            )
    state = memory_estimate(num_params, num_emas, optimizer, 1, "none")
    weights = 4 * num_params
    checkpoint = state - weights  # all but the gradients
    disk = [{"on disk": f"latent cache of {config.num_images:,} images", "GiB": cache_bytes(config) / GIB}]
    disk += [{"on disk": f"a checkpoint: weights, {num_emas} EMA, {optimizer}", "GiB": checkpoint / GIB}]
    for steps in config.steps:
        saved = steps // config.save_interval
        kept = min(config.keep or saved, saved)
        total = kept * (checkpoint - num_emas * weights) + saved * num_emas * weights
        disk.append({"on disk": f"log directory after {steps:,} steps (--keep {config.keep})", "GiB": total / GIB})
    lines = [
        f"{name}: {num_params / 1e6:.3f} M parameters, global batch {config.global_batch_size}",
        f"measured: {speed.source}; several GPUs are taken to be as fast as that many single ones",
        format_table(times, dict.fromkeys(times[0], "{}")),
        format_table(disk, {"on disk": "{}", "GiB": "{:.2f}"}),
        f"memory per GPU without sharding: {state / GIB:.2f} GiB, plus activations (--microbatch auto fits them)",
    ]
    if None in (speed.latents, speed.live):
        lines.append("for the unknown speed: --encode_images_per_second (scripts/component_benchmark.py measures it)")
    return "\n\n".join(lines)


def cache_bytes(config: PlanConfig) -> int:
    """Bytes of a latent cache: mean and deviation in float16 of each image and its mirror image."""
    return config.num_images * 2 * 2 * config.latent_channels * (config.image_size // config.downsample) ** 2 * 2


def main() -> None:
    config = script_util.parse_flags(PlanConfig, __doc__)
    if config.measured:
        speed = read_speed(config.measured, config.model)
    else:
        speed = Speed(config.images_per_second, None, None, "--images_per_second")
    if config.model and speed.model and config.model != speed.model:
        raise UserError(f"--measured is of {speed.model}, not of --model {config.model}: leave --model out")
    print(plan(config, speed.completed(config.encode_images_per_second)))


if __name__ == "__main__":
    script_util.run(main)
