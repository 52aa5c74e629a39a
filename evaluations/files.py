"""Files: written whole or not at all, hashed, and the network's weights found or downloaded."""

import hashlib
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
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
        with suppress(OSError):
            beside.unlink()


def check_outputs(outputs, inputs):
    """Refuse at once what would fail, or destroy a file, when hours of work are to be written down.

    :param outputs: what names each place to write -> its path, or None. :param inputs: paths that are read.
    :raises UserError: for a folder, a device or a pipe, an input, two outputs in one place, and a place that cannot be
        written.
    """
    outputs = {flag: Path(path) for flag, path in outputs.items() if path}
    for flag, path in outputs.items():
        try:
            if path.is_dir():
                raise UserError(f"{path} is a folder: name a file in it")
            if path.exists() and not path.is_file():
                raise UserError(f"{flag} is {path}, which is a device or a pipe: name a regular file")
            for other in filter(None, inputs):
                if same_place(path, other):
                    raise UserError(f"{flag} is {path}, which would replace {other}, an input: name another file")
            for other, place in outputs.items():
                if other != flag and same_place(path, place):
                    raise UserError(f"{flag} and {other} both name {path}: name two files")
            if not path.parent.is_dir():
                raise UserError(f"the folder of {path} does not exist: make it first")
            with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".partial", dir=path.parent):
                pass  # it can be made there, and is gone again
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): name another place") from error


def same_place(path, other):
    """Whether two paths lead to one file, also by links, and also where it is still to be written."""
    path, other = Path(path), Path(other)
    both = path.exists() and other.exists()
    return path.samefile(other) if both else os.path.realpath(path) == os.path.realpath(other)


def check_named_once(paths, rule):
    """:raises UserError: when a file is named twice, also by a link; `rule` says what there should be instead."""
    for place, path in enumerate(paths):
        for other in paths[:place]:
            if same_place(path, other):
                raise UserError(f"{other} is named twice, again as {path}: {rule}")


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


def inception_places(path=None):
    """Where the network's weights may be read from, or be downloaded to."""
    return [path, os.environ.get("INCEPTION_V3_PATH"), cache_folder() / INCEPTION_NAME]


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
