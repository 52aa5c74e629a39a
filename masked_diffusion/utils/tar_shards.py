"""Tars in WebDataset's layout: the names of their members, and bytes that depend on nothing but names and contents."""

import hashlib
import os
import tarfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np


def member_name(name: str, shared_stem: bool) -> str:
    """The name in the tar of an image's relative name; no two images get the same.

    WebDataset takes what stands before the first dot of the file name for the key, and gathers the members that have it
    in common into one sample. So folders stay as they are, and a dot inside the key becomes `%2E`.

    :param shared_stem: whether another image differs in the extension only; then the key says the extension too.
    """
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.rpartition(".")
    key = stem.replace("%", "%25").replace(".", "%2E")
    return f"{folder}{slash}{key}{'%' + extension if shared_stem else ''}.{extension}"


def find_shared_stems(names: Sequence[str]) -> np.ndarray:
    """(len(names),) bool: whether another name differs in nothing but the extension."""
    stems = np.empty(len(names), dtype=np.uint64)
    for index, name in enumerate(names):  # as numbers: a million strings more would take 100 MB
        digest = hashlib.blake2b(os.fsencode(name.rpartition(".")[0]), digest_size=8).digest()
        stems[index] = int.from_bytes(digest, "little")
    _, inverse, counts = np.unique(stems, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


class TarWriter:
    """Writes a tar whose bytes depend on nothing but names and contents."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first byte."""
        info = tarfile.TarInfo(name)  # mtime, owner and group are 0
        info.size = len(data)
        # Not in the pax format, whose extended headers are not the same in all versions of Python.
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        """Mark the end, as tar does."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    def sha256(self) -> str:
        """Of all that was written, in hexadecimal."""
        return self._digest.hexdigest()
