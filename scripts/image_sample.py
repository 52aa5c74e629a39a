"""Draw images into samples_{N}x{H}x{W}x{C}.npz. Run the same command again to go on where it stopped."""

from pathlib import Path

from masked_diffusion import create_diffusion, dist_util, load_model, logger, script_util
from masked_diffusion.autoencoder import create_first_stage
from masked_diffusion.checkpoint import file_hash, find_weights, read_config
from masked_diffusion.precision import check_precision
from masked_diffusion.sampling import Sampler, ShardStore, draw_samples, save_grid


def parse_args():
    parser = script_util.make_parser(__doc__)
    script_util.add_sample_flags(parser)
    return parser.parse_args()


def settings(args, weights, vae):
    """What the images are a function of."""
    names = (
        "num_sampling_steps",
        "use_ddim",
        "clip_denoised",
        "cfg_cond",
        "cfg_scale",
        "scale_pow",
        "class_rule",
        "seed",
    )
    return {"weights": file_hash(weights), "vae": vae} | {name: getattr(args, name) for name in names}


def main():
    args = parse_args()
    script_util.check_positive(args, "num_samples", "batch_size")
    dist_util.setup_dist()
    logger.configure(args.log_dir, quiet=not dist_util.is_main())
    precision = script_util.precision_of(args)
    check_precision(precision, dist_util.dev())
    weights = find_weights(args.model_path)
    config = read_config(weights)
    vae = args.vae_decoder or config.get("vae", "ema")
    model = load_model(weights, dist_util.dev(), decode_layer=args.decode_layer)
    with dist_util.main_first():
        first_stage = create_first_stage(vae, dist_util.dev())
    script_util.check_agreement(args, model, first_stage)
    diffusion = create_diffusion(
        **config.get("diffusion", {"learn_sigma": model.learn_sigma}), timestep_respacing=args.num_sampling_steps
    )
    sampler = Sampler(
        model,
        diffusion,
        first_stage,
        cfg_scale=args.cfg_scale if args.cfg_cond else None,
        scale_pow=args.scale_pow,
        use_ddim=args.use_ddim,
        clip_denoised=args.clip_denoised,
        precision=precision,
        seed=args.seed,
    )
    size = model.input_size * first_stage.downsample
    path = Path(logger.get_dir(), f"samples_{args.num_samples}x{size}x{size}x3.npz")
    store = ShardStore(path, settings(args, weights, vae))
    if store.finished():
        logger.log(f"{path} is there already: nothing to draw")
        return
    draw_samples(sampler, store, args.num_samples, args.batch_size, args.class_rule)
    if dist_util.is_main():
        save_grid(path.with_suffix(".png"), store.merge(args.num_samples))
        logger.log(f"wrote {path} and {path.with_suffix('.png')}")
    dist_util.barrier()


if __name__ == "__main__":
    script_util.run(main)
