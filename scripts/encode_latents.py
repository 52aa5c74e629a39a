"""Encode a folder of images for --latent_dir of training. Run the same command again to go on where it stopped."""

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.latents.cache import encode_latents


def parse_args():
    parser = script_util.make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--data_dir", required=True, help="folder of images named CLASS_ANYTHING, with subfolders")
    files.add_argument("--latent_dir", required=True, help="folder that the latents go to")
    files.add_argument("--class_cond", type=script_util.str2bool, default=True, help="keep class labels")
    files.add_argument("--shard_size", type=int, default=1024, help="images per file")

    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--image_size", type=int, default=256, help="height and width of the centre crops")
    encoding.add_argument("--vae", default="ema", help="first stage: ema, mse, a hub id, a folder; identity for pixels")
    encoding.add_argument("--batch_size", type=int, default=32, help="images per rank at a time")
    encoding.add_argument(
        "--num_workers", type=int, default=4, help="loader processes per rank; 0: in the encoding process"
    )
    encoding.add_argument(
        "--verify", type=script_util.str2bool, default=False, help="compare the shards that are there with checksums"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    script_util.check_positive(args, "image_size", "batch_size", "shard_size")
    dist_util.join_process_group()
    logger.configure(args.latent_dir, quiet=not dist_util.is_main())
    with dist_util.main_first():
        first_stage = create_first_stage(args.vae, dist_util.dev())
    encode_latents(first_stage=first_stage, **{key: value for key, value in vars(args).items() if key != "local_rank"})
    logger.log(f"{args.latent_dir} is complete")


if __name__ == "__main__":
    script_util.run(main)
