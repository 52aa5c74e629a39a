"""Pack a folder of images into shards for --data_dir. Run the same command again to go on where it stopped."""

from dataclasses import dataclass

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.images.packing import check_out, pack_images
from masked_diffusion.utils.options import Config, option


@dataclass(frozen=True)
class PackConfig(Config):
    """packing"""

    data_dir: str = option("", "folder of images named CLASS_ANYTHING.jpg, searched with its subfolders")
    out: str = option("", "folder to write the shards to: a --data_dir of its own")
    class_cond: bool = option(True, "keep class labels")
    shard_size: int = option(4096, "images per file", at_least=1)
    on_bad_image: str = option("error", "what to do about images that cannot be read", choices=("error", "skip"))
    num_workers: int = option(4, "packing processes per rank; 0: pack in the main process", at_least=0)
    verify: bool = option(False, "compare the existing shards with their checksums, and pack damaged ones again")


def main() -> None:
    config = script_util.parse_flags(PackConfig, __doc__)
    check_out(config.data_dir, config.out)
    dist_util.join_process_group()
    logger.configure(config.out, quiet=not dist_util.is_main())
    pack_images(**config.values())
    logger.log(f"{config.out} is complete")


if __name__ == "__main__":
    script_util.run(main)
