"""Crops and pixels byte for byte; decoding at a fraction of the size."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO
from PIL import Image
from sklearn.datasets import load_sample_images

from masked_diffusion.image_datasets import ImageDataset
from masked_diffusion.images import decoding
from masked_diffusion.images.decoding import (
    center_crop_arr,
    decode_image,
    decode_reduced,
    largest_short_side,
    random_crop_arr,
    read_image,
)
from masked_diffusion.utils.errors import UserError

PHOTOS = REPO.parent / "shared" / "data" / "imagenet_sample_120.tar"


# ---------------------------------------------------------------- crops


@pytest.fixture(scope="module")
def photos():
    if not PHOTOS.exists():
        pytest.skip(f"{PHOTOS.name} is not here")
    with tarfile.open(PHOTOS) as tar:
        return {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}


def test_crops_of_photos_are_byte_equal(photos, golden):
    vectors = golden("loader")
    for key in vectors.files:
        kind, size, name = key.split("/")
        image = Image.open(io.BytesIO(photos[name])).convert("RGB")
        if kind == "center":
            pixels = center_crop_arr(image, int(size))
            pixels = pixels[::8, ::8] if size == "256" else pixels
        else:
            random.seed(5)
            pixels = random_crop_arr(image, int(size))
        np.testing.assert_array_equal(pixels, vectors[key], err_msg=key)


@pytest.mark.parametrize("shape", [(64, 64), (65, 200), (31, 30), (500, 129)])
def test_crops_have_the_asked_size(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    assert center_crop_arr(image, 32).shape == (32, 32, 3)
    for seed in range(20):
        assert random_crop_arr(image, 32, rng=random.Random(seed)).shape == (32, 32, 3)


def test_center_crop_of_an_image_of_the_right_size_is_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop_arr(Image.fromarray(pixels), 16), pixels)


def plain_crop(image, size, short_side, place):
    """ADM's crop in as many words: the whole image is resized in one call, and cut last."""
    while min(*image.size) >= 2 * short_side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = short_side / min(*image.size)
    pixels = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
    top, left = place(*pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "F"])
