"""What the head of an image file says, without decoding its pixels: of one file, and of many by threads."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import blobfile as bf
import numpy as np
from PIL import ExifTags, Image

from .remote_files import is_remote

THREADS = 64  # on a network disk they wait; on a local one more than a few are no faster, but no slower either
CHUNK = 256  # images per task
BUFFER = 1 << 14  # bytes: nearly every header ends within the first of them
REMOTE_BUFFER = 1 << 17
NO_HEADER = "cannot be read"


class ImageHeader(NamedTuple):
    """Width and height in pixels, and whether the EXIF data ask for a rotation."""

    width: int
    height: int
    rotated: bool


def read_header(file: BinaryIO) -> ImageHeader:
    """The header of an open image file.

    :raises Exception: nearly any, as Pillow's readers do on damaged files.
    """
    with Image.open(file) as image:
        return ImageHeader(*image.size, _is_rotated(image))


def _is_rotated(image: Image.Image) -> bool:
    # In a PNG, EXIF data may follow the pixels, and Pillow would decode all of them to reach it.
    if "exif" not in image.info:
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except Exception:  # damaged EXIF does not make an image bad, since training does not read it
        return False


# ---------------------------------------------------------------- of many files


class Headers(NamedTuple):
    """What the headers of images say.

    :param sizes: (N, 2) uint32: width and height; 0 where the header cannot be read.
    :param rotated: (N,) bool: whether the EXIF data ask for a rotation.
    :param bad: why a header cannot be read, by index, ascending.
    """

    sizes: np.ndarray
    rotated: np.ndarray
    bad: dict[int, str]


def read_headers(
    paths: Sequence[str], num_threads: int = THREADS, progress: Callable[[int], object] = lambda count: None
) -> Headers:
    """Read the header of every image.

    :param progress: called with numbers of images that are done.
    """
    headers = Headers(np.zeros((len(paths), 2), dtype=np.uint32), np.zeros(len(paths), dtype=bool), {})

    def read(start: int) -> tuple[int, dict[int, str]]:
        stop = min(start + CHUNK, len(paths))
        found, bad = [], {}
        for index in range(start, stop):
            try:
                found.append(_header_of_file(paths[index]))
            except MemoryError:
                raise
            except Exception as error:  # on damaged files Pillow's readers raise nearly anything
                found.append((0, 0, False))
                bad[index] = f"{NO_HEADER}: {error}"
        widths, heights, rotated = zip(*found, strict=True)
        headers.sizes[start:stop] = np.stack([widths, heights], axis=1)
        headers.rotated[start:stop] = rotated
        return stop - start, bad

    with ThreadPoolExecutor(num_threads) as pool:
        running: deque[Future] = deque()
        try:
            for start in range(0, len(paths), CHUNK):
                if len(running) == 2 * num_threads:
                    _finish(running.popleft(), headers, progress)
                running.append(pool.submit(read, start))
            while running:
                _finish(running.popleft(), headers, progress)
        except BaseException:  # Ctrl-C must not wait for what has not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return headers


def _finish(task: Future, headers: Headers, progress: Callable[[int], object]) -> None:
    count, bad = task.result()
    headers.bad.update(bad)
    progress(count)


def _header_of_file(path: str) -> ImageHeader:
    if is_remote(path):
        with bf.BlobFile(path, "rb", buffer_size=REMOTE_BUFFER) as file:
            return read_header(file)
    with open(path, "rb", buffering=BUFFER) as file:  # blobfile's buffer has 8 MiB, which takes longer than the reading
        return read_header(file)
