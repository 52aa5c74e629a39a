"""Draw images into samples_{N}x{H}x{W}x{C}.npz. Run the same command again to go on where it stopped."""

from functools import partial
from pathlib import Path

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.sampling import build as sample_util
from masked_diffusion.sampling.class_names import find_label
from masked_diffusion.sampling.image_sampler import CLASS_RULES, choose_labels
from masked_diffusion.sampling.shards import ShardStore, draw_samples
from masked_diffusion.utils.pictures import save_grid


def parse_args():
    parser = script_util.make_parser(__doc__)
    sample_util.add_weights_flags(parser)
    sample_util.add_solver_flags(parser)
    sample_util.add_guidance_flags(parser)
    images = parser.add_argument_group("images")
    images.add_argument("--num_samples", type=int, default=50000, help="images to draw")
    images.add_argument("--batch_size", type=int, default=16, help="images per rank at a time")
    images.add_argument(
        "--class_rule", choices=CLASS_RULES, default="random",
        help="balanced: image i is of class i mod n; list: --classes, over and over",
    )  # fmt: skip
    images.add_argument("--classes", nargs="+", default=(), help="for class_rule list: numbers or names")
    images.add_argument("--log_dir", help="None: $OPENAI_LOGDIR, or output")
    return parser.parse_args()


def main():
    args = parse_args()
    script_util.check_positive(args, "num_samples", "batch_size")
    dist_util.join_process_group()
    logger.configure(args.log_dir, quiet=not dist_util.is_main())
    sampler, names, files, settings = sample_util.load_sampler(args, args.batch_size)
    num_classes, size = sampler.model.num_classes, sampler.model.input_size * sampler.first_stage.downsample
    classes = [find_label(text, names, num_classes) for text in args.classes]
    choose = partial(
        choose_labels, class_rule=args.class_rule, num_classes=num_classes, seed=args.seed, classes=classes
    )
    choose([0])  # a rule that contradicts its classes ends the run before it begins
    path = Path(logger.get_dir(), f"samples_{args.num_samples}x{size}x{size}x3.npz")
    settings |= sample_util.hash_files(files) | {"class_rule": args.class_rule, "classes": classes}
    store = ShardStore(path, settings)
    if store.finished():
        logger.log(f"{path} is there already: nothing to draw")
        return
    draw_samples(sampler, store, args.num_samples, args.batch_size, choose)
    if dist_util.is_main():
        save_grid(path.with_suffix(".png"), store.merge(args.num_samples))
        logger.log(f"wrote {path} and {path.with_suffix('.png')}")
    dist_util.barrier()


if __name__ == "__main__":
    script_util.run(main)