def test_crops_are_those_of_whole_images_resized_in_one_call(mode):
    rng = np.random.default_rng(0)
    for seed in range(60):
        size, (width, height) = int(rng.integers(1, 24)), rng.integers(1, 100, 2)
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)
        expected = plain_crop(image, size, size, lambda h, w, size=size: ((h - size) // 2, (w - size) // 2))
        np.testing.assert_array_equal(center_crop_arr(image, size), expected)
        draws = random.Random(seed)
        short_side = draws.randrange(size, largest_short_side(size) + 1)
        draw = lambda h, w, size=size, d=draws: (d.randrange(h - size + 1), d.randrange(w - size + 1))  # noqa: E731
        ours = random_crop_arr(image, size, rng=random.Random(seed))
        np.testing.assert_array_equal(ours, plain_crop(image, size, short_side, draw))


# ---------------------------------------------------------------- kinds of pixels


def test_16_bit_grey_stays_a_ramp(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = np.asarray(read_image(str(tmp_path / "ramp.png")))
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I;16B", "I"])
def test_16_bit_grey_in_pillows_other_modes(mode):
    values = np.array([[0, 255, 256, 40000, 65535]])
    image = Image.frombytes(mode, (5, 1), values.astype({"I;16B": ">u2", "I": np.int32}[mode]).tobytes())
    assert np.asarray(decoding._to_rgb(image))[0, :, 1].tolist() == [0, 0, 1, 156, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_pixels_are_converted_as_in_adm(tmp_path, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
        np.testing.assert_array_equal(read_image(str(path)), saved.convert("RGB"))


# ---------------------------------------------------------------- decoding at a fraction of the size


def jpeg(size, mode="RGB", **options):
    """A photo of a given size, as a JPEG."""
    file = io.BytesIO()
    photo = Image.fromarray(load_sample_images().images[0]).resize(size, Image.BICUBIC).convert(mode)
    photo.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def psnr(ours, theirs):
    return 10 * np.log10(255**2 / np.square(ours.astype(float) - theirs).mean())


@pytest.mark.parametrize(
    "size, scale",
    [((255, 300), 1), ((256, 300), 2), ((383, 511), 2), ((511, 600), 2), ((512, 600), 4), ((1023, 1024), 4),
     ((1025, 1100), 8), ((2200, 2049), 8)],
)  # fmt: skip
def test_the_decoder_halves_as_often_as_the_crop_would_and_never_more(size, scale):
    image, box = decode_reduced(jpeg(size), "a.jpg", 128)
    assert image.size == tuple(-(-x // scale) for x in size)
    assert box == (None if scale == 1 else (0, 0, size[0] / scale, size[1] / scale))
    full = decode_image(jpeg(size), "a.jpg")
    ours, theirs = center_crop_arr(image, 128, box), center_crop_arr(full, 128)
    assert ours.shape == theirs.shape == (128, 128, 3)
    if scale == 1:
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert 30 < psnr(ours, theirs) < 60 and np.abs(ours.astype(int) - theirs).mean() < 5
    for seed in range(5):  # a random crop may halve once more than the decoder was allowed to
        image, box = decode_reduced(jpeg(size), "a.jpg", largest_short_side(100))
        ours = random_crop_arr(image, 100, rng=random.Random(seed), box=box)
        theirs = random_crop_arr(full, 100, rng=random.Random(seed))
        assert ours.shape == theirs.shape and psnr(ours, theirs) > 28


def test_a_row_that_is_filled_in_part_moves_nothing():
    data = jpeg((401, 301))
    image, box = decode_reduced(data, "a.jpg", 150)
    exact = center_crop_arr(decode_image(data, "a.jpg"), 150)
    assert image.size == (201, 151) and box == (0, 0, 200.5, 150.5)
    assert psnr(center_crop_arr(image, 150, box), exact) > psnr(center_crop_arr(image, 150), exact) + 2


@pytest.mark.parametrize("options", [{"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}])
def test_all_kinds_of_jpegs_are_reduced(options):
    data = jpeg((300, 260), **options)
    image, box = decode_reduced(data, "a.jpg", 128)
    assert image.mode == "RGB" and image.size == (150, 130) and box == (0, 0, 150, 130)
    assert psnr(center_crop_arr(image, 128, box), center_crop_arr(decode_image(data, "a.jpg"), 128)) > 30


def test_what_is_no_jpeg_is_decoded_as_ever():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(file, "PNG")
    image, box = decode_reduced(file.getvalue(), "a.png", 32)
    assert box is None and image.tobytes() == decode_image(file.getvalue(), "a.png").tobytes()
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image \(.*truncated.*\): repair or remove it"):
        decode_reduced(jpeg((300, 300))[:2000], "a.jpg", 64)


@pytest.mark.parametrize("random_crop", [False, True])
def test_items_of_fast_decoding_are_close_repeat_and_keep_crop_and_flip(tmp_path, random_crop):
    paths = [str(tmp_path / f"a_{i}.jpg") for i in range(4)]
    for path, size in zip(paths, [(81, 90), (131, 99), (260, 300), (45, 40)], strict=True):
        Path(path).write_bytes(jpeg(size))
    exact, fast, again = (
        ImageDataset(32, paths, random_crop=random_crop, seed=1, fast_decode=fast) for fast in (False, True, True)
    )
    for key in ((index, epoch) for index in range(4) for epoch in range(4)):
        ours, theirs = fast[key][0], exact[key][0]
        np.testing.assert_array_equal(ours, again[key][0])
        assert ours.shape == (3, 32, 32) and ours.dtype == np.float32
        # Mirrored or cut elsewhere, a photo differs by far more.
        assert np.abs(ours - theirs).mean() < (0.06 if key[0] < 3 else 1e-9)
        assert np.array_equal(ours, theirs) == (key[0] == 3)


def test_photos_are_close(photos):
    """What the flag's help says, on real photos."""
    halved, found = 0, []
    for name, data in photos.items():
        image, box = decode_reduced(data, name, 128)
        if box is not None:
            exact = center_crop_arr(decode_image(data, name), 128)
            ours = center_crop_arr(image, 128, box)
            halved += 1
            found.append((np.abs(exact.astype(int) - ours).mean(), psnr(ours, exact)))
    mean, quality = np.mean(found, axis=0)
    assert halved == 103 and mean < 2 and quality > 40
