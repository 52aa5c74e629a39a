"""Write a checkpoint as a folder to share: safetensors with their configuration, or a whole diffusers pipeline."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from masked_diffusion import logger, script_util
from masked_diffusion.config import RunConfig
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.models import DiT
from masked_diffusion.sampling.class_names import class_names
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.flag_values import check_source
from masked_diffusion.utils.options import Config, option
from masked_diffusion.weights.checkpoint import CONFIG_NAME
from masked_diffusion.weights.pretrained import build_model, open_weights

# The file that `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)` looks for.
CUSTOM_PIPELINE = "from masked_diffusion.pipeline import MDTPipeline\n\n__all__ = ['MDTPipeline']\n"


@dataclass(frozen=True)
class ExportConfig(Config):
    """export"""

    model_path: str = option("", "checkpoint, training folder (its newest EMA), or hub id", check=check_source)
    out: str = option("", "folder to make", check=lambda text: None if text else "a folder that is not there yet")
    format: str = option("safetensors", "what to write", choices=("safetensors", "pipeline"))
    vae_decoder: str | None = option(
        None, "of the pipeline: ema, mse, a hub id, a folder, or identity; None: what training used"
    )


def export_safetensors(model: DiT, run: RunConfig | None, folder: Path) -> None:
    """For `load_model`, `from_pretrained` and image_sample.py, which needs to know how the model was trained."""
    model.save_pretrained(folder)
    known = run.to_json() if run else {}
    shared = {key: known[key] for key in ("model", "diffusion", "vae", "classes") if key in known}
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
    names = class_names(run.classes, model.num_classes)
    model_config = {"name": name, "options": options}
    pipeline = build_pipeline(model_config, model.state_dict(), diffusion, getattr(first_stage, "vae", None), names)
    pipeline.save_pretrained(folder)
    (folder / "pipeline.py").write_text(CUSTOM_PIPELINE)


def main() -> None:
    config = script_util.parse_flags(ExportConfig, __doc__)
    out = Path(config.out)
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out, or remove it")
    opened = open_weights(config.model_path)
    model = build_model(opened)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if config.format == "safetensors":
        export_safetensors(model, opened.run, beside)
    else:
        export_pipeline(model, opened.run, beside, config.vae_decoder)
    beside.rename(out)
    logger.log(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    script_util.run(main)
