"""Writing files whole or not at all, and hashes of files."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

DISK_ADVICE = "free some disk space, or choose a folder with write permission"


class DiskError(UserError, OSError):
    """An error of the operating system while writing a file, such as a full disk, as one sentence."""


@contextmanager
def disk_errors(path: str | Path, advice: str = DISK_ADVICE) -> Iterator[None]:
    """Within the block, which writes `path`, errors of the operating system become one sentence.

    :param advice: what the user can do about them.
    :raises DiskError: instead of an OSError, also of one that `torch.save` replaced by a RuntimeError.
    """
    try:
        yield
    except DiskError:
        raise
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise DiskError(f"{path} could not be written ({cause.strerror or cause}): {advice}") from error


@contextmanager
def atomic_write(path: str | Path, advice: str = DISK_ADVICE) -> Iterator[BinaryIO]:
    """A binary file to write to, which appears at `path` only when all of it is on the disk.

    :raises DiskError: as `disk_errors`. No partial file is left.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors(path, advice):
            with beside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # of a disk that can only be read: what went wrong first is what counts
            beside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all.

    :raises DiskError: as `atomic_write`.
    """
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
