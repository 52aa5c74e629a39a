"""What the head of an image file says, without decoding its pixels."""

from typing import BinaryIO, NamedTuple

from PIL import ExifTags, Image


class ImageHeader(NamedTuple):
    """Width and height in pixels, and whether the EXIF data ask for a rotation."""

    width: int
    height: int
    rotated: bool


def read_header(file: BinaryIO) -> ImageHeader:
    """The header of an open image file.

    :raises Exception: nearly any, as Pillow's readers do on damaged files.
    """
    with Image.open(file) as image:
        return ImageHeader(*image.size, _is_rotated(image))


def _is_rotated(image: Image.Image) -> bool:
    # In a PNG, EXIF data may follow the pixels, and Pillow would decode all of them to reach it.
    if "exif" not in image.info:
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # damaged EXIF does not make an image bad, since training does not read it
        return False
