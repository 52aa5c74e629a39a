"""Train MDTv2, MDT or DiT on a folder of images. Run the same command again to go on where it stopped."""

from functools import partial

import torch

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.autoencoder import create_first_stage
from masked_diffusion.image_datasets import image_classes, list_image_files, load_data
from masked_diffusion.objective import TwoPassObjective
from masked_diffusion.precision import check_precision
from masked_diffusion.resample import create_named_schedule_sampler
from masked_diffusion.train_util import TrainLoop


def parse_args():
    parser = script_util.make_parser(__doc__)
    script_util.add_model_flags(parser)
    script_util.add_diffusion_flags(parser)
    script_util.add_train_flags(parser)
    return parser.parse_args()


def count_classes(args):
    """The number of classes the model gets, and their names."""
    if not args.class_cond:
        return 0, []
    _, names = image_classes(list_image_files(args.data_dir))
    num_classes = args.num_classes or len(names)
    if len(names) > num_classes:
        first = ", ".join(names[:5])
        raise ValueError(
            f"{args.data_dir} has {len(names)} classes ({first}, ...), more than --num_classes {num_classes}"
        )
    return num_classes, names


def main():
    args = parse_args()
    script_util.check_positive(args, "batch_size", "log_interval", "save_interval", "lr", "image_size")
    dist_util.setup_dist()
    logger.configure(args.log_dir, quiet=not dist_util.is_main())
    precision = script_util.precision_of(args)
    check_precision(precision, dist_util.dev())
    num_classes, class_names = count_classes(args)
    with dist_util.main_first():
        first_stage = create_first_stage(args.vae, dist_util.dev())
    config = {
        "model": script_util.model_config(args, first_stage, num_classes),
        "diffusion": script_util.diffusion_config(args),
        "vae": args.vae,
        "classes": class_names,
        "flags": vars(args),
    }
    torch.manual_seed(args.seed)
    model, diffusion = script_util.create_model_and_diffusion(config)
    script_util.save_config(logger.get_dir(), config)
    logger.log(
        f"{args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters, {num_classes} classes"
    )

    TrainLoop(
        objective=TwoPassObjective(model.to(dist_util.dev()), diffusion, precision),
        first_stage=first_stage,
        make_data=partial(
            load_data,
            data_dir=args.data_dir,
            batch_size=args.batch_size,
            image_size=args.image_size,
            class_cond=args.class_cond,
            random_crop=args.random_crop,
            random_flip=args.random_flip,
            num_workers=args.num_workers,
            seed=args.seed,
        ),
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        log_dir=logger.get_dir(),
        optimizer=args.optimizer or ("adan" if args.model.startswith("MDTv2") else "adamw"),
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        weight_decay=args.weight_decay,
        grad_clip=args.grad_clip,
        lr_anneal_steps=args.lr_anneal_steps,
        max_steps=args.max_steps,
        ema_rate=args.ema_rate,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=args.resume_checkpoint,
        fp16_scale_growth=args.fp16_scale_growth,
        seed=args.seed,
    ).run_loop()


if __name__ == "__main__":
    script_util.run(main)
