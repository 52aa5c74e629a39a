"""In the style of ADM: a training loop of one's own, image_nll.py's bound, classifier_sample.py's guidance."""

import argparse
import copy
import os

import numpy as np
import torch as th
import torch.distributed as dist
import torch.nn.functional as F

from masked_diffusion import create_model, dist_util, logger
from masked_diffusion.image_datasets import load_data
from masked_diffusion.nn import mean_flat, update_ema
from masked_diffusion.resample import LossAwareSampler, UniformSampler, create_named_schedule_sampler
from masked_diffusion.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    create_gaussian_diffusion,
    diffusion_defaults,
)
from masked_diffusion.train_util import log_loss_dict, parse_resume_step_from_filename


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    logger.configure(args.log_dir, ["stdout", "log", "csv"])
    logger.log("creating model and diffusion...")
    th.manual_seed(0)
    model = create_model("DiT_Nano_2", input_size=args.image_size, in_channels=3, num_classes=NUM_CLASSES)
    diffusion = create_gaussian_diffusion(
        steps=args.diffusion_steps,
        learn_sigma=args.learn_sigma,
        noise_schedule=args.noise_schedule,
        use_kl=args.use_kl,
        predict_xstart=args.predict_xstart,
        rescale_timesteps=args.rescale_timesteps,
        rescale_learned_sigmas=args.rescale_learned_sigmas,
        timestep_respacing=args.timestep_respacing,
    )
    model.to(dist_util.dev())
    dist_util.sync_params(model.parameters())
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    data = load_data(
        data_dir=args.data_dir, batch_size=args.batch_size, image_size=args.image_size, class_cond=args.class_cond
    )
    train(args, model, diffusion, schedule_sampler, data)
    run_bpd_evaluation(model, diffusion, data, args.batch_size, args.clip_denoised)
    sample(args, model, diffusion)
    return model


def train(args, model, diffusion, schedule_sampler, data):
    opt = th.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    ema = copy.deepcopy(model)
    resume_step = parse_resume_step_from_filename(args.resume_checkpoint)
    for step in range(args.iterations):
        logger.logkv("step", step + resume_step)
        batch, cond = next(data)
        micro, micro_cond = batch.to(dist_util.dev()), {k: v.to(dist_util.dev()) for k, v in cond.items()}
        t, weights = schedule_sampler.sample(micro.shape[0], dist_util.dev())
        losses = diffusion.training_losses(model, micro, t, model_kwargs=micro_cond)
        if isinstance(schedule_sampler, LossAwareSampler):
            schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
        else:
            assert isinstance(schedule_sampler, UniformSampler)
        loss = (losses["loss"] * weights).mean()
        log_loss_dict(diffusion, t, {k: v * weights for k, v in losses.items()})
        opt.zero_grad()
        loss.backward()
        logger.logkv_mean("grad_norm", sum(p.grad.norm() ** 2 for p in model.parameters() if p.grad is not None) ** 0.5)
        opt.step()
        update_ema(ema.parameters(), model.parameters(), rate=0.9)
        logger.dumpkvs()
    if dist.get_rank() == 0:
        th.save(ema.state_dict(), os.path.join(logger.get_dir(), f"ema_0.9_{args.iterations:06d}.pt"))
    dist.barrier()


def run_bpd_evaluation(model, diffusion, data, num_samples, clip_denoised):
    batch, model_kwargs = next(data)
    model_kwargs = {k: v.to(dist_util.dev()) for k, v in model_kwargs.items()}
    metrics = diffusion.calc_bpd_loop(
        model, batch.to(dist_util.dev()), clip_denoised=clip_denoised, model_kwargs=model_kwargs
    )
    for key in ("vb", "mse", "xstart_mse"):
        terms = metrics[key].mean(dim=0) / dist.get_world_size()
        dist.all_reduce(terms)
        np.savez(os.path.join(logger.get_dir(), f"{key}_terms.npz"), terms.detach().cpu().numpy())
    total_bpd = metrics["total_bpd"].mean() / dist.get_world_size()
    dist.all_reduce(total_bpd)
    logger.log(f"done {num_samples} samples: bpd={total_bpd.item()}")


def sample(args, model, diffusion):
    scale = th.linspace(-1, 1, 3 * args.image_size**2).view(3, args.image_size, args.image_size)

    def classifier(x, t):
        return th.stack([mean_flat(scale * x), mean_flat(-scale * x)], dim=1)

    def cond_fn(x, t, y=None):
        with th.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            selected = log_probs[range(len(log_probs)), (y % 2).view(-1)]
            return th.autograd.grad(selected.sum(), x_in)[0] * args.classifier_scale

    def model_fn(x, t, y=None):
        return model(x, t, y if args.class_cond else None)

    model.eval()
    th.manual_seed(1)
    classes = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
    sample_fn = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
    sample = sample_fn(
        model_fn,
        (args.batch_size, 3, args.image_size, args.image_size),
        clip_denoised=args.clip_denoised,
        model_kwargs={"y": classes},
        cond_fn=cond_fn,
        device=dist_util.dev(),
    )
    sample = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
    gathered = [th.zeros_like(sample) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sample)
    arr = np.concatenate([part.cpu().numpy() for part in gathered], axis=0)
    shape_str = "x".join([str(x) for x in arr.shape])
    np.savez(os.path.join(logger.get_dir(), f"samples_{shape_str}.npz"), arr, classes.cpu().numpy())
    logger.log("sampling complete")


def create_argparser():
    defaults = {
        "data_dir": "",
        "log_dir": "",
        "schedule_sampler": "uniform",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "batch_size": 4,
        "iterations": 2,
        "resume_checkpoint": "",
        "image_size": 8,
        "class_cond": True,
        "clip_denoised": True,
        "use_ddim": False,
        "classifier_scale": 1.0,
    }
    defaults.update(diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return parser


if __name__ == "__main__":
    trained = main()
