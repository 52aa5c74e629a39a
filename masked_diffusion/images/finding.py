"""Finds the images of `--data_dir`: rank 0 lists them once, and all ranks map what it found into memory.

Where the index lies in a folder that all nodes see, each rank maps that. A node that does not see it gets a copy, which
its first rank writes and keeps until it ends.
"""

import atexit
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from .. import dist_util, logger
from ..utils.errors import UserError
from ..utils.files import DiskError, disk_errors
from ..utils.locks import FileLock
from ..utils.remote_files import is_remote
from .index import (
    CHECKED_NAME,
    HEADER_NAME,
    NAMES_NAME,
    RECORDS_NAME,
    ImageIndex,
    make_index,
    open_index,
    other_formats,
)
from .listing import check_folder, check_name, log_other_formats
from .sequence import ImageSequence
from .shards import ImageShards, is_packed, open_packed

INDEX_NAME = "data_index"  # in the log directory
LOCK_NAME = "lock"
COPIES = "masked_diffusion_index_"
COPY_ADVICE = "make room, or set TMPDIR to a folder with more of it"
BLOCK = 1 << 24  # bytes that travel at once
YOUNG = 60.0  # seconds: a copy of this age may not be locked yet


def find_images(data_dir: str, index: str | Path, reindex: bool = False, inspect: bool = True) -> ImageSequence:
    """The images of a folder, in the order of `list_image_files`. All ranks call it; rank 0 alone looks at the folder.

    :param data_dir: what `load_data` takes.
    :param index: the folder in which what was found is kept, and looked up the next time.
    :param reindex: look at the folder again even if the index fits it.
    :param inspect: also read the images' headers; False: the names are enough.
    :raises UserError: for a folder without images or that cannot be read, and when the disk does not take the index.
    """
    found = dist_util.run_on_main(_find, data_dir, Path(index), reindex, inspect)
    return found if isinstance(found, ImageShards) else _open_on_all_ranks(*found)


def check_index_place(index: str, data_dir: str) -> None:
    """Refuse a place for the index.

    :raises UserError: for one in a bucket, and one among the images, whose folder it would change.
    """
    if is_remote(index):
        raise UserError(f"--index {index} is remote: name a local folder")
    place = Path(index).resolve()
    if data_dir and not is_remote(data_dir) and Path(data_dir).resolve() in (place, *place.parents):
        raise UserError(f"--index {index} is in --data_dir: name a folder outside, the index would change the images'")


def _find(data_dir: str, folder: Path, reindex: bool, inspect: bool) -> ImageShards | tuple[Path, str, str]:
    """The images of a packed folder; or where the index is, its checksum, and what stands before each name."""
    check_name(data_dir)
    if is_packed(data_dir):
        return open_packed(data_dir)
    check_folder(data_dir)  # before anything is written or said
    index, reason = open_index(folder, data_dir, inspect)
    if index and reindex:
        index, reason = None, "--reindex is True"
    if index is None:
        lock = _wait_for_lock(folder)
        try:
            if not reindex:  # another run may have made it meanwhile
                index, reason = open_index(folder, data_dir, inspect)
            if index is None:
                what = "is listed and its images are opened" if inspect else "is listed"
                again = f" again, since {reason}" if (folder / HEADER_NAME).exists() else ""
                logger.log(f"{data_dir} {what}{again}: {folder} keeps what is found")
                index = make_index(folder, data_dir, inspect)
        finally:
            lock.release()
    else:
        logger.log(
            f"{len(index)} images as listed in {folder} on {index.header['made']} (--reindex True lists {data_dir} "
            "again)"
        )
    log_other_formats(data_dir, other_formats(index))
    return folder, index.sha256, index.prefix


def _wait_for_lock(folder: Path) -> FileLock:
    said = False
    while True:
        try:
            return FileLock(folder / LOCK_NAME, f"{folder} is being made", "this run waits for it")
        except DiskError:
            raise
        except UserError as error:
            if not said:
                logger.log(str(error))
            said = True
            time.sleep(1)


# ---------------------------------------------------------------- all ranks


def _open_on_all_ranks(folder: Path, sha256: str, prefix: str) -> ImageIndex:
    index = _open(folder, sha256, prefix)
    # The first rank of each node that does not see the index writes a copy. Where ranks of one node do not even share
    # their temporary folder, as containers do, each writes its own.
    for each_its_own in (False, True):
        if not dist_util.any_rank(index is None):
            return index
        name = COPIES + dist_util.broadcast_object(secrets.token_hex(8))
        copy = Path(tempfile.gettempdir(), f"{name}_{dist_util.get_rank()}" if each_its_own else name)
        writes = index is None and (each_its_own or dist_util.get_local_rank() == 0)
        failure = _copy(folder, copy if writes else None)
        for message in filter(None, dist_util.gather_objects(failure)):
            raise UserError(message)
        index = index or _open(copy, sha256, prefix)
    if dist_util.any_rank(index is None):
        raise UserError(f"{folder} has been made again meanwhile, by another run: start again")
    return index


def _open(folder: Path, sha256: str, prefix: str) -> ImageIndex | None:
    try:
        return ImageIndex(folder, sha256, None, prefix)
    except UserError:  # not there, or another one
        return None


def _copy(folder: Path, copy: Path | None) -> str | None:
    """Send the index from rank 0 to all ranks, of which those with a `copy` write it, until they end.

    :return: why the copy could not be written.
    """
    failure = None
    if copy:
        try:
            _make_copy_folder(copy)
        except DiskError as error:
            failure = str(error)
    for name, block in _blocks(folder):
        if copy and failure is None:
            try:
                with disk_errors(copy / name, COPY_ADVICE), (copy / name).open("ab") as file:
                    file.write(block)
            except DiskError as error:  # the other ranks still wait for the rest
                failure = str(error)
    return failure


def _blocks(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of the index, in blocks, on all ranks."""
    for name in (NAMES_NAME, RECORDS_NAME, CHECKED_NAME, HEADER_NAME):
        with (folder / name).open("rb") if dist_util.is_main() else nullcontext() as file:
            while block := dist_util.broadcast_object(file and file.read(BLOCK)):
                yield name, block


def _make_copy_folder(copy: Path) -> None:
    """Make the folder of a copy; remove those of processes that were killed."""
    for path in copy.parent.glob(f"{COPIES}*"):
        try:
            if path.lstat().st_uid == os.getuid() and time.time() - path.lstat().st_mtime > YOUNG:
                lock = FileLock(path / LOCK_NAME, str(path), "in use")
                shutil.rmtree(path, ignore_errors=True)
                lock.release()
        except (OSError, UserError):  # held, or gone already
            continue
    with disk_errors(copy, COPY_ADVICE):
        copy.mkdir(mode=0o700)
    lock = FileLock(copy / LOCK_NAME, str(copy), "in use")
    atexit.register(_remove_copy, copy, lock, os.getpid())


def _remove_copy(copy: Path, lock: FileLock, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        shutil.rmtree(copy, ignore_errors=True)
        lock.release()
