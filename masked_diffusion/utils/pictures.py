"""Image files: single pictures, grids and animations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import UserError
from .files import atomic_write

FRAME_MILLISECONDS = 60
LAST_FRAME_MILLISECONDS = 1500
ANIMATED = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}}  # formats that browsers play: options for Pillow


def make_grid(images: np.ndarray, columns: int = 8, scale: int = 1) -> np.ndarray:
    """Arrange (N, H, W, 3) uint8 images row by row in one picture.

    :param scale: each image is enlarged by this factor, without smoothing.
    :return: (ceil(N / columns) * H * scale, columns * W * scale, 3) uint8; empty places are white.
    """
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows, columns, height, width, channels), 255, dtype=np.uint8)
    sheet.reshape(-1, height, width, channels)[:n] = images
    pixels = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def kind_of(path: str | Path) -> str | None:
    """Pillow's name of the picture format that a file name's extension stands for, or None."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    return kind if kind in Image.SAVE else None


def check_picture_name(path: str | Path, animated: bool = False) -> None:
    """Refuse a file name that a picture cannot be saved under, before the work of sampling starts.

    :raises UserError: when the folder does not exist, and when the extension does not stand for a picture format, or
        not for one that can be `animated`.
    """
    path = Path(path).absolute()
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder: create it, or choose another folder for {path.name}")
    if kind_of(path) is None:
        raise UserError(f"{path.name} has no extension of a picture format: use .png, .jpg or .gif")
    if animated and kind_of(path) not in ANIMATED:
        raise UserError(f"{path.name} cannot be animated: use the extension .gif, .png or .webp")


def save_picture(path: str | Path, pixels: np.ndarray, **options: Any) -> None:
    """Write (H, W, 3) uint8 pixels in the format of the file's extension; `options` are for Pillow."""
    kind = kind_of(path)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format=kind, **({"quality": 95} if kind == "JPEG" else {}), **options)


def save_grid(path: str | Path, images: np.ndarray, columns: int = 8, scale: int = 1) -> np.ndarray:
    """Write (N, H, W, 3) uint8 images as one picture; see `make_grid`. Returns its pixels."""
    pixels = make_grid(images, columns, scale)
    save_picture(path, pixels)
    return pixels


def save_animation(path: str | Path, frames: Sequence[np.ndarray], columns: int = 8, scale: int = 1) -> None:
    """Write F grids of (N, H, W, 3) uint8 images as an animation, which shows the last grid longer than the others.

    :param path: with an extension of GIF, animated PNG or WebP.
    :param frames: (F, N, H, W, 3) uint8.
    """
    kind = kind_of(path)
    sheets = [Image.fromarray(make_grid(images, columns, scale)) for images in frames]
    durations = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [LAST_FRAME_MILLISECONDS]
    with atomic_write(path) as file:
        options = {"save_all": True, "append_images": sheets[1:], "duration": durations, "loop": 0}
        sheets[0].save(file, format=kind, **options, **ANIMATED[kind])
