"""In the style of MDT's infer_mdt.py: WEIGHTS VAE OUT."""

import sys

import torch
from diffusers.models import AutoencoderKL
from torchvision.utils import save_image

from masked_diffusion import create_diffusion
from masked_diffusion.models import MDTv2_Nano_2

weights, vae_folder, out = sys.argv[1:]
torch.manual_seed(1)
torch.set_grad_enabled(False)
device = "cuda" if torch.cuda.is_available() else "cpu"
latent_size, null = 8, 1000

model = MDTv2_Nano_2(input_size=latent_size, decode_layer=2).to(device)
model.load_state_dict(torch.load(weights, map_location=lambda storage, location: storage))
model.eval()
diffusion = create_diffusion(str(6))
vae = AutoencoderKL.from_pretrained(vae_folder).to(device)

class_labels = [19, 23, 106]
n = len(class_labels)
z = torch.randn(n, 4, latent_size, latent_size, device=device)
y = torch.tensor(class_labels, device=device)
z = torch.cat([z, z], 0)
y = torch.cat([y, torch.tensor([null] * n, device=device)], 0)
model_kwargs = {"y": y, "cfg_scale": 4.0, "scale_pow": 0.01}

samples = diffusion.p_sample_loop(
    model.forward_with_cfg, z.shape, z, clip_denoised=False, model_kwargs=model_kwargs, progress=True, device=device
)
samples, _ = samples.chunk(2, dim=0)
samples = vae.decode(samples / 0.18215).sample
save_image(samples, out, nrow=3, normalize=True, value_range=(-1, 1))
