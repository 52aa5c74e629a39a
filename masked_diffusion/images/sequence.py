"""Image files as a sequence: names kept in arrays, not as Python strings, whatever holds the bytes.

A list of ten million paths takes gigabytes in every process that has one. `ImageSequence` is what stands in its place
for a packed folder (`shards`) and for an unpacked one that has been listed before (`index`). `ImageFiles`
gives a plain list of paths the same way of reading.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import UnionType
from typing import Any

import blobfile as bf
import numpy as np

from ..utils.errors import UserError
from ..utils.remote_files import is_remote

CHUNK = 1 << 16  # names that are Python strings at the same time


class ImageSequence(Sequence[str]):
    """The paths of images, made of memory-mapped arrays when they are asked for, and what is known of each image.

    A subclass sets the attributes, and says how a part of it is made (`_part`) and where the bytes are (`read`).

    :param records: (N,) structured: `name_end` (where a name ends among all names; it begins where the one before
        ends), `label` (-1 without a class), `width`, `height` and `rotated`.
    :param names: uint8, the names below the folder, one after the other.
    :param class_names: sorted; `label` counts them.
    :param rows: (n,) int64, which of the images are meant, in which order; None: all.
    :param prefix: what stands before each name in a path.
    """

    def __init__(
        self, records: np.ndarray, names: np.ndarray, class_names: list[str], rows: np.ndarray | None, prefix: str
    ) -> None:
        self._records, self._names, self._class_names = records, names, class_names
        self.rows, self.prefix = rows, prefix

    def _part(self, rows: np.ndarray | None, prefix: str) -> "ImageSequence":
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """The bytes of an image's file.

        :raises UserError: when they cannot be read; the message names the image.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What an error calls an image."""
        return self[index]

    # ------------------------------------------------------------ the paths

    def __len__(self) -> int:
        return len(self._records) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int | slice) -> "str | ImageSequence":
        if isinstance(index, slice):
            return self if index == slice(0, None, 1) else self.take(np.arange(*index.indices(len(self))))
        return self.prefix + self._name(self._row(index))

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            yield self[index]

    def take(self, indices: Sequence[int]) -> "ImageSequence":
        """A part of the images, by their indices here."""
        indices = np.asarray(indices, dtype=np.int64)
        return self._part(indices if self.rows is None else self.rows[indices], self.prefix)

    def relative(self) -> "ImageSequence":
        """The same with names relative to the folder."""
        return self._part(self.rows, "")

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return index if self.rows is None else int(self.rows[index])

    def _name(self, row: int) -> str:
        start = int(self._records["name_end"][row - 1]) if row else 0
        return os.fsdecode(self._names[start : int(self._records["name_end"][row])].tobytes())

    # ------------------------------------------------------------ what is known of the images

    def _column(self, name: str) -> np.ndarray:
        column = self._records[name]
        return column if self.rows is None else column[self.rows]

    def sizes(self) -> np.ndarray:
        """(N, 2) uint32: width and height of each image; 0 where they could not be read."""
        return np.stack([self._column("width"), self._column("height")], axis=1)

    def rotated(self) -> np.ndarray:
        """(N,) bool: whether an image's EXIF data ask for a rotation."""
        return self._column("rotated") != 0

    def bad(self) -> dict[int, str]:
        """Why images cannot be read, by index, ascending; those that can be read are not in it."""
        return {}

    def classes(self) -> tuple[np.ndarray, list[str]]:
        """(N,) int64 labels and the sorted class names, as `image_classes` makes them of the paths."""
        labels = self._column("label")
        present = np.flatnonzero(np.bincount(labels, minlength=len(self._class_names)))
        new_labels = np.zeros(len(self._class_names), dtype=np.int64)  # a part of the images may lack classes
        new_labels[present] = np.arange(len(present))
        return new_labels[labels], [self._class_names[label] for label in present]

    def signature(self) -> str:
        """The `data_signature` of the names relative to the folder."""
        return signature_of(self._name(self._row(index)) for index in range(len(self)))


def check_header(header: Any, version: int, types: Mapping[str, type | UnionType]) -> None:
    """Look at the JSON header of an index.

    :param types: of the values that it must have, by key.
    :raises ValueError: says what is wrong with it.
    """
    if not isinstance(header, dict):
        raise ValueError(f"it holds a {type(header).__name__} instead of a dictionary")
    if header.get("version") != version:
        raise ValueError(f"its version is {header.get('version')!r}, this program reads {version}")
    for key, kind in types.items():
        if not isinstance(header.get(key), kind):
            raise ValueError(f"its {key!r} is {header.get(key)!r}")


def signature_of(names: Iterable[str]) -> str:
    """SHA-256, in hexadecimal, of the JSON list of names; few of them are held at a time."""
    signature = StreamedSignature()
    names = iter(names)
    while chunk := list(islice(names, CHUNK)):
        signature.add(chunk)
    return signature.finish()


class StreamedSignature:
    """The SHA-256 of a JSON list of names that come in parts."""

    def __init__(self) -> None:
        self._digest, self._separator = hashlib.sha256(b"["), b""

    def add(self, names: list[str]) -> None:
        """The next names; at least one."""
        self._digest.update(self._separator + json.dumps(names)[1:-1].encode())
        self._separator = b", "

    def finish(self) -> str:
        """In hexadecimal; nothing can be added afterwards."""
        self._digest.update(b"]")
        return self._digest.hexdigest()


class ImageFiles:
    """The bytes of image files by their index, as `ImageSequence` has them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """What an error calls an image."""
        return self.paths[index]

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        :raises UserError: when it cannot be read; the message names it.
        """
        return read_image_file(self.paths[index])


def read_image_file(path: str) -> bytes:
    """The bytes of a local or remote file.

    :raises UserError: when it cannot be read; the message names it.
    """
    with image_errors(path), bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as file:
        return file.read()


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Within the block, what goes wrong with an image becomes one sentence.

    :param name: what the sentence calls the image.
    :raises UserError: instead of any error but a lack of memory.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's readers raise nearly anything
        folder = os.path.dirname(name) or "."
        if isinstance(error, FileNotFoundError) and not is_remote(name) and not os.path.isdir(folder):
            raise UserError(f"{name} cannot be read, its folder is gone: put or mount {folder} again") from error
        raise UserError(f"{name} cannot be read as an image ({error}): repair or remove it") from error
