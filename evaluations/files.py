"""Files: written whole or not at all, hashed, and the network's weights found or downloaded."""

import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from .errors import UserError

INCEPTION_NAME = "classify_image_graph_def.pb"
INCEPTION_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{INCEPTION_NAME}"
BLOCK = 1 << 20


@contextmanager
def atomic_write(path):
    """A binary file that appears under `path` only once all of it is on the disk.

    :raises UserError: when it cannot be written, as on a full disk.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): make room, or name another place") from error
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "masked_diffusion")


def named_inception(path=None, url=INCEPTION_URL):
    """The file of the network's weights that `path` or INCEPTION_V3_PATH names; None where neither does.

    :raises UserError: when what is named is no file.
    """
    for source, named in (("--inception", path), ("INCEPTION_V3_PATH", os.environ.get("INCEPTION_V3_PATH"))):
        if named:
            if not Path(named).is_file():
                fault = "is no file" if Path(named).exists() else "does not exist"
                raise UserError(f"{source} names {named}, which {fault}: fetch {url} and name that file")
            return Path(named)
    return None


def find_inception(path=None, url=INCEPTION_URL):
    """The file of the network's weights: see `named_inception`, else the cache folder's, downloaded once.

    :raises UserError: when a named file does not exist, or the download fails; says where the file goes.
    """
    named = named_inception(path, url)
    if named:
        return named
    cached = cache_folder() / INCEPTION_NAME
    if not cached.is_file():
        try:
            download(url, cached)
        except OSError as error:
            raise UserError(
                f"{INCEPTION_NAME} cannot be downloaded ({error}): fetch {url} elsewhere and put it at {cached}, "
                "or name it with --inception or INCEPTION_V3_PATH"
            ) from error
    return cached


def download(url, path):
    """Fetch a file. What has come of it stays beside as `.part`, and the next call goes on from there.

    :raises OSError: when the connection fails or breaks off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    held = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={held}-"} if held else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the part is no beginning of what is there now
            raise
        part.unlink()
        return download(url, path)
    with response, part.open("ab" if response.status == 206 else "wb") as file:
        held = held if response.status == 206 else 0
        total = held + int(response.headers.get("Content-Length", 0))
        with tqdm(total=total, initial=held, unit="B", unit_scale=True, desc=path.name, file=sys.stderr) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if total and part.stat().st_size != total:
        raise OSError(f"the connection broke off at {part.stat().st_size} of {total} bytes: call again to go on")
    part.replace(path)
