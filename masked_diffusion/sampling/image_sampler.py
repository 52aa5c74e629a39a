"""Drawing images: one generator per image, so that an image is a function of the seed and its index."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..guidance import Guidance, GuidedDenoiser
from ..sample_config import CLASS_RULES, QUANTIZERS
from ..utils.errors import UserError
from ..utils.precision import autocast
from ..utils.random_numbers import PerSampleRandom, fold_seed
from .solvers import DiffusionSolver, FlowSolver, SchedulerSolver

# ---------------------------------------------------------------- images by index


def choose_labels(
    indices: Iterable[int], class_rule: str, num_classes: int, seed: int, classes: Sequence[int] = ()
) -> torch.Tensor:
    """(n,) int64 labels of the images `indices`.

    :param class_rule: `random`, a function of (seed, index); `balanced`, the index modulo the number of classes; or
        `list`, `classes` in their order, over and over.
    :raises UserError: for another rule, and for a list that is empty or not asked for.
    """
    if class_rule not in CLASS_RULES:
        raise UserError(f"--class_rule is {class_rule!r}: choose one of {', '.join(CLASS_RULES)}")
    if (class_rule == "list") != bool(classes):
        raise UserError(
            f"--class_rule is {class_rule!r} with {len(classes)} --classes: the rule list needs some, the others none"
        )
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
    :param quantize: how pixels become whole numbers; see `to_uint8`.
    :param check_finite: refuse images with NaN or infinite pixels. Grids of a model in training are drawn without, for
        they must not end its run.
    :raises UserError: when guidance is asked of a model without a null class.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        solver: DiffusionSolver | SchedulerSolver | FlowSolver,
        first_stage: Any,
        *,
        guidance: Guidance | None = None,
        guide_model: torch.nn.Module | None = None,
        clip_denoised: bool = False,
        precision: str = "fp32",
        decode_batch: int | None = None,
        batch_size: int | None = None,
        quantize: str = "round",
        check_finite: bool = True,
        seed: int = 0,
    ):
        self.model, self.solver, self.first_stage, self.seed = model, solver, first_stage, seed
        self.clip_denoised, self.decode_batch, self.batch_size = clip_denoised, decode_batch, batch_size
        self.precision, self.quantize, self.check_finite = precision, quantize, check_finite
        # Guidance amplifies differences, so it is computed in full precision whatever the network computes in.
        guide = autocast(guide_model, precision) if guide_model is not None else None
        self.denoise = GuidedDenoiser(autocast(model, precision), guidance or Guidance(), model.null_label, guide)

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return next(self.model.parameters()).device

    @property
    def size(self) -> int:
        """Height and width of the images in pixels."""
        return self.model.input_size * self.first_stage.downsample

    def start(self, indices: Sequence[int], labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
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

    def progressive(self, indices: Sequence[int], labels: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """The solver's steps for (n,) indices and (n,) labels: dicts of latents `sample` and `pred_xstart`."""
        noise, options = self.start(indices, labels)
        yield from self.solver.progressive(self.denoise, noise, **options)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, indices: Sequence[int] | None = None) -> np.ndarray:
        """Latents -> pixels.

        :param latents: (n, C, h, w). :param indices: (n,) of the images, for messages; None: 0 to n - 1.
        :return: (n, H, W, 3) uint8.
        :raises UserError: for an image that is not finite, where that is checked.
        """
        indices = range(len(latents)) if indices is None else indices
        drawn, rows = [], self.decode_batch or len(latents)
        for first in range(0, len(latents), rows):
            images = self.first_stage.decode(latents[first : first + rows].to(self.device))
            if self.check_finite:
                refuse_broken(images, indices[first : first + rows], self.precision)
            drawn.append(to_uint8(images, self.quantize))
        return np.concatenate(drawn)

    @torch.no_grad()
    def __call__(self, indices: Sequence[int], labels: torch.Tensor) -> np.ndarray:
        """(n,) indices and (n,) labels -> (n, H, W, 3) uint8."""
        places = np.arange(max(self.batch_size or 0, len(indices))) % len(indices)
        steps = self.progressive(np.asarray(indices)[places], labels[places])
        return self.decode(last_sample(steps)[: len(indices)], indices)


def last_sample(steps: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The `sample` of the last of a solver's dicts; the others are let go as they come."""
    for out in steps:
        sample = out["sample"]
    return sample


# ---------------------------------------------------------------- pixels


def refuse_broken(images: torch.Tensor, indices: Sequence[int], precision: str = "fp32") -> None:
    """Refuse images that are not finite, before anything is written. The host waits for the device, once.

    :param images: (n, ...). :param indices: (n,) of the images. :param precision: that they were drawn in.
    :raises UserError: names the first such image and the likely cause.
    """
    broken = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if broken:
        cause = (
            "the weights are broken, of a run that diverged say, or the guidance scale (--cfg_scale) is far too large"
        )
        if precision == "fp16":
            cause = "fp16 overflows in this model: use --precision bf16 or fp32"
        raise UserError(
            f"image {indices[broken[0]]} has pixels that are NaN or infinite ({len(broken)} of {len(images)} images "
            f"of its batch do): {cause}"
        )


def to_uint8(images: torch.Tensor, quantize: str = "round") -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8.

    :param quantize: `round`, to the nearest, as torchvision's save_image does in the published infer_mdt.py; or
        `truncate`, down, as ADM and MDT make the npz that their published FID is of: half of the pixels are 1 lower.
    :raises UserError: for another rule.
    """
    if quantize not in QUANTIZERS:
        raise UserError(f"--quantize is {quantize!r}: choose one of {', '.join(QUANTIZERS)}")
    pixels = (images.float() + 1) * 127.5
    pixels = (pixels.round() if quantize == "round" else pixels).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
