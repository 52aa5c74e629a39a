"""In the style of DiT's sample.py; only the import lines are this package's."""

import argparse

import torch
from diffusers.models import AutoencoderKL
from torchvision.utils import save_image

from masked_diffusion import create_diffusion
from masked_diffusion.models import DiT_models
from masked_diffusion.weights.pretrained import read_weights as find_model


def main(args):
    torch.manual_seed(args.seed)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    latent_size = args.image_size // 8
    model = DiT_models[args.model](input_size=latent_size, num_classes=args.num_classes).to(device)
    model.load_state_dict(find_model(args.ckpt))
    model.eval()
    diffusion = create_diffusion(str(args.num_sampling_steps))
    vae = AutoencoderKL.from_pretrained(args.vae).to(device)

    class_labels = [207, 360]
    n = len(class_labels)
    z = torch.randn(n, 4, latent_size, latent_size, device=device)
    y = torch.tensor(class_labels, device=device)
    z = torch.cat([z, z], 0)
    y = torch.cat([y, torch.tensor([1000] * n, device=device)], 0)
    samples = diffusion.p_sample_loop(
        model.forward_with_cfg, z.shape, z, clip_denoised=False, model_kwargs={"y": y, "cfg_scale": args.cfg_scale},
        progress=True, device=device,
    )  # fmt: skip
    samples, _ = samples.chunk(2, dim=0)
    samples = vae.decode(samples / 0.18215).sample
    save_image(samples, args.out, nrow=4, normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=str, choices=list(DiT_models.keys()), default="DiT-XL/2")
    parser.add_argument("--vae", type=str, default="mse")
    parser.add_argument("--image-size", type=int, choices=[64, 256, 512], default=256)
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--cfg-scale", type=float, default=4.0)
    parser.add_argument("--num-sampling-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", type=str, default=None)
    parser.add_argument("--out", type=str, default="sample.png")
    main(parser.parse_args())
