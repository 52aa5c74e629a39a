"""In the style of MDT's scripts/image_sample.py."""

import argparse
import os

import numpy as np
import torch as th
import torch.distributed as dist
from diffusers.models import AutoencoderKL

import masked_diffusion.models as models_mdt
from masked_diffusion import create_diffusion, diffusion_defaults, dist_util, logger, model_and_diffusion_defaults
from masked_diffusion.script_util import NUM_CLASSES, add_dict_to_argparser, args_to_dict


def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist_multinode(args)
    logger.configure()

    configs = args_to_dict(args, model_and_diffusion_defaults().keys())
    latent_size = configs["image_size"] // 8
    model = models_mdt.__dict__[args.model](input_size=latent_size, decode_layer=args.decode_layer)
    print(model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu")))
    config_diffusion = args_to_dict(args, diffusion_defaults().keys())
    config_diffusion["timestep_respacing"] = str(args.num_sampling_steps)
    diffusion = create_diffusion(**config_diffusion)
    model.to(dist_util.dev())
    model = th.compile(model)
    model.eval()
    th.set_grad_enabled(False)
    vae = AutoencoderKL.from_pretrained(args.vae_decoder).to(dist_util.dev())

    logger.log("sampling...")
    all_images, all_labels = [], []
    while len(all_images) * args.batch_size < args.num_samples:
        shape = (args.batch_size, 4, latent_size, latent_size)
        model_kwargs = {}
        if args.cfg_cond:
            classes = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
            z = th.randn(*shape, device=dist_util.dev())
            z = th.cat([z, z], 0)
            classes_null = th.tensor([NUM_CLASSES] * args.batch_size, device=dist_util.dev())
            model_kwargs["y"] = th.cat([classes, classes_null], 0)
            model_kwargs["cfg_scale"] = args.cfg_scale
            model_kwargs["diffusion_steps"] = config_diffusion["diffusion_steps"]
            model_kwargs["scale_pow"] = args.scale_pow
        else:
            z = th.randn(*shape, device=dist_util.dev())
            classes = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
            model_kwargs["y"] = classes
        sample_fn = diffusion.ddim_sample_loop if args.use_ddim else diffusion.p_sample_loop
        sample = sample_fn(
            model.forward_with_cfg,
            z.shape,
            z,
            clip_denoised=args.clip_denoised,
            progress=True,
            model_kwargs=model_kwargs,
            device=dist_util.dev(),
        )
        if args.cfg_cond:
            sample, _ = sample.chunk(2, dim=0)
        sample = vae.decode(sample / 0.18215).sample
        sample = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8)
        sample = sample.permute(0, 2, 3, 1).contiguous()

        gathered_samples = [th.zeros_like(sample) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered_samples, sample)
        all_images.extend([sample.cpu().numpy() for sample in gathered_samples])
        if args.class_cond:
            gathered_labels = [th.zeros_like(classes) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered_labels, classes)
            all_labels.extend([labels.cpu().numpy() for labels in gathered_labels])

    arr = np.concatenate(all_images, axis=0)[: args.num_samples]
    if dist.get_rank() == 0:
        shape_str = "x".join([str(x) for x in arr.shape])
        out_path = os.path.join(logger.get_dir(), f"samples_{shape_str}.npz")
        logger.log(f"saving to {out_path}")
        np.savez(out_path, arr, np.concatenate(all_labels, axis=0)[: args.num_samples])
    dist.barrier()
    logger.log("sampling complete")


def create_argparser():
    defaults = {
        "num_sampling_steps": 250,
        "clip_denoised": False,
        "num_samples": 5000,
        "batch_size": 16,
        "use_ddim": False,
        "model_path": "",
        "model": "MDT_S_2",
        "class_cond": True,
        "cfg_scale": 3.8,
        "decode_layer": None,
        "cfg_cond": False,
    }
    defaults.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale_pow", default=4, type=float)
    parser.add_argument("--vae_decoder", type=str, default="ema")
    parser.add_argument("--world_size", default=1, type=int)
    parser.add_argument("--local_rank", default=-1, type=int)
    parser.add_argument("--local-rank", default=-1, type=int)
    parser.add_argument("--dist_on_itp", action="store_true")
    parser.add_argument("--dist_url", default="env://")
    parser.add_argument("--rank", default=0, type=int)
    add_dict_to_argparser(parser, defaults)
    return parser


if __name__ == "__main__":
    main()
