"""Write a category of LSUN as images: OUT holds `Category_ImgID.ext` and classes.json.

SOURCE is the folder of an lmdb, such as bedroom_train_lmdb. JPEG, PNG and GIF images are copied unchanged; other
formats, such as LSUN's WebP, are written as PNG with the same pixels. Several categories can go to the same OUT.
"""

import argparse
import io
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from common import File, UserError, class_ids, encode_png, make_parser, progress, run, write_images
from PIL import Image

SIGNATURES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif"}


def main() -> None:
    parser = make_parser(__doc__, link=False)
    parser.add_argument("--category", required=True, help="the class of these images: bedroom, church_outdoor, ...")
    parser.add_argument("--max_images", type=int, help="write only this many images, the first ones (default: all)")
    args = parser.parse_args()
    class_id = args.category.replace("_", "-")
    if class_ids([class_id])[class_id] != class_id:
        raise UserError(
            f"--category is {args.category!r}: it must be a name of letters, digits and hyphens, such as bedroom"
        )
    if args.max_images is not None and args.max_images < 1:
        raise UserError(f"--max_images is {args.max_images}: it must be at least 1; leave it out to write all images")
    lmdb = import_lmdb()
    if not Path(args.source).exists():
        raise UserError(f"{args.source} does not exist: name the folder of an lmdb")
    try:
        # Without a lock, a source without write permission can be read too.
        with lmdb.open(args.source, subdir=Path(args.source).is_dir(), readonly=True, lock=False) as env:
            write_category(env, class_id, args)
    except lmdb.Error as error:
        raise UserError(f"{args.source} cannot be read as an lmdb ({error}): name the folder of data.mdb") from error


def import_lmdb() -> ModuleType:
    """Import the package lmdb.

    :raises UserError: when it is not installed.
    """
    try:
        import lmdb
    except ImportError as error:
        raise UserError("reading LSUN needs the package lmdb, which is not installed: pip install lmdb") from error
    return lmdb


def write_category(env: Any, class_id: str, args: argparse.Namespace) -> None:
    """Write the images of an open lmdb, in the order of their keys."""
    total = min(env.stat()["entries"], args.max_images or env.stat()["entries"])
    if not total:
        raise UserError(f"{args.source} holds no image: download it again")
    with env.begin(buffers=True) as transaction:
        records = islice(transaction.cursor(), total)
        images = (image_file(class_id, i, *record, args.source) for i, record in enumerate(records))
        write_images(args.out, {class_id: args.category}, progress(images, total=total))


def image_file(class_id: str, index: int, key: memoryview, value: memoryview, source: str) -> File:
    """A record of the lmdb as a file: its bytes, or a PNG of its pixels if training does not read its format."""
    for signature, extension in SIGNATURES.items():
        if value[: len(signature)] == signature:
            return File(f"{class_id}_{index:07d}.{extension}", partial(io.BytesIO, value), size=len(value))
    return File(f"{class_id}_{index:07d}.png", partial(decoded_png, value, f"{source}: {bytes(key)!r}"))


def decoded_png(value: memoryview, name: str) -> BinaryIO:
    """Convert an encoded image to PNG, as an open file.

    :raises UserError: when it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(value)) as image:
            return encode_png(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        raise UserError(f"{name} cannot be read as an image ({error}): download the data again") from error


if __name__ == "__main__":
    run(main)
