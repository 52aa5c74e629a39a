"""Write a split of CIFAR-10 as images: OUT holds `CLASS_SPLIT-ImgID.ext` and classes.json.

SOURCE is cifar-10-python.tar.gz, whose pixels become PNG, or a folder or tar of images in class folders, which keep
their bytes. Of a source with train/ and test/ only the asked split is taken.
"""

import pickle
from functools import partial
from typing import BinaryIO

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
    parser.add_argument("--split", choices=tuple(BATCHES), default="train", help="which images to write")
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
    """The images below `[SPLIT/]CLASS/`, wherever in the source such folders are."""
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
    """Stands in for a numpy array, and for its dtype: holds what the pickle says of it, and does nothing."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class BatchUnpickler(pickle.Unpickler):
    """Reads the dicts, lists, numbers, strings and arrays of a CIFAR batch. A pickle that names more is refused."""

    ADMITTED = (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"))

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch does")
        return PickledArray


def read_batch(file: File, name: str) -> tuple[np.ndarray, list[str]]:
    """The (N, 32, 32, 3) uint8 pixels and N labels of a batch, read without running code of the pickle's."""
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
        raise UserError(f"{name} cannot be read as a CIFAR-10 batch ({error}): fetch the archive again") from error
    if len(pixels) != len(labels):
        raise UserError(f"{name} holds {len(pixels)} images and {len(labels)} labels: fetch the archive again")
    return pixels, labels


def pickled_images(batches: dict[str, File], split: str, source: str) -> list[File]:
    """The images of a split, numbered in the order of its batches."""
    images = []
    for name in BATCHES[split]:
        if name not in batches:
            raise UserError(f"{source} lacks {name}: fetch the archive again")
        for pixels, label in zip(*read_batch(batches[name], f"{source}: {name}"), strict=True):
            image_id = f"{label}_{split}-{len(images):05d}.png"
            images.append(File(image_id, partial(png, pixels)))
    return images


def png(pixels: np.ndarray) -> BinaryIO:
    """(H, W, 3) uint8 pixels as an open file of PNG."""
    return encode_png(Image.fromarray(pixels))


if __name__ == "__main__":
    run(main)
