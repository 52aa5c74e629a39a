"""Images packed into a few large files, read one by one at random; `scripts/pack_images.py` packs them.

A packed folder holds the images of another folder, and trains as that one does:

- `images-000000.tar`, `images-000001.tar`, ...: consecutive images in the order of `list_image_files`, in WebDataset's
  layout. An image is the member `KEY.EXTENSION`, with its bytes as they were; with classes, its label follows in
  digits, as `KEY.cls`.
- `image_shards.npy`: (N,) of `RECORD`, where each image lies and what its header says.
- `image_shards_names.npy`: uint8, the images' names below their folder, one after the other.
- `image_shards.json`: how they were packed, the class names, and size and SHA-256 of each file. It is written last:
  where it is, the folder is complete.
"""

import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np

from ..utils import remote_files
from ..utils.errors import UserError
from ..utils.remote_files import is_remote
from .sequence import ImageSequence, check_header

VERSION = 1
HEADER_NAME, RECORDS_NAME, NAMES_NAME = "image_shards.json", "image_shards.npy", "image_shards_names.npy"
ADVICE = "run scripts/pack_images.py again with --verify True, or copy the packed folder again"
RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the image's first byte in its shard
        ("name_end", "<u8"),  # where its name ends among all names; it begins where the one before ends
        ("size", "<u4"),  # bytes
        ("crc32", "<u4"),
        ("shard", "<u4"),
        ("label", "<i4"),  # -1 without classes
        ("width", "<u4"),
        ("height", "<u4"),
        ("rotated", "<u4"),  # 1: its EXIF data ask for a rotation
    ]
)
UNFINISHED = ".packing"  # the folder of what is known while the index is not written
OPEN_SHARDS = 256  # each holds a file descriptor, of which a process may be granted 1024
HEADER_TYPES = {"num_images": int, "files_sha256": str, "class_cond": bool, "classes": list, "shards": list}


class DamagedShard(UserError):
    """Shards and index do not fit. No image takes the place of one that cannot be read for this reason."""


def is_packed(folder: str) -> bool:
    """Whether a folder, local or remote, holds a complete set of image shards."""
    path = bf.join(folder, HEADER_NAME)
    return bf.exists(path) if is_remote(folder) else os.path.exists(path)


def shard_name(shard: int) -> str:
    return f"images-{shard:06d}.tar"


def read_header(folder: str) -> dict[str, Any]:
    """What `image_shards.json` of a packed folder holds.

    :raises UserError: for a file that is not there, cut short, or of another format.
    """
    path = bf.join(folder, HEADER_NAME)
    try:
        with bf.BlobFile(path, "rb") as file:
            header = json.loads(file.read())
        check_header(header, VERSION, HEADER_TYPES)
        for name in (RECORDS_NAME, NAMES_NAME):
            described = header["index"][name]
            if not re.fullmatch("[0-9a-f]{64}", described["sha256"]) or not isinstance(described["size"], int):
                raise ValueError(f"its {name} is {described!r}")
        for shard, described in enumerate(header["shards"]):
            # Names are not taken from the file: it could name files outside the folder.
            if described["name"] != shard_name(shard) or not isinstance(described["bytes"], int):
                raise ValueError(f"its shard {shard} is {described!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): run scripts/pack_images.py again") from error
    return header


