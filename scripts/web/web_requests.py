"""The web page without its widgets: what a browser asks for is checked, then drawn step by step."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from masked_diffusion.image_datasets import center_crop_arr
from masked_diffusion.sample_config import SOLVERS_OF, SampleConfig
from masked_diffusion.sampling import editing
from masked_diffusion.sampling.build import LoadedWeights, make_image_sampler
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.pictures import make_grid

PREVIEWS = 12  # at most, of images as they form
VIEW = 512  # pixels of a sheet or an image on the screen; smaller ones are enlarged to about this
GAP = 4  # pixels between the images of a sheet on the screen
JUMP_LENGTH = 10
LARGEST_SEED, LARGEST_SCALE, LARGEST_POWER, MOST_RESAMPLINGS = 2**31 - 1, 20, 10, 10
LONGEST_SIDE, LONGEST_RATIO = 4096, 4  # of an uploaded image
MOST_PIXELS = 2 * LONGEST_SIDE**2  # of an uploaded image and its paint
PAINTED = 64  # of 255: how much of a pixel's area must be painted over for it to be filled


# ---------------------------------------------------------------- checks


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    :param images: images at a time. :param steps: sampling steps. :param solvers: those that the model can have.
    """

    images: int = 16
    steps: int = 250
    solvers: tuple[str, ...] = SOLVERS_OF["diffusion"]


@dataclass(frozen=True)
class Request:
    """One job. Image i of it is the image i of `scripts/image_sample.py` with these flags and this class."""

    label: int
    count: int
    seed: int
    solver: str
    steps: int
    cfg_scale: float
    scale_pow: float


def whole_number(name: str, value: Any, first: int, last: int) -> int:
    """An int in [first, last]; browsers send 3 and 3.0 alike.

    :raises UserError: for anything else.
    """
    if type(value) not in (int, float) or value != value // 1 or not first <= value <= last:
        raise UserError(f"{name} is {shorten(value)}: it must be a whole number from {first} to {last}")
    return int(value)


def number(name: str, value: Any, first: float, last: float) -> float:
    """A float in [first, last].

    :raises UserError: for anything else.
    """
    if type(value) not in (int, float) or not first <= value <= last:
        raise UserError(f"{name} is {shorten(value)}: it must be a number from {first} to {last}")
    return float(value)


def shorten(value: Any) -> str:
    """A value for a message, which a browser may have made long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def check_request(
    limits: Limits,
    num_classes: int,
    label: Any,
    count: Any,
    seed: Any,
    solver: Any,
    steps: Any,
    cfg_scale: Any,
    scale_pow: Any,
) -> Request:
    """A `Request` of values as they came, of any type.

    :raises UserError: for the first value that is of another type or out of its range.
    """
    if not isinstance(solver, str) or solver not in limits.solvers:
        raise UserError(f"solver is {shorten(solver)}: choose one of {', '.join(limits.solvers)}")
    return Request(
        whole_number("class", label, 0, max(num_classes, 1) - 1),
        whole_number("images", count, 1, limits.images),
        whole_number("seed", seed, 0, LARGEST_SEED),
        solver,
        whole_number("steps", steps, 1, limits.steps),
        number("scale", cfg_scale, 0, LARGEST_SCALE),
        number("power", scale_pow, 0, LARGEST_POWER),
    )


def check_painting(painting: dict[str, Any] | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and the part of it that was painted over, both cropped as training crops.

    :param painting: None, or a dict of `background`, an (H, W, 3 or 4) uint8 array or None, and `layers`, a list of
        (H, W, 4) uint8 arrays whose alpha is the paint.
    :return: (size, size, 3) uint8 and (size, size) bool, True = painted over.
    :raises UserError: when image or paint are missing, and for an image that is too large or too long.
    """
    background = (painting or {}).get("background")
    if background is None or (background.shape[2] == 4 and not background[:, :, 3].any()):
        raise UserError("there is no image: upload one, or draw some and click one of them")
    height, width = background.shape[:2]
    if max(height, width) > LONGEST_SIDE or max(height, width) > LONGEST_RATIO * min(height, width):
        raise UserError(
            f"the image has {width} x {height} pixels: at most {LONGEST_SIDE} a side are taken, "
            f"and one side at most {LONGEST_RATIO} times the other"
        )
    paint = np.zeros((height, width), dtype=np.uint8)
    for layer in painting["layers"]:
        if layer.shape != (height, width, 4):
            raise UserError(f"the paint is {layer.shape}: it must be ({height}, {width}, 4), as the image")
        paint = np.maximum(paint, layer[:, :, 3])
    hole = center_crop_arr(Image.fromarray(paint).convert("RGB"), size)[:, :, 0] >= PAINTED
    if not hole.any():
        raise UserError("nothing is painted: paint over what is to be drawn anew, not too thinly")
    return center_crop_arr(Image.fromarray(background).convert("RGB"), size), hole


