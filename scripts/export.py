"""Write a checkpoint as a folder to share: safetensors with their configuration, or a whole diffusers pipeline.

Or make whole files of a sharded checkpoint, from which training goes on: --format whole.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masked_diffusion import logger, script_util
from masked_diffusion.config import RunConfig
from masked_diffusion.latents.autoencoder import check_first_stage, create_first_stage
from masked_diffusion.models import DiT
from masked_diffusion.sampling.class_names import class_names
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write, write_json
from masked_diffusion.utils.flag_values import check_source
from masked_diffusion.utils.options import Config, option
from masked_diffusion.weights.checkpoint import (
    CONFIG_NAME,
    STATE_NAME,
    ema_name,
    is_sharded,
    model_name,
    opt_name,
    parse_step,
    run_folder,
    sharded_folders,
    sharded_name,
)
from masked_diffusion.weights.pretrained import build_model, open_weights
from masked_diffusion.weights.sharded import read_section, read_state, whole_train_state

# The file that `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)` looks for.
CUSTOM_PIPELINE = "from masked_diffusion.pipeline import MDTPipeline\n\n__all__ = ['MDTPipeline']\n"


@dataclass(frozen=True)
class ExportConfig(Config):
    """export"""

    model_path: str = option(
        "", "checkpoint, training folder (its newest EMA; of whole: its newest sharded checkpoint), or hub id",
        check=check_source,
    )  # fmt: skip
    out: str = option("", "folder to make", check=lambda text: None if text else "a folder that is not there yet")
    format: str = option(
        "safetensors", "what to write; whole: model, EMA and optimizer of a sharded checkpoint as the published files",
        choices=("safetensors", "pipeline", "whole"),
    )  # fmt: skip
    vae_decoder: str | None = option(
        None, "of the pipeline: ema, mse, a hub id, a folder, or identity; None: what training used"
    )


def export_safetensors(model: DiT, run: RunConfig | None, folder: Path) -> None:
    """For `load_model`, `from_pretrained` and image_sample.py, which needs to know how the model was trained."""
    model.save_pretrained(folder)
    known = run.to_json() if run else {}
    shared = {key: known[key] for key in ("model", "diffusion", "vae", "autoencoder", "classes") if key in known}
    if run and "name" not in run.architecture:
        del shared["model"]
    own = json.loads((folder / CONFIG_NAME).read_text())
    write_json(folder / CONFIG_NAME, own | shared)


def export_pipeline(model: DiT, run: RunConfig | None, folder: Path, vae_name: str | None) -> None:
    from masked_diffusion.pipeline import build_pipeline

    run = run or RunConfig()
    name = type(model).__name__ + "_S_2"
    options = {key: value for key, value in model._hub_mixin_config.items() if value is not None}
    diffusion = run.diffusion.options(model.default_snr_gamma) | {"learn_sigma": model.learn_sigma}
    first_stage = create_first_stage(vae_name or run.model.vae)
    check_first_stage(first_stage, model.in_channels, run.autoencoder)
    names = class_names(run.classes, model.num_classes)
    model_config = {"name": name, "options": options}
    pipeline = build_pipeline(model_config, model.state_dict(), diffusion, getattr(first_stage, "vae", None), names)
    pipeline.save_pretrained(folder)
    (folder / "pipeline.py").write_text(CUSTOM_PIPELINE)


def find_sharded(path: Path) -> Path:
    """A sharded checkpoint, or the newest one of a training folder.

    :raises UserError: where there is none.
    """
    found = [path] if is_sharded(path) and path.is_dir() else sharded_folders(path)
    if not found:
        raise UserError(
            f"{path} holds no sharded checkpoint: --format whole makes files of a folder such as {sharded_name(1000)}; "
            "name it, or the training folder that it is in"
        )
    return found[-1]


def export_whole(checkpoint: Path, folder: Path) -> None:
    """The files of a whole checkpoint, with the same tensors; of a pruned one, its EMAs and snapshots."""
    step = parse_step(checkpoint)
    emas = {path.name.removeprefix("ema_"): path for path in sorted(checkpoint.glob("ema_*"))}
    for path in sorted(checkpoint.glob("phema_*")):
        save(folder / f"{path.name}_{step:06d}.pt", read_section(path))
    for rate, path in emas.items():
        save(folder / ema_name(rate, step), read_section(path))
    if (checkpoint / STATE_NAME).exists():
        save(folder / model_name(step), read_section(checkpoint / "model"))
        save(folder / opt_name(step), whole_train_state(read_state(checkpoint), read_section(checkpoint / "optimizer")))
    if (config := run_folder(checkpoint) / CONFIG_NAME).exists():
        shutil.copy2(config, folder / CONFIG_NAME)


def save(path: Path, state: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        torch.save(state, file)


def main() -> None:
    config = script_util.parse_flags(ExportConfig, __doc__)
    out = Path(config.out)
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out, or remove it")
    whole = config.format == "whole"
    source = find_sharded(Path(config.model_path)) if whole else open_weights(config.model_path)
    model = None if whole else build_model(source)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if whole:
        export_whole(source, beside)
    elif config.format == "safetensors":
        export_safetensors(model, source.run, beside)
    else:
        export_pipeline(model, source.run, beside, config.vae_decoder)
    beside.rename(out)
    logger.log(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    script_util.run(main)