class ImageShards(ImageSequence):
    """The images of a packed folder: the sequence of paths that they had in a folder, and their bytes.

    It takes the place of the list that `list_image_files` returns. Pickled, it is the folder's name and, for a part,
    the rows.

    :param folder: local or remote.
    :param rows, prefix: see `ImageSequence`; prefix None: the folder.
    :raises UserError: when the index is missing, cut short or not of this folder.
    """

    def __init__(self, folder: str, rows: np.ndarray | None = None, prefix: str | None = None) -> None:
        self.folder, self.header = folder, read_header(folder)
        records, names = self._load(RECORDS_NAME), self._load(NAMES_NAME)
        count = self.header["num_images"]
        if (records.shape, records.dtype, names.dtype) != ((count,), RECORD, np.uint8):
            raise DamagedShard(f"{folder}: {RECORDS_NAME} holds {records.shape} instead of {count} images: {ADVICE}")
        if (int(records["name_end"][-1]) if count else 0) != names.size:
            raise DamagedShard(f"{folder}: {RECORDS_NAME} and {NAMES_NAME} are not of one folder: {ADVICE}")
        super().__init__(
            records, names, self.header["classes"], rows, bf.join(folder, "") if prefix is None else prefix
        )
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __reduce__(self):
        return type(self), (self.folder, self.rows, self.prefix)

    def _load(self, name: str) -> np.ndarray:
        path = bf.join(self.folder, name)
        if is_remote(path):
            path = remote_files.fetch(path, **self.header["index"][name])
        try:
            # A plain view: each access to a `memmap` costs microseconds more.
            return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (OSError, EOFError, ValueError) as error:
            raise DamagedShard(f"{path} cannot be read ({error}): {ADVICE}") from error

    def _part(self, rows: np.ndarray | None, prefix: str) -> "ImageShards":
        return ImageShards(self.folder, rows, prefix)

    def name(self, index: int) -> str:
        """What an error calls an image."""
        return f"{self[index]} (in {shard_name(self._records['shard'][self._row(index)])})"

    def classes(self) -> tuple[np.ndarray, list[str]]:
        """(N,) int64 labels and the sorted class names, as `image_classes` makes them of the paths.

        :raises UserError: for images that were packed without classes.
        """
        if not self.header["class_cond"]:
            raise UserError(
                f"{self.folder} was packed without classes: pack it with --class_cond True, or train without labels "
                "(--class_cond False)"
            )
        labels, names = self._column("label"), self.header["classes"]
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise DamagedShard(f"{self.folder}: a label is {labels.max()}, of {len(names)} classes: {ADVICE}")
        return super().classes()

    def signature(self) -> str:
        """The `data_signature` of the names relative to the folder."""
        return self.header["files_sha256"] if self.rows is None else super().signature()

    def check_shards(self) -> None:
        """Compare each shard's size with the index; remote ones are compared when they are read.

        :raises DamagedShard: for the first shard that is missing, cut short, or of another folder.
        """
        for shard, described in enumerate(self.header["shards"] if not is_remote(self.folder) else ()):
            path = Path(self.folder, shard_name(shard))
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DamagedShard(f"{path} cannot be read ({error.strerror}): {ADVICE}") from error
            if size != described["bytes"]:
                raise DamagedShard(
                    f"{path} has {size} bytes, the index says {described['bytes']}: it is cut short or of another "
                    f"folder; {ADVICE}"
                )

    # ------------------------------------------------------------ the bytes

    def read(self, index: int) -> bytes:
        """The bytes of an image's file, compared with their checksum.

        :raises UserError: when they cannot be read; DamagedShard: when they are other ones than were packed.
        """
        record = self._records[self._row(index)]
        shard, checksum = int(record["shard"]), int(record["crc32"])
        data = self._open(shard).read(int(record["offset"]), int(record["size"]), checksum)
        if len(data) != record["size"] or zlib.crc32(data) != checksum:
            raise DamagedShard(f"{self.name(index)} is damaged, its checksum is not that of the index: {ADVICE}")
        return data

    def _open_shard(self, shard: int) -> "LocalShard | RemoteShard":
        if shard >= len(self.header["shards"]):
            raise DamagedShard(f"{self.folder} has no shard {shard}, which its index names: {ADVICE}")
        path = bf.join(self.folder, shard_name(shard))
        if not is_remote(path):
            return LocalShard(path)
        sizes = [described["bytes"] for described in self.header["shards"][: shard + 1]]
        copy = None
        if sum(sizes) <= remote_files.cache_bytes():
            version = self.header["index"][RECORDS_NAME]["sha256"]
            copy = remote_files.cache_folder() / f"{version[:32]}-shards" / shard_name(shard)
        return RemoteShard(path, sizes[-1], copy)


def open_packed(folder: str) -> ImageShards:
    """The images of a packed folder whose shards are there in full.

    :raises UserError: when index and shards do not fit.
    """
    shards = ImageShards(folder)
    shards.check_shards()
    return shards


class LocalShard:
    """A shard on a disk. Its file is closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.path, self._descriptor = path, None
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DamagedShard(f"{path} cannot be read ({error.strerror}): {ADVICE}") from error
        if hasattr(os, "posix_fadvise"):  # no reading ahead: the next image comes from elsewhere
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        # By position, not through a memory map: a file that is cut short meanwhile gives an error, not a signal.
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise DamagedShard(f"{self.path} cannot be read ({error.strerror}): {ADVICE}") from error


class RemoteShard:
    """A shard in a bucket, of which what has been read is kept in a sparse local file.

    Whether an image is there already is told by its checksum alone, so that any number of processes may read and write
    the file, and be killed at it. An epoch reads each image once, so that throwing old ones out for new ones would help
    no one: the shards that fit are kept, and the others always fetched.

    :param size: bytes of the shard. :param copy: the local file; None: keep nothing.
    """

    def __init__(self, path: str, size: int, copy: Path | None) -> None:
        self.path, self.size, self.copy = path, size, None
        if copy:
            with self._keeping():
                copy.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(copy, os.O_RDWR | os.O_CREAT, 0o600))
                self.copy = copy

    def read(self, offset: int, size: int, checksum: int) -> bytes:
        if self.copy:
            with self._keeping(), self.copy.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
                if len(data) == size and zlib.crc32(data) == checksum:
                    return data
        data = remote_files.read_range(self.path, offset, size, self.size)
        if self.copy and zlib.crc32(data) == checksum:
            with self._keeping(), self.copy.open("r+b", buffering=0) as file:
                os.pwrite(file.fileno(), data, offset)
        return data

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """A block that reads or writes the local copy; what the disk refuses is said once, and ends the copying."""
        try:
            yield
        except OSError as error:
            print(f"{self.path} is read without a local copy ({error})", file=sys.stderr, flush=True)
            self.copy = None
