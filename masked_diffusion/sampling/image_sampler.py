"""Drawing images: one generator per image, so that an image is a function of the seed and its index."""

import numpy as np
import torch

from ..guidance import Guidance, GuidedDenoiser
from ..utils.errors import UserError
from ..utils.precision import autocast
from ..utils.random_numbers import PerSampleRandom, fold_seed

CLASS_RULES = ("random", "balanced", "list")

# ---------------------------------------------------------------- images by index


def choose_labels(indices, class_rule, num_classes, seed, classes=()):
    """(n,) int64 labels of the images `indices`.

    :param class_rule: `random`, a function of (seed, index); `balanced`, the index modulo the number of classes; or
        `list`, `classes` in their order, over and over.
    :raises UserError: for another rule, and for a list that is empty or not asked for.
    """
    if class_rule not in CLASS_RULES:
        raise UserError(f"class_rule is {class_rule!r}: choose one of {', '.join(CLASS_RULES)}")
    if (class_rule == "list") != bool(classes):
        raise UserError(f"class_rule is {class_rule!r} with {len(classes)} classes: --classes go with class_rule list")
    if class_rule == "list":
        return torch.tensor([classes[int(i) % len(classes)] for i in indices])
    if class_rule == "balanced":
        return torch.tensor([int(i) % max(num_classes, 1) for i in indices])
    return torch.tensor([fold_seed(seed, int(i), 1) % max(num_classes, 1) for i in indices])


class ImageSampler:
    """Draws images by index.

    :param model: the denoiser. :param solver: from `create_solver`. :param first_stage: decodes its samples.
    :param guidance, guide_model: see `GuidedDenoiser`.
    :param decode_batch: images that are decoded at a time; None: all.
    :param batch_size: smaller batches are filled up to it, so that a compiled model sees one shape; None: they are not.
    :raises UserError: when guidance is asked of a model without a null class.
    """

    def __init__(
        self,
        model,
        solver,
        first_stage,
        *,
        guidance=None,
        guide_model=None,
        clip_denoised=False,
        precision="fp32",
        decode_batch=None,
        batch_size=None,
        seed=0,
    ):
        self.model, self.solver, self.first_stage, self.seed = model, solver, first_stage, seed
        self.clip_denoised, self.decode_batch, self.batch_size = clip_denoised, decode_batch, batch_size
        # Guidance amplifies differences, so it is computed in full precision whatever the network computes in.
        guide = autocast(guide_model, precision) if guide_model is not None else None
        self.denoise = GuidedDenoiser(autocast(model, precision), guidance or Guidance(), model.null_label, guide)
        self.device = next(model.parameters()).device

    def start(self, indices, labels):
        """What the solver's steps begin with.

        :return: (n, C, h, w) noise, and the options of every step.
        """
        random = PerSampleRandom(self.seed, indices, self.device)
        noise = random.randn(self.model.in_channels, self.model.input_size, self.model.input_size)
        model_kwargs = {"y": labels.to(self.device)}
        return noise, {
            "clip_denoised": self.clip_denoised,
            "model_kwargs": model_kwargs,
            "randn_like": random.randn_like,
        }

    def progressive(self, indices, labels):
        """The solver's steps for (n,) indices and (n,) labels: dicts of latents `sample` and `pred_xstart`."""
        noise, options = self.start(indices, labels)
        yield from self.solver.progressive(self.denoise, noise, **options)

    @torch.no_grad()
    def decode(self, latents):
        """(n, C, h, w) latents -> (n, H, W, 3) uint8 numpy."""
        parts = latents.split(self.decode_batch or len(latents))
        return np.concatenate([to_uint8(self.first_stage.decode(part.to(self.device))) for part in parts])

    @torch.no_grad()
    def __call__(self, indices, labels):
        """(n,) indices and (n,) labels -> (n, H, W, 3) uint8 numpy."""
        places = np.arange(max(self.batch_size or 0, len(indices))) % len(indices)
        steps = self.progressive(np.asarray(indices)[places], labels[places])
        return self.decode(last_sample(steps)[: len(indices)])


def last_sample(steps):
    """The `sample` of the last of a solver's dicts; the others are let go as they come."""
    for out in steps:
        sample = out["sample"]
    return sample


def to_uint8(images):
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8 numpy."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
