"""Encode a folder of images into a latent cache for training. Run the same command again to resume where it stopped."""

from dataclasses import dataclass
from pathlib import Path

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.config import VAE_PRECISION_HELP, VAE_PRECISIONS
from masked_diffusion.image_datasets import image_classes
from masked_diffusion.images.finding import INDEX_NAME, check_index_place, find_images
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.latents.cache import encode_latents
from masked_diffusion.training.preflight import check_images
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.options import Config, option


@dataclass(frozen=True)
class EncodeConfig(Config):
    """encoding"""

    data_dir: str = option(
        "", "folder of images named CLASS_ANYTHING.jpg, with its subfolders, or a folder that pack_images.py wrote; a "
        "local one, or gs://, az:// or https://ACCOUNT.blob.core.windows.net",
    )  # fmt: skip
    index: str | None = option(
        None, "folder that keeps what listing and opening the images of data_dir found, as in training; None: "
        "data_index in latent_dir",
    )  # fmt: skip
    reindex: bool = option(False, "list and open the images again, whatever --index has, as in training")
    on_bad_image: str = option(
        "error", "what to do about images that cannot be read: stop with an error, or skip them",
        choices=("error", "skip"),
    )  # fmt: skip
    latent_dir: str = option("", "folder to write the latent cache to")
    class_cond: bool = option(True, "store class labels")
    image_size: int = option(256, "height and width of the centre crops in pixels", at_least=1)
    vae: str = option(
        "ema", "autoencoder: ema or mse (of Stable Diffusion), a hub id, a folder, or identity; as in training"
    )
    vae_precision: str = option("fp32", VAE_PRECISION_HELP + "; training then needs it, too", choices=VAE_PRECISIONS)
    compile: bool = option(False, "compile the encoder of the VAE with torch.compile")
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
    if config.index:
        check_index_place(config.index, config.data_dir)
    paths = find_images(config.data_dir, config.index or Path(config.latent_dir, INDEX_NAME), config.reindex)
    paths = check_images(paths, config.image_size, config.on_bad_image, config.data_dir)
    if config.class_cond:
        image_classes(paths)
    with dist_util.main_first():
        compiled = ["encoder"] if config.compile else []
        first_stage = create_first_stage(config.vae, dist_util.dev(), config.vae_precision, compiled)
    ours = ("index", "reindex", "vae_precision", "compile")
    values = {name: value for name, value in config.values().items() if name not in ours}
    encode_latents(first_stage=first_stage, paths=paths, **values)
    logger.log(f"{config.latent_dir} is complete")


if __name__ == "__main__":
    script_util.run(main)
