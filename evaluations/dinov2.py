"""DINOv2 features, in which Frechet distances follow human judgement more closely (Stein et al. 2023)."""

from pathlib import Path

import torch
import torch.nn.functional as F

from . import ranks
from .errors import UserError

MODEL, IMAGE_SIZE = "vit_large_patch14_dinov2", 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def create_network(weights, model):
    """A timm model without its head. :param weights: `hub`, or a file of timm's names (.safetensors or .pth)."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    options = {"num_classes": 0, "img_size": IMAGE_SIZE}
    if weights == "hub":
        try:
            return timm.create_model(model, pretrained=True, **options)
        except Exception as error:  # the hub's client raises kinds of its own
            raise UserError(
                f"the weights of {model} cannot be downloaded ({type(error).__name__}): fetch model.safetensors of "
                f"timm/{model}.lvd142m from the Hugging Face hub and name that file with --dinov2"
            ) from error
    network = timm.create_model(model, **options)
    try:
        network.load_state_dict(checkpoint_filter_fn(_read(weights), network))
    except Exception as error:  # safetensors, torch and timm each raise their own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights} does not hold the weights of timm's {model} ({reason})") from error
    return network


def _read(path):
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


class DinoV2:
    """The class token of a DINOv2 network, at 224 x 224 pixels (bicubic, antialiased).

    :param weights: see `create_network`. :param device: where the network runs.
    :raises UserError: when the weights cannot be had or do not fit.
    """

    name = "dinov2"

    def __init__(self, weights, device="cpu", model=MODEL):
        self.device = torch.device(device)
        self.network = create_network(weights, model).to(device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, STD))

    @ranks.full_float32()
    @torch.no_grad()
    def __call__(self, images):
        """(N, H, W, 3) uint8 images -> dinov2 (N, d), a float32 tensor."""
        x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True, align_corners=False)
        features = self.network.forward_features((x.clamp(0, 1) - self.mean) / self.std)
        return {"dinov2": features[:, 0]}
