"""Finds the images of a folder, in ADM's order: files and subfolders sorted together by name."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import blobfile as bf

from .. import logger
from ..utils.errors import UserError
from ..utils.remote_files import check_scheme, is_remote
from .shards import HEADER_NAME, UNFINISHED, shard_name

EXTENSIONS = ("jpg", "jpeg", "png", "gif")
# Not read, as ADM does not read them either: otherwise the list of files would not be ADM's.
OTHER_EXTENSIONS = ("webp", "bmp", "tif", "tiff", "avif", "heic", "heif", "jfif", "jp2", "jxl", "ppm", "pgm", "tga")
CHUNK = 1 << 16  # names that are given at once
CONVERT = "convert them to jpg or png"


@dataclass
class Listing:
    """What is noted while a folder is listed.

    :param folders: `(name, modification time in ns)` of the folder itself, whose name is "", and of each subfolder,
        whose name ends with a slash. Only of a local folder: in a bucket there are none.
    :param other_formats: number of files by extension that look like images and are not read.
    """

    folders: list[tuple[str, int]] = field(default_factory=list)
    other_formats: Counter[str] = field(default_factory=Counter)


def check_name(data_dir: str) -> None:
    """Refuse what is no name of a folder.

    :raises UserError: for no name, and for a remote scheme that is not known.
    """
    if not data_dir:
        raise UserError("--data_dir is missing: name a folder of images")
    check_scheme(data_dir, "--data_dir")


def check_folder(data_dir: str) -> None:
    """Refuse what is not a folder.

    :raises UserError: for it.
    """
    if not (bf.isdir(data_dir) if is_remote(data_dir) else os.path.isdir(data_dir)):
        raise UserError(f"--data_dir {data_dir} is not a folder: name a folder of images")


def list_names(
    data_dir: str, listing: Listing, found: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, list[str]]]:
    """Yield the images of a folder and its subfolders in order, as `(subfolder, names of one file or more in it)`.

    :param listing: is filled on the way.
    :param found: called with numbers of files that have been seen, for a display of the progress.
    :raises UserError: when `data_dir` is not a folder, or a folder in it cannot be listed.
    """
    check_folder(data_dir)
    return _list(data_dir, "", listing, found)


def _list(root, prefix, listing, found):
    names, subfolders, count = [], set(), 0
    try:
        for count, (name, is_folder) in enumerate(_entries(root, prefix, listing), start=1):
            extension = name.rpartition(".")[2].lower() if "." in name else ""
            if extension in EXTENSIONS:
                names.append(name)
            elif is_folder():
                subfolders.add(name)
                names.append(name)
            elif extension in OTHER_EXTENSIONS:
                listing.other_formats[extension] += 1
            if count % 1024 == 0:
                found(1024)
    except OSError as error:
        raise UserError(
            f"{bf.join(root, prefix) if prefix else root} cannot be listed ({error.strerror or error}): change its "
            "permissions, or remove it"
        ) from error
    found(count % 1024)
    names.sort()
    start = 0
    for index, name in enumerate(names):
        if name in subfolders or index - start == CHUNK:
            if index > start:
                yield prefix, names[start:index]
            start = index
        if name in subfolders:
            yield from _list(root, f"{prefix}{name}/", listing, found)
            start = index + 1
    if len(names) > start:
        yield prefix, names[start:]


def _entries(root: str, prefix: str, listing: Listing) -> Iterator[tuple[str, Callable[[], bool]]]:
    """The entries of a folder: name, and a function that tells whether it is a folder."""
    if is_remote(root):
        for entry in bf.scandir(bf.join(root, prefix) if prefix else root):
            yield entry.name, lambda entry=entry: entry.is_dir
        return
    folder = os.path.join(root, prefix) if prefix else root
    # The time first: what changes while the folder is being listed makes it another one at the next start.
    listing.folders.append((prefix, os.stat(folder).st_mtime_ns))
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name, lambda entry=entry: _is_folder(entry)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def check_listed(data_dir: str, count: int, listing: Listing) -> None:
    """Refuse a folder without images.

    :param count: number of images found.
    :raises UserError: for none; the message says what is there instead.
    """
    if count:
        return
    if any(bf.exists(bf.join(data_dir, name)) for name in (UNFINISHED, shard_name(0))):
        raise UserError(
            f"{data_dir} has been packed in part, {HEADER_NAME} is missing, which is written last: run "
            "scripts/pack_images.py again, or copy the missing file"
        )
    others = listing.other_formats
    but = f", but {others.total()} of other formats ({_describe(others)}): {CONVERT}" if others else ""
    raise UserError(f"{data_dir} and its subfolders hold no image ({', '.join(EXTENSIONS)}){but}")


def log_other_formats(data_dir: str, other_formats: Counter[str]) -> None:
    """One line that counts the images that are not read; none without any."""
    if other_formats:
        logger.log(
            f"{other_formats.total()} images of other formats ({_describe(other_formats)}) in {data_dir} are ignored: "
            f"{CONVERT} to train on them"
        )


def _describe(other_formats: Counter[str]) -> str:
    return ", ".join(f".{extension} {count}" for extension, count in other_formats.most_common())
