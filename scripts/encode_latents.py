"""Encode a folder of images into a latent cache for training. Run the same command again to resume where it stopped."""

from dataclasses import dataclass

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.image_datasets import image_classes, list_image_files
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.latents.cache import encode_latents
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.options import Config, option


@dataclass(frozen=True)
class EncodeConfig(Config):
    """encoding"""

    data_dir: str = option(
        "", "folder of images named CLASS_ANYTHING.jpg, with its subfolders; or a folder that pack_images.py wrote"
    )
    latent_dir: str = option("", "folder to write the latent cache to")
    class_cond: bool = option(True, "store class labels")
    image_size: int = option(256, "height and width of the centre crops in pixels", at_least=1)
    vae: str = option(
        "ema", "autoencoder: ema or mse (of Stable Diffusion), a hub id, a folder, or identity for pixels"
    )
    batch_size: int = option(32, "images per rank (GPU) that are encoded at once", at_least=1)
    shard_size: int = option(1024, "images per file", at_least=1)
    fast_decode: bool = option(False, "decode large JPEGs at a fraction of their size; training then needs it, too")
    num_workers: int = option(4, "data loading processes per rank; 0: load in the encoding process", at_least=0)
    verify: bool = option(False, "compare the existing shards with their checksums, and encode damaged ones again")


def main() -> None:
    config = script_util.parse_flags(EncodeConfig, __doc__)
    if not config.latent_dir:
        raise UserError("latent_dir is empty: name a folder to write the latents to (--latent_dir PATH)")
    dist_util.join_process_group()
    logger.configure(config.latent_dir, quiet=not dist_util.is_main())
    # The images first: a wrong folder is found before a VAE is downloaded.
    paths = list_image_files(config.data_dir)
    if config.class_cond:
        image_classes(paths)
    with dist_util.main_first():
        first_stage = create_first_stage(config.vae, dist_util.dev())
    encode_latents(first_stage=first_stage, paths=paths, **config.values())
    logger.log(f"{config.latent_dir} is complete")


if __name__ == "__main__":
    script_util.run(main)
