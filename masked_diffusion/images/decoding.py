"""From the bytes of an image file to a square crop, as ADM makes it: decode, halve, resize, cut."""

import io
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from .sequence import image_errors, read_image_file

Box = tuple[float, float, float, float]  # left, upper, right, lower
SEPARABLE = ("L", "RGB")  # modes whose rows and columns may be resized in two calls, with the same bytes as in one


def read_image(path: str) -> Image.Image:
    """Read and decode an image as RGB. As in ADM, an EXIF rotation is not applied.

    :raises UserError: for a file that does not exist, is not an image, is truncated or is a decompression bomb; the
        message names it.
    """
    return decode_image(read_image_file(path), path)


def decode_image(data: bytes, name: str) -> Image.Image:
    """`read_image` of a file's bytes.

    :param name: what an error calls it.
    """
    with image_errors(name), Image.open(io.BytesIO(data)) as image:
        return _to_rgb(image)


def decode_reduced(data: bytes, name: str, short_side: int) -> tuple[Image.Image, Box | None]:
    """`decode_image`, but a JPEG that a crop would halve first is decoded at a half, a quarter or an eighth at once.

    :param short_side: the largest one that the image may be resized to.
    :return: the image, and the part of it that the file's pixels fill, for the crops: with odd sizes, the last row and
        column are filled in part. None: the file is decoded as `decode_image` does, because it is small or no JPEG.
    """
    with image_errors(name), Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        scale = next((s for s in (8, 4, 2) if min(width, height) // s >= short_side), 1)
        # Pillow takes the largest scale that leaves this size or more.
        drafted = image.draft("RGB", (width // scale, height // scale)) if scale > 1 else None
        return _to_rgb(image), drafted[1] if drafted else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips values at 255, so that nearly all pixels become white. Take the
        # high byte instead, as Pillow does for 16-bit colour.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def center_crop_arr(pil_image: Image.Image, image_size: int, box: Box | None = None) -> np.ndarray:
    """The centre crop of ADM: (image_size, image_size, 3) uint8.

    :param box: of `decode_reduced`.
    """

    def centre(width: int, height: int) -> tuple[int, int]:
        return (width - image_size) // 2, (height - image_size) // 2

    return _crop(pil_image, image_size, image_size, centre, box)


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: random.Random = random,
    box: Box | None = None,
) -> np.ndarray:
    """The random crop of ADM: (image_size, image_size, 3) uint8.

    :param min_crop_frac, max_crop_frac: smallest and largest size of the crop, as a fraction of the short side.
    :param rng: its `randrange` draws the resized short side, then the row, then the column.
    :param box: of `decode_reduced`.
    """
    smallest, largest = math.ceil(image_size / max_crop_frac), largest_short_side(image_size, min_crop_frac)

    def anywhere(width: int, height: int) -> tuple[int, int]:
        top = rng.randrange(height - image_size + 1)
        return rng.randrange(width - image_size + 1), top

    return _crop(pil_image, image_size, rng.randrange(smallest, largest + 1), anywhere, box)


def largest_short_side(image_size: int, min_crop_frac: float = 0.8) -> int:
    """The largest short side to which `random_crop_arr` resizes an image."""
    return math.ceil(image_size / min_crop_frac)


def _crop(
    image: Image.Image, size: int, short_side: int, place: Callable[[int, int], tuple[int, int]], box: Box | None
) -> np.ndarray:
    """Resize an image to a short side, and cut a square of `size` pixels out of it.

    :param place: a function of the resized width and height that returns left and top of the square.
    """
    width, height = image.size if box is None else (int(box[2]), int(box[3]))
    # Halve with a box filter first: bicubic alone would cause aliasing when the reduction is large.
    while min(width, height) >= 2 * short_side:
        width, height = width // 2, height // 2
        image, box = _halve(image, (width, height), box), None
    scale = short_side / min(width, height)
    width, height = round(width * scale), round(height * scale)
    left, top = place(width, height)
    if image.mode in SEPARABLE:
        # Pillow resizes first along the rows, then along the columns: cut the columns of the square in between.
        columns, rows = image.size
        right, lower = (columns, rows) if box is None else box[2:]
        image = image.resize((width, rows), Image.BICUBIC, (0, 0, right, rows)).crop((left, 0, left + size, rows))
        width, left, box = size, 0, (0, 0, size, lower)
    image = image.resize((width, height), Image.BICUBIC, box)
    return np.array(image.crop((left, top, left + size, top + size)))


def _halve(image: Image.Image, size: tuple[int, int], box: Box | None) -> Image.Image:
    """`resize` with a box filter. `reduce` gives the same bytes sooner where a side is even."""
    if box is not None or image.mode not in SEPARABLE:
        return image.resize(size, Image.BOX, box)
    columns, rows = image.size
    image = image.resize((size[0], rows), Image.BOX) if columns % 2 else image.reduce((2, 1))
    return image.resize(size, Image.BOX) if rows % 2 else image.reduce((1, 2))
