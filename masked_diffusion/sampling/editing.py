"""Drawing from a given image: filling a hole (RePaint) and variations (SDEdit), in the first stage's latents."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..image_datasets import center_crop_arr, read_image
from ..utils.errors import UserError
from .image_sampler import ImageSampler, last_sample
from .solvers import DiffusionSolver, FlowSolver, SchedulerSolver


def read_image_and_hole(image_path: str | Path, hole_path: str | Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and the part of it to fill, both cropped as training crops.

    :param hole_path: a picture that is white where the image is to be filled, of the image's own size.
    :return: (size, size, 3) uint8 and (size, size) bool, True = hole.
    :raises UserError: for pictures that cannot be read or differ in size, and for a hole that is empty.
    """
    image, hole = read_image(image_path), read_image(hole_path)
    if image.size != hole.size:
        raise UserError(f"{image_path} is {image.size}, {hole_path} is {hole.size}: mask and image must have one size")
    hole = center_crop_arr(hole, size).mean(axis=2) > 127
    if not hole.any():
        raise UserError(f"{hole_path} has nothing white in its centre: paint what is to be filled white")
    return center_crop_arr(image, size), hole


def encode(image_sampler: ImageSampler, image: np.ndarray) -> torch.Tensor:
    """One (H, W, 3) or n (n, H, W, 3) uint8 images -> (1 or n, C, h, w) latents: the mean of the posterior.

    :raises UserError: for an image of another size than the model's.
    """
    size = image_sampler.size
    if image.shape[-3:] != (size, size, 3) or image.dtype != np.uint8:
        raise UserError(f"the image is {image.shape} {image.dtype}: it must be ({size}, {size}, 3) uint8")
    pixels = torch.from_numpy(image.reshape(-1, size, size, 3)).to(image_sampler.device)
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    mean = image_sampler.first_stage.moments(pixels)[:, :1]
    return image_sampler.first_stage.sample(mean)


def _stepper(image_sampler: ImageSampler) -> DiffusionSolver | FlowSolver:
    """The image sampler's solver.

    :raises UserError: for one that takes no single steps.
    """
    if isinstance(image_sampler.solver, SchedulerSolver):
        raise UserError(f"solver {image_sampler.solver.name} cannot start from an image: choose ddpm or ddim")
    return image_sampler.solver


# ---------------------------------------------------------------- filling a hole

METHODS = ("repaint", "side-interpolater")


def resampling_times(num_timesteps: int, jump_length: int, resamplings: int) -> list[int]:
    """The times that RePaint visits: down to 0, with jumps back up (Lugmayr et al. 2022, appendix B).

    :param jump_length: steps of each jump. :param resamplings: how often each stretch is walked down; 1 is no jump.
    :return: list of times; x of time T is noise, x of time 0 the image. Neighbours differ by 1.
    """
    jumps = dict.fromkeys(range(0, num_timesteps - jump_length, jump_length), resamplings - 1)
    time, times = num_timesteps, [num_timesteps]
    while time > 0:
        time -= 1
        times.append(time)
        if jumps.get(time, 0) > 0:
            jumps[time] -= 1
            for _ in range(jump_length):
                time += 1
                times.append(time)
    return times


def count_evaluations(num_timesteps: int, jump_length: int, resamplings: int) -> int:
    """Steps that `inpaint_progressive` yields."""
    return sum(a > b for a, b in itertools.pairwise(resampling_times(num_timesteps, jump_length, resamplings)))


def known_tokens(model: torch.nn.Module, hole: torch.Tensor) -> torch.Tensor:
    """The tokens of which something is known, as a masked pass keeps them; those wholly in the hole are dropped.

    :param hole: (1, 1, h, w), 1 = hole.
    :return: (1, K) int64 positions, ascending.
    :raises UserError: for a model without a trained side-interpolater, and for a hole that is everything.
    """
    if not model.interpolates:
        raise UserError(
            "--method side-interpolater needs a model that was trained with --mask_ratio, but this "
            f"{type(model).__name__} was not: choose --method repaint"
        )
    ids_keep = F.max_pool2d(1 - hole, model.patch_size).flatten().nonzero().view(1, -1)
    if not ids_keep.numel():
        raise UserError(
            "nothing of the image is known, so --method side-interpolater has nothing to interpolate from: choose "
            "--method repaint, or a smaller hole"
        )
    return ids_keep


