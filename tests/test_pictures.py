"""Grids and animations as files."""

import numpy as np
import pytest
from PIL import Image

from masked_diffusion.utils.pictures import check_picture_name, save_animation, save_grid

IMAGES = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((1, 2, 2, 3), 40, dtype=np.uint8)


def test_a_grid_is_filled_row_by_row(tmp_path):
    save_grid(tmp_path / "grid.png", IMAGES, columns=3, scale=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (8, 12, 3)
    assert pixels[::4, ::4, 0].tolist() == [[0, 40, 80], [120, 160, 255]]


def test_the_ending_names_the_format(tmp_path):
    for name, kind in (("grid.png", "PNG"), ("grid.jpg", "JPEG"), ("GRID.WEBP", "WEBP")):
        save_grid(tmp_path / name, IMAGES)
        assert Image.open(tmp_path / name).format == kind
    for name, message in (
        ("grid.txt", "has no extension of a picture format"),
        ("absent/grid.png", "absent is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            check_picture_name(tmp_path / name)


def test_an_animation_shows_its_frames_in_order(tmp_path):
    save_animation(tmp_path / "way.gif", np.stack([IMAGES, 255 - IMAGES, IMAGES // 2]), columns=5)
    with Image.open(tmp_path / "way.gif") as animation:
        assert animation.n_frames == 3
        for frame, expected in enumerate((160, 95, 80)):
            animation.seek(frame)
            assert abs(np.asarray(animation.convert("RGB")).astype(int)[0, 9, 0] - expected) <= 2
