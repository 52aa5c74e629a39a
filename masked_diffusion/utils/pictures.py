"""Grids and animations of images, as files."""

from pathlib import Path

import numpy as np
from PIL import Image

from .errors import UserError
from .files import atomic_write

FRAME_MILLISECONDS = 60
LAST_FRAME_MILLISECONDS = 1500
ANIMATED = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}}  # kinds that browsers play, and Pillow's options


def make_grid(images, columns=8, scale=1):
    """(N, H, W, 3) uint8 images row by row, each enlarged `scale` times without smoothing -> (H', W', 3) uint8."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows, columns, height, width, channels), 255, dtype=np.uint8)
    sheet.reshape(-1, height, width, channels)[:n] = images
    pixels = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def kind_of(path):
    """What Pillow calls the kind of picture that a file's ending says, or None."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    return kind if kind in Image.SAVE else None


def check_picture_name(path, animated=False):
    """Refuse a file name that a picture cannot have, before it is drawn.

    :raises UserError: for a folder that is not there, and for an ending that means no kind of picture, or none that
        can be `animated`.
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it, or choose another place for {path.name}")
    if kind_of(path) is None:
        raise UserError(f"{path.name} names no kind of picture: let it end in .png, .jpg or .gif")
    if animated and kind_of(path) not in ANIMATED:
        raise UserError(f"{path.name} cannot be animated: let it end in .gif, .png or .webp")


def save_picture(path, pixels, **options):
    """Write (H, W, 3) uint8 pixels as what the file's ending says; `options` are Pillow's."""
    kind = kind_of(path)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format=kind, **({"quality": 95} if kind == "JPEG" else {}), **options)


def save_grid(path, images, columns=8, scale=1):
    """Write (N, H, W, 3) uint8 images as one picture; see `make_grid`. Returns its pixels."""
    pixels = make_grid(images, columns, scale)
    save_picture(path, pixels)
    return pixels


def save_animation(path, frames, columns=8, scale=1):
    """Write (F, N, H, W, 3) uint8 images as an animation of F grids that holds the last one for a while.

    :param path: its ending says the kind: GIF, animated PNG or WebP.
    """
    kind = kind_of(path)
    sheets = [Image.fromarray(make_grid(images, columns, scale)) for images in frames]
    durations = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [LAST_FRAME_MILLISECONDS]
    with atomic_write(path) as file:
        options = {"save_all": True, "append_images": sheets[1:], "duration": durations, "loop": 0}
        sheets[0].save(file, format=kind, **options, **ANIMATED[kind])
