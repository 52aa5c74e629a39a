"""Write a checkpoint as a folder to share: safetensors with their configuration, or a whole diffusers pipeline."""

import shutil
from pathlib import Path

from masked_diffusion import load_model, logger, script_util
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.sampling.class_names import class_names
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import write_json
from masked_diffusion.weights.checkpoint import read_config
from masked_diffusion.weights.pretrained import find_weights

# The file that `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)` looks for.
CUSTOM_PIPELINE = "from masked_diffusion.pipeline import MDTPipeline\n\n__all__ = ['MDTPipeline']\n"


def parse_args():
    parser = script_util.make_parser(__doc__)
    parser.add_argument("--model_path", required=True, help="checkpoint, training folder (its newest EMA), or hub id")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--format", choices=("safetensors", "pipeline"), default="safetensors", help="what to write")
    parser.add_argument("--vae_decoder", help="of the pipeline: ema, mse, a folder, identity; None: what training used")
    return parser.parse_args()


def export_safetensors(model, config, folder):
    """For `load_model`, `from_pretrained` and image_sample.py, which needs to know how the model was trained."""
    model.save_pretrained(folder)
    known = {key: config[key] for key in ("model", "diffusion", "vae", "classes") if key in config}
    write_json(folder / "config.json", read_config(folder) | known)


def export_pipeline(model, config, folder, vae_name):
    from masked_diffusion.pipeline import build_pipeline

    name = type(model).__name__ + "_S_2"
    options = {key: value for key, value in model._hub_mixin_config.items() if value is not None}
    diffusion = config.get("diffusion", {"learn_sigma": model.learn_sigma})
    first_stage = create_first_stage(vae_name or config.get("vae", "ema"))
    names = class_names(config.get("classes"), model.num_classes)
    model_config = {"name": name, "options": options}
    pipeline = build_pipeline(model_config, model.state_dict(), diffusion, getattr(first_stage, "vae", None), names)
    pipeline.save_pretrained(folder)
    (folder / "pipeline.py").write_text(CUSTOM_PIPELINE)


def main():
    args = parse_args()
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out, or remove it")
    weights = find_weights(args.model_path)
    model, config = load_model(weights), read_config(weights)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if args.format == "safetensors":
        export_safetensors(model, config, beside)
    else:
        export_pipeline(model, config, beside, args.vae_decoder)
    beside.rename(out)
    logger.log(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    script_util.run(main)