@torch.no_grad()
def inpaint_progressive(
    image_sampler: ImageSampler,
    indices: Sequence[int],
    labels: torch.Tensor,
    image: np.ndarray,
    hole: np.ndarray,
    jump_length: int = 10,
    resamplings: int = 10,
    method: str = "repaint",
) -> Iterator[dict[str, torch.Tensor]]:
    """Fill a hole (RePaint, Lugmayr et al. 2022, algorithm 1), step by step.

    With `side-interpolater`, every step is a masked pass of MDT or MDTv2 that drops the tokens of the hole: the encoder
    sees the others alone, and the side-interpolater fills in the dropped ones. The rest is as in RePaint.

    :param indices: (n,) that the noise is a function of. :param labels: (n,) int64 classes to fill with.
    :param image: (H, W, 3) uint8, or (n, H, W, 3), one each.
    :param hole: (H, W) bool, True = to fill; what the image has there is not looked at.
    :param jump_length, resamplings: see `resampling_times`; more of either joins hole and surroundings better.
    :param method: one of `METHODS`.
    :return: a generator of dicts of `sample` and `pred_xstart`, (n, C, h, w) latents. See `paste` for the end.
    :raises UserError: for another method, and as `known_tokens`.
    """
    if method not in METHODS:
        raise UserError(f"--method is {method!r}: choose one of {', '.join(METHODS)}")
    solver = _stepper(image_sampler)
    x_start = encode(image_sampler, np.where(hole[:, :, None], np.uint8(128), image)).expand(len(indices), -1, -1, -1)
    hole = torch.from_numpy(hole).to(image_sampler.device)[None, None].float()
    hole = F.max_pool2d(
        hole, image_sampler.first_stage.downsample
    )  # a latent is unknown as soon as one of its pixels is
    denoise = image_sampler.denoise
    if method == "side-interpolater":
        denoise = denoise.keeping(known_tokens(image_sampler.model, hole))
    x, options = image_sampler.start(indices, labels)
    times = resampling_times(solver.num_steps, jump_length, resamplings)
    for time, following in itertools.pairwise(times):
        if following > time:  # one step of the forward process
            x = solver.renoise(x, time, options["randn_like"](x))
            continue
        out = solver.step(denoise, x, time - 1, **options)
        known = x_start
        if following > 0:
            known = solver.add_noise(x_start, following - 1, options["randn_like"](x))
        x = hole * out["sample"] + (1 - hole) * known
        yield {"sample": x, "pred_xstart": hole * out["pred_xstart"] + (1 - hole) * x_start}


def paste(image: np.ndarray, hole: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(n, H, W, 3) uint8 `drawn` in the hole, and around it the pixels of the image: (H, W, 3), or (n, H, W, 3)."""
    return np.where(hole[:, :, None], drawn, image)


def inpaint(
    image_sampler: ImageSampler,
    indices: Sequence[int],
    labels: torch.Tensor,
    image: np.ndarray,
    hole: np.ndarray,
    **options: Any,
) -> np.ndarray:
    """The end of `inpaint_progressive`: (n, H, W, 3) uint8, with the image's own pixels outside the hole."""
    steps = inpaint_progressive(image_sampler, indices, labels, image, hole, **options)
    return paste(image, hole, image_sampler.decode(last_sample(steps), indices))


# ---------------------------------------------------------------- SDEdit


@torch.no_grad()
def vary_progressive(
    image_sampler: ImageSampler, indices: Sequence[int], labels: torch.Tensor, image: np.ndarray, strength: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Variations of an image: noise it up to a time and denoise it from there (SDEdit, Meng et al. 2022, algorithm 1).

    :param indices, labels: as in `inpaint_progressive`. :param image: (H, W, 3) uint8.
    :param strength: share of the steps that are run, in (0, 1]; 1 keeps next to nothing.
    :return: a generator of dicts of `sample` and `pred_xstart`, (n, C, h, w) latents.
    :raises UserError: for a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}: it must lie in (0, 1]")
    solver = _stepper(image_sampler)
    noise, options = image_sampler.start(indices, labels)
    first = max(round(strength * solver.num_steps), 1) - 1
    x = solver.add_noise(encode(image_sampler, image).expand_as(noise), first, noise)
    for i in range(first, -1, -1):
        out = solver.step(image_sampler.denoise, x, i, **options)
        x = out["sample"]
        yield out
