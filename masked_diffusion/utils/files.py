"""Files that are whole or absent, and their hashes."""

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

DISK_ADVICE = "make room on the disk, or choose a folder that you may write to"


class DiskError(UserError, OSError):
    """What the disk refused, in one sentence."""


@contextmanager
def disk_errors(path, advice=DISK_ADVICE):
    """A block that writes `path`: what the disk refuses is said in one sentence.

    :param advice: what to do about it.
    :raises DiskError: in the place of an OSError, also of one that `torch.save` hid behind an error of its own.
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
def atomic_write(path, advice=DISK_ADVICE):
    """A binary file that appears under `path` only once all of it is on the disk.

    :raises DiskError: as `disk_errors`; no partial file stays.
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
            _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # of a disk that can only be read: what went wrong first is what counts
            beside.unlink(missing_ok=True)
        raise


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value):
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