# ---------------------------------------------------------------- drawing


class Progress(NamedTuple):
    done: int  # steps
    total: int
    images: np.ndarray  # (n, H, W, 3) uint8: the prediction, and at the end the result


def image_sampler_of(config: SampleConfig, weights: LoadedWeights, request: Request) -> ImageSampler:
    """The image sampler of a request.

    :param config: a `SampleConfig`, of which the request's values replace some. :param weights: from `load_weights`.
    """
    asked = {"solver": request.solver, "use_ddim": False, "num_sampling_steps": str(request.steps)}
    asked |= {"seed": request.seed, "cfg_scale": request.cfg_scale, "scale_pow": request.scale_pow}
    return make_image_sampler(config.replaced(**asked), weights)


def go_on() -> None:
    """What a job that nobody stops calls before every step."""


def draw(
    config: SampleConfig, weights: LoadedWeights, request: Request, check: Callable[[], None] = go_on
) -> Iterator[Progress]:
    """Draw images, step by step: a generator of `Progress`.

    :param check: called before every step; what it raises ends the job.
    """
    image_sampler = image_sampler_of(config, weights, request)
    steps = image_sampler.progressive(range(request.count), labels_of(request))
    yield from watch(steps, image_sampler.solver.num_outputs, image_sampler.decode, check)


def fill(
    config: SampleConfig,
    weights: LoadedWeights,
    request: Request,
    image: np.ndarray,
    hole: np.ndarray,
    resamplings: Any,
    check: Callable[[], None] = go_on,
) -> Iterator[Progress]:
    """Fill the hole of an image `request.count` times, step by step: a generator of `Progress`.

    :param image, hole: from `check_painting`. :param resamplings: as it came, see `editing.inpaint_progressive`.
    :param check: see `draw`.
    :raises UserError: for resamplings out of range, and for a solver that cannot start from an image.
    """
    resamplings = whole_number("resamplings", resamplings, 1, MOST_RESAMPLINGS)
    image_sampler = image_sampler_of(config, weights, request)
    options = {"jump_length": JUMP_LENGTH, "resamplings": resamplings}
    total = editing.count_evaluations(image_sampler.solver.num_steps, **options)
    indices = range(request.count)
    steps = editing.inpaint_progressive(image_sampler, indices, labels_of(request), image, hole, **options)
    yield from watch(steps, total, lambda latents: editing.paste(image, hole, image_sampler.decode(latents)), check)


def labels_of(request: Request) -> torch.Tensor:
    return torch.full((request.count,), request.label)


def watch(
    steps: Iterable[dict[str, torch.Tensor]],
    total: int,
    finish: Callable[[torch.Tensor], np.ndarray],
    check: Callable[[], None] = go_on,
) -> Iterator[Progress]:
    """`Progress` every few steps: predictions on the way, the sample at the end.

    :param steps: dicts of `sample` and `pred_xstart`. :param total: how many. :param finish: makes images of latents.
    :param check: see `draw`.
    """
    every = math.ceil(total / PREVIEWS)
    check()
    for done, out in enumerate(steps, 1):
        check()
        if done % every == 0 and done < total:
            yield Progress(done, total, finish(out["pred_xstart"]))
    yield Progress(total, total, finish(out["sample"]))


# ---------------------------------------------------------------- pictures


def columns_of(num_images: int) -> int:
    """Columns of the squarest sheet."""
    return math.ceil(math.sqrt(num_images))


def view_of(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (H', W', 3) uint8: their sheet for the screen, with gaps, enlarged without smoothing."""
    columns = columns_of(len(images))
    scale = max(1, VIEW // (columns * images.shape[2]))
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    border = (GAP // 2, GAP // 2)
    return make_grid(np.pad(enlarged, ((0, 0), border, border, (0, 0)), constant_values=255), columns)


def clicked(images: np.ndarray | None, place: Any) -> np.ndarray:
    """The image of a sheet that a click meant.

    :param images: (N, H, W, 3) uint8, as `view_of` shows them, or None. :param place: x and y in that view, as they
        came.
    :return: (H, W, 3) uint8.
    :raises UserError: where no image is.
    """
    if images is None:
        raise UserError("there are no images yet: draw some")
    height, width = view_of(images).shape[:2]
    if not isinstance(place, list | tuple) or len(place) != 2:
        raise UserError(f"the click is {shorten(place)}: it must be x and y")
    x, y = (number("the click", value, 0, limit) for value, limit in zip(place, (width, height), strict=True))
    columns = columns_of(len(images))
    side = width // columns
    index = min(int(y) // side, -(-len(images) // columns) - 1) * columns + min(int(x) // side, columns - 1)
    if index >= len(images):
        raise UserError("there is no image at this place: click one")
    return images[index]
