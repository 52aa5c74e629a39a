"""Write a split of CIFAR-10 as images: OUT holds `CLASS_SPLIT-ImgID.ext` and classes.json.

SOURCE is cifar-10-python.tar.gz, whose pixels are written as PNG, or a folder or tar of images in class folders, which
are copied unchanged. If SOURCE has train/ and test/, only the images of --split are written.
"""

import pickle
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from common import (
    File,
    UserError,
    encode_png,
    images_by_class,
    is_image,
    make_parser,
    name_images,
    open_source,
    progress,
    run,
    write_images,
)
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--split", choices=tuple(BATCHES), default="train", help="which images to write (default: train)"
    )
    args = parser.parse_args()
    with open_source(args.source, args.out) as (files, _):
        batches = {file.name.rsplit("/", 1)[-1]: file for file in files}
        if batches.keys() & {name for names in BATCHES.values() for name in names}:
            images = pickled_images(batches, args.split, args.source)
        else:
            images = folder_images(files, args.split, args.source)
        write_images(args.out, {name: name for name in CLASSES}, progress(images), args.link == "True")


# ---------------------------------------------------------------- folders of images


def folder_images(files: list[File], split: str, source: str) -> list[File]:
    """The images in folders `[SPLIT/]CLASS/`, which may be anywhere in the source."""
    images = []
    for file in files:
        *above, folder, name = ["", ".", *file.name.split("/")]
        if is_image(name) and (above[-1] == split or above[-1] not in BATCHES):
            images.append(file._replace(name=f"{folder}/{split}-{name}"))
    classes = images_by_class(images, (), f"the {split} split of {source}")
    differing = sorted(classes.keys() ^ set(CLASSES))
    if differing:
        raise UserError(
            f"{source} and CIFAR-10 differ in class {differing[0]!r}: for other data use datasets/class_folders.py"
        )
    return [image for name in classes for image in name_images(name, classes[name], source)]


# ---------------------------------------------------------------- the python archive


class PickledArray:
    """Replaces a numpy array or dtype while unpickling: it stores its arguments and state, and runs no code."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class BatchUnpickler(pickle.Unpickler):
    """Reads the dicts, lists, numbers, strings and arrays of a CIFAR batch, and refuses a pickle of anything else."""

    ADMITTED = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module: str, name: str) -> type[PickledArray]:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch does")
        return PickledArray


def read_batch(file: File, name: str) -> tuple[np.ndarray, list[str]]:
    """The (N, 32, 32, 3) uint8 pixels and N class names of a batch, read without running code of the pickle.

    :raises UserError: for a file that is not such a batch.
    """
    try:
        with file.open() as opened:
            batch = BatchUnpickler(opened, encoding="bytes").load()
        _, shape, dtype, fortran_order, data = batch[b"data"].state
        if dtype.args[0] != b"u1":
            raise TypeError(f"its pixels are {dtype.args[0]}, not bytes")
        pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran_order else "C")
        pixels = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [CLASSES[label] for label in batch[b"labels"]]
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{name} cannot be read as a CIFAR-10 batch ({error}): download the archive again") from error
    if len(pixels) != len(labels):
        raise UserError(f"{name} holds {len(pixels)} images and {len(labels)} labels: download the archive again")
    return pixels, labels


def pickled_images(batches: dict[str, File], split: str, source: str) -> list[File]:
    """The images of a split, numbered in the order of its batches."""
    images = []
    for name in BATCHES[split]:
        if name not in batches:
            raise UserError(f"{source} lacks {name}: download the archive again")
        for pixels, label in zip(*read_batch(batches[name], f"{source}: {name}"), strict=True):
            image_id = f"{label}_{split}-{len(images):05d}.png"
            images.append(File(image_id, partial(png, pixels)))
    return images


def png(pixels: np.ndarray) -> BinaryIO:
    """Encode (H, W, 3) uint8 pixels as PNG, as an open file."""
    return encode_png(Image.fromarray(pixels))


if __name__ == "__main__":
    run(main)
