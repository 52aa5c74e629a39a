"""Train MDTv2, MDT or DiT on a folder of images. Run the same command again to go on where it stopped."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.guidance import Guidance
from masked_diffusion.image_datasets import StreamSampler, image_classes, list_image_files, load_data
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.latents.cache import LatentCache, load_latents
from masked_diffusion.resample import create_named_schedule_sampler
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training import preflight
from masked_diffusion.training.finetune import load_pretrained
from masked_diffusion.training.guardian import Guardian
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.flops import forward_flops
from masked_diffusion.utils.precision import check_precision

GRID_IMAGES, GRID_STEPS, GRID_SCALE = 40, "50", 1.5


def parse_args():
    parser = script_util.make_parser(__doc__)
    script_util.add_model_flags(parser)
    script_util.add_diffusion_flags(parser)
    script_util.add_train_flags(parser)
    return parser.parse_args()


class TrainingData(NamedTuple):
    names: list  # of the files, in the order of their indices
    labels: np.ndarray | None
    class_names: list
    load: Callable  # load_data or load_latents, but for start_step and seed


def find_images(args):
    """Training from images; rank 0 looks at the files for all."""
    paths = list_image_files(args.data_dir)
    if dist_util.is_main():
        paths = preflight.check_images(paths, args.image_size, args.on_bad_image)
    paths = dist_util.broadcast_object(paths)
    labels, class_names = image_classes(paths) if args.class_cond else (None, [])
    load = partial(load_data, data_dir=args.data_dir, paths=paths, on_bad_image=args.on_bad_image)
    return TrainingData(paths, labels, class_names, load)


def find_latents(args, first_stage):
    """Training from what encode_latents.py made."""
    cache = LatentCache(args.latent_dir)
    shards = [cache.describe(shard) for shard in range(len(cache))]
    labels = np.concatenate([shard["labels"] for shard in shards]) if args.class_cond else None
    load = partial(load_latents, latent_dir=args.latent_dir, first_stage=first_stage)
    names = [name for shard in shards for name in shard["files"]]
    return TrainingData(names, labels, cache.header["classes"] if args.class_cond else [], load)


def build_model(args, config):
    torch.manual_seed(args.seed)
    model, diffusion = script_util.create_model_and_diffusion(config)
    model.to(dist_util.dev())
    if args.grad_checkpoint:
        model.enable_grad_checkpoint()
    if args.compile:
        model.compile_blocks(dynamic=args.exact_lengths)
    return model, diffusion


def grid_drawer(model, config, first_stage, precision, seed):
    """Draws the same images, of fixed noise and labels, with whatever weights the model has by then."""
    solver = create_solver("ddpm", GRID_STEPS, config["diffusion"])
    rule = "none" if model.null_label is None or not model.num_classes else model.guidance_rule
    guidance = Guidance(rule, GRID_SCALE, scale_pow=1.0, diffusion_steps=solver.original_num_steps)
    sampler = ImageSampler(model, solver, first_stage, guidance=guidance, precision=precision, seed=seed)
    labels = choose_labels(range(GRID_IMAGES), "balanced", model.num_classes, seed)
    return partial(sampler, range(GRID_IMAGES), labels)


def check_evaluation_flags(args):
    if args.eval_interval and not args.eval_reference:
        raise UserError(
            f"--eval_interval is {args.eval_interval}, but nothing to compare with: name an npz with --eval_reference"
        )
    if args.eval_interval and args.eval_samples < 2:
        raise UserError(f"--eval_samples is {args.eval_samples}: a distance needs at least two samples")


def create_evaluation(args, model, config, first_stage, precision):
    """A function without arguments that draws fixed noise and labels, without guidance, and compares the images."""
    if not args.eval_interval:
        return None
    live = load_evaluations("live")
    try:
        compare = live.LiveEvaluation(args.eval_reference, (args.image_size, args.image_size), dist_util.dev())
    except live.UserError as error:
        raise UserError(f"--eval_reference: {error}") from error
    solver = create_solver("ddpm", GRID_STEPS, config["diffusion"])
    sampler = ImageSampler(model, solver, first_stage, precision=precision, seed=args.seed)
    return lambda: compare(draw_own_part(sampler, args.eval_samples, args.batch_size))


def draw_own_part(sampler, num_samples, batch_size):
    """This rank's images, batch by batch. All ranks draw equally often, for a sharded model needs them all."""
    count = -(-num_samples // dist_util.get_world_size())
    first = dist_util.get_rank() * count
    for start in range(first, first + count, batch_size):
        indices = range(start, min(start + batch_size, first + count))
        images = sampler(indices, choose_labels(indices, "balanced", sampler.model.num_classes, sampler.seed))
        kept = images[: max(num_samples - start, 0)]
        if len(kept):
            yield kept


def main():
    args = parse_args()
    script_util.check_positive(args, "batch_size", "log_interval", "save_interval", "lr", "image_size", "max_bad_steps")
    check_evaluation_flags(args)
    dist_util.setup_dist()
    logger.configure(args.log_dir, quiet=not dist_util.is_main())
    precision = script_util.precision_of(args)
    check_precision(precision, dist_util.dev())
    with dist_util.main_first():
        first_stage = create_first_stage(args.vae, dist_util.dev())
    data = find_latents(args, first_stage) if args.latent_dir else find_images(args)
    num_classes = (args.num_classes or len(data.class_names)) if args.class_cond else 0
    if args.class_cond:
        preflight.check_classes(args.latent_dir or args.data_dir, data.class_names, num_classes)
    global_batch = args.batch_size * dist_util.get_world_size()
    config = {
        "model": script_util.model_config(args, first_stage, num_classes),
        "diffusion": script_util.diffusion_config(args),
        "vae": args.vae,
        "classes": data.class_names,
        "flags": vars(args) | {"global_batch": global_batch},
    }
    model, diffusion = build_model(args, config)
    optimizer = args.optimizer or ("adan" if args.model.startswith("MDTv2") else "adamw")
    script_util.save_config(logger.get_dir(), config, args.allow_config_change)

    num_params = sum(p.numel() for p in model.parameters())
    num_emas = len(args.ema_rate.split(",")) + len(args.phema.split(",")) * bool(args.phema)
    preflight.report(
        labels=data.labels,
        names=data.class_names,
        num_images=len(data.names),
        model_name=args.model,
        num_params=num_params,
        gflop=forward_flops(model) / 1e9,
        global_batch=global_batch,
        memory=preflight.memory_estimate(num_params, num_emas, optimizer, dist_util.get_world_size(), args.shard),
    )
    kept_multiple = max(1, model.num_patches // 16) if args.compile and not args.exact_lengths else 1
    TrainLoop(
        objective=TwoPassObjective(model, diffusion, precision, kept_multiple),
        first_stage=first_stage,
        make_data=partial(
            data.load,
            batch_size=args.batch_size,
            image_size=args.image_size,
            class_cond=args.class_cond,
            random_crop=args.random_crop,
            random_flip=args.random_flip,
            num_workers=args.num_workers,
        ),
        batch_names=lambda step, seed: [
            data.names[index] for index, _ in StreamSampler(len(data.names), args.batch_size, seed=seed).batch(step)
        ],
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        guardian=Guardian(args.max_bad_steps, args.spike_zscore),
        load_weights=partial(load_pretrained, class_names=data.class_names),
        draw_grid=grid_drawer(model, config, first_stage, precision, args.seed),
        config=config,
        log_dir=logger.get_dir(),
        optimizer=optimizer,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        weight_decay=args.weight_decay,
        grad_clip=args.grad_clip,
        split_backward=args.split_backward,
        shard=args.shard,
        lr_anneal_steps=args.lr_anneal_steps,
        max_steps=args.max_steps,
        max_rollbacks=args.rollback_on_spike,
        ema_rate=args.ema_rate,
        phema=args.phema,
        phema_dtype=args.phema_dtype,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        sample_interval=args.sample_interval,
        eval_interval=args.eval_interval,
        evaluate=create_evaluation(args, model, config, first_stage, precision),
        keep=args.keep,
        resume_checkpoint=args.resume_checkpoint,
        fp16_scale_growth=args.fp16_scale_growth,
        seed=args.seed,
    ).run_loop()


if __name__ == "__main__":
    script_util.run(main)
