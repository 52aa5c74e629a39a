"""Grids of images, as arrays and files."""

import numpy as np
from PIL import Image

from .checkpoint import atomic_write


def make_grid(images, columns=8, scale=1):
    """(N, H, W, 3) uint8 images row by row, each enlarged `scale` times without smoothing -> (H', W', 3) uint8."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows, columns, height, width, channels), 255, dtype=np.uint8)
    sheet.reshape(-1, height, width, channels)[:n] = images
    pixels = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def save_grid(path, images, columns=8, scale=1):
    """Write (N, H, W, 3) uint8 images as one PNG; see `make_grid`. Returns its pixels."""
    pixels = make_grid(images, columns, scale)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="png")
    return pixels
