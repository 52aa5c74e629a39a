"""Drawing from a given image: filling a hole (RePaint) and variations (SDEdit), in the first stage's latents."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..image_datasets import center_crop_arr, read_image
from ..utils.errors import UserError
from .image_sampler import ImageSampler, last_sample
from .solvers import DiffusionSolver


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
    mean, _ = image_sampler.first_stage.moments(pixels)
    return image_sampler.first_stage.sample(mean, torch.zeros_like(mean))


def _stepper(image_sampler):
    """The image sampler's one-step function and diffusion.

    :raises UserError: for a solver that takes no single steps.
    """
    if not isinstance(image_sampler.solver, DiffusionSolver):
        raise UserError(f"solver {image_sampler.solver.name} cannot start from an image: choose ddpm or ddim")
    return image_sampler.solver.step, image_sampler.solver.diffusion


# ---------------------------------------------------------------- RePaint


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


@torch.no_grad()
def inpaint_progressive(
    image_sampler: ImageSampler,
    indices: Sequence[int],
    labels: torch.Tensor,
    image: np.ndarray,
    hole: np.ndarray,
    jump_length: int = 10,
    resamplings: int = 10,
) -> Iterator[dict[str, torch.Tensor]]:
    """Fill a hole (RePaint, Lugmayr et al. 2022, algorithm 1), step by step.

    :param indices: (n,) that the noise is a function of. :param labels: (n,) int64 classes to fill with.
    :param image: (H, W, 3) uint8, or (n, H, W, 3), one each.
    :param hole: (H, W) bool, True = to fill; what the image has there is not looked at.
    :param jump_length, resamplings: see `resampling_times`; more of either joins hole and surroundings better.
    :return: a generator of dicts of `sample` and `pred_xstart`, (n, C, h, w) latents. See `paste` for the end.
    """
    step, diffusion = _stepper(image_sampler)
    x_start = encode(image_sampler, np.where(hole[:, :, None], np.uint8(128), image)).expand(len(indices), -1, -1, -1)
    hole = torch.from_numpy(hole).to(image_sampler.device)[None, None].float()
    hole = F.max_pool2d(
        hole, image_sampler.first_stage.downsample
    )  # a latent is unknown as soon as one of its pixels is
    x, options = image_sampler.start(indices, labels)
    times = resampling_times(diffusion.num_timesteps, jump_length, resamplings)
    for time, following in itertools.pairwise(times):
        if following > time:  # one step of the forward process: eq. 1 of DDPM
            beta = float(diffusion.betas[time])
            x = (1 - beta) ** 0.5 * x + beta**0.5 * options["randn_like"](x)
            continue
        out = step(image_sampler.denoise, x, time - 1, **options)
        known = x_start
        if following > 0:
            t = torch.full((len(x),), following - 1, device=x.device)
            known = diffusion.q_sample(x_start, t, options["randn_like"](x))
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
    **options: int,
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
    step, diffusion = _stepper(image_sampler)
    noise, options = image_sampler.start(indices, labels)
    first = max(round(strength * diffusion.num_timesteps), 1) - 1
    t = torch.full((len(noise),), first, device=noise.device)
    x = diffusion.q_sample(encode(image_sampler, image).expand_as(noise), t, noise)
    for i in range(first, -1, -1):
        out = step(image_sampler.denoise, x, i, **options)
        x = out["sample"]
        yield out
