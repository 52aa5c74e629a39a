"""Parts of remote files (those that blobfile reads), and where copies of them are kept."""

import hashlib
import os
import time
from pathlib import Path

import blobfile as bf

from .errors import UserError
from .files import atomic_write, disk_errors

ATTEMPTS, LONGEST_WAIT = 6, 8.0  # the waits of all attempts are 0.25 + 0.5 + ... = 7.75 seconds
CACHE_FOLDER, CACHE_GIB = "MASKED_DIFFUSION_CACHE", "MASKED_DIFFUSION_CACHE_GIB"
DEFAULT_GIB = "16"
BLOCK = 1 << 23
SCHEMES = "gs:// (Google), az:// and https://ACCOUNT.blob.core.windows.net (Azure)"
CACHE_ADVICE = f"make room there, or name another folder (export {CACHE_FOLDER}=PATH)"


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def check_scheme(path: str, flag: str) -> None:
    """Refuse remote paths that blobfile does not know.

    :param flag: where the path comes from, such as `--data_dir`.
    :raises UserError: for any scheme but `gs://`, `az://` and the `https://` of Azure.
    """
    scheme, separator, rest = path.partition("://")
    is_azure = scheme == "https" and rest.partition("/")[0].endswith(".blob.core.windows.net")
    if separator and not is_azure and scheme not in ("gs", "az"):
        raise UserError(
            f"{flag} {path}: {scheme}:// cannot be read, only {SCHEMES} and local folders: copy the data to a local "
            f"disk or to one of these, or mount the bucket as a folder, and name that with {flag}"
        )


def read_range(path: str, offset: int, size: int, file_size: int) -> bytes:
    """`size` bytes of a remote file from `offset` on, in one request; tried again when it fails.

    :param file_size: of the whole file, which spares the request that asks for it.
    :raises UserError: when all attempts fail, with the reason of the last one.
    """
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(0.125 * 2**attempt, LONGEST_WAIT))
        try:
            with bf.BlobFile(path, "rb", streaming=True, buffer_size=max(size, 1), file_size=file_size) as file:
                file.seek(offset)
                data = file.read(size)
        except FileNotFoundError as error:
            raise UserError(f"{path} is not there: copy all files of the packed folder") from error
        except MemoryError:
            raise
        except Exception as error:  # blobfile lets the errors of urllib3 and ssl through
            reason = str(error) or type(error).__name__
            continue
        if len(data) == size:
            return data
        reason = f"{len(data)} of {size} bytes came"
    raise UserError(
        f"{path} cannot be read at byte {offset} ({reason}; {ATTEMPTS} attempts): check the connection and the "
        "credentials"
    )


def cache_folder() -> Path:
    """Where copies of remote files are kept: `MASKED_DIFFUSION_CACHE`, or a folder in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(os.environ.get(CACHE_FOLDER) or Path(home, "masked_diffusion"))


def cache_bytes() -> int:
    """How many bytes of images the cache may hold: `MASKED_DIFFUSION_CACHE_GIB`, 16 GiB where it is not set.

    :raises UserError: when it is not a number of 0 or more.
    """
    text = os.environ.get(CACHE_GIB) or DEFAULT_GIB
    try:
        gib = float(text)
        if not 0 <= gib < 2**30:
            raise ValueError
    except ValueError:
        raise UserError(f"{CACHE_GIB} is {text!r}: it must be a number of GiB, 0 for no cache") from None
    return int(gib * 2**30)


def fetch(path: str, size: int, sha256: str) -> Path:
    """The local copy of a remote file, made when there is none.

    :param size: bytes. :param sha256: of the file, in hexadecimal.
    :raises UserError: when the file is not there, has another SHA-256, or the cache's disk does not take it.
    """
    local = cache_folder() / f"{sha256[:32]}-{bf.basename(path)}"
    if local.exists():  # whole: it was checked before it got this name
        return local
    digest = hashlib.sha256()
    with disk_errors(local.parent, CACHE_ADVICE):
        local.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(local, CACHE_ADVICE) as copy:
        for offset in range(0, size, BLOCK):
            block = read_range(path, offset, min(BLOCK, size - offset), size)
            digest.update(block)
            copy.write(block)
        if digest.hexdigest() != sha256:
            raise UserError(f"{path} has another checksum than its folder's index says: copy the packed folder again")
    return local
