"""Images and statistics out of an npz, in a stream as ADM's evaluator reads it; nothing in a file is ever executed."""

import copy
import json
import math
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from .errors import UserError
from .metrics import check_covariance

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
BATCH = 64  # images that are looked at together
LARGEST = 2**30  # bytes of one image or one matrix: a header that claims more is not believed
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, UnicodeError)


@contextmanager
def _readable(path):
    """Turn what a damaged file raises within the block into one sentence."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: make an npz of its images with make_reference.py, and name that")
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: name an npz of images") from error
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as an npz ({reason}): cut short or of another kind, copy it again"
        ) from (error)


class NpzImages:
    """The images `arr_0` of an npz, and what stands beside them. Opening reads headers alone.

    :param path: a file of ADM's format: `arr_0` (N, H, W, 3) uint8, perhaps `mu, sigma, mu_s, sigma_s`, `arr_1`,
        `settings`.
    :raises UserError: for a file that is damaged, without images, or with anything but uint8 colour images.
    """

    def __init__(self, path):
        self.path = Path(path)
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            self.arrays = {name: self._header(archive, name)[1:] for name in self.names}
        if "arr_0" not in self.names and not self.has_statistics("mu", "sigma"):
            raise UserError(f"{self.path} holds neither images (arr_0) nor statistics (mu, sigma), but {self.names}")
        self.shape = self._image_shape() if "arr_0" in self.names else (0, None, None, None)
        self.places = None  # in the file, of its images; None: all

    def __len__(self):
        return self.shape[0]

    @property
    def size(self):
        """Height and width of the images; None without images."""
        return self.shape[1:3] if len(self) else None

    def _header(self, archive, name):
        """The open file after its header, and shape, Fortran order and dtype, which the file's length bears out."""
        file = archive.open(f"{name}.npy")
        try:
            version = np.lib.format.read_magic(file)
            if version not in HEADERS:
                raise ValueError(f"its npy version is {version}")
            shape, fortran, dtype = HEADERS[version](file)
        except ValueError as error:
            raise UserError(f"{self.path}: {name} is no array that can be read ({error})") from error
        if dtype.hasobject:
            raise UserError(
                f"{self.path}: {name} holds Python objects, which are never loaded: write plain numbers (dtype uint8)"
            )
        found, expected = archive.getinfo(f"{name}.npy").file_size - file.tell(), math.prod(shape) * dtype.itemsize
        if found != expected:
            raise UserError(f"{self.path}: {name} {shape} needs {expected} bytes, but the file has {found}")
        return file, shape, fortran, dtype

    def _image_shape(self):
        shape, _, dtype = self.arrays["arr_0"]
        if dtype != np.uint8:
            raise UserError(f"{self.path}: arr_0 is {dtype}, not uint8: write images as whole numbers in [0, 255]")
        if len(shape) != 4 or shape[3] != 3 or min(shape[1:]) < 1:
            raise UserError(f"{self.path}: arr_0 has shape {shape}: images must be (N, height, width, 3)")
        if shape[0] < 2:
            raise UserError(f"{self.path} holds {shape[0]} images: statistics need at least two")
        if math.prod(shape[1:]) > LARGEST:
            raise UserError(f"{self.path}: arr_0 has shape {shape}: images that large are not read")
        return shape

    def batches(self, batch_size, start=0, stop=None):
        """Batches (n, H, W, 3) uint8 of the images [start, stop), one in memory at a time.

        Only an array in Fortran order is read whole.
        """
        stop = len(self) if stop is None else stop
        with self._open_images() as read:
            for begin in range(start, stop, batch_size):
                end = min(begin + batch_size, stop)
                if self.places is None:
                    yield read(begin, end)
                else:
                    yield np.concatenate([read(place, place + 1) for place in self.places[begin:end]])

    @contextmanager
    def _open_images(self):
        """A function that reads the images [begin, end) of the file; it is cheap where these follow the last ones."""
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            file, shape, fortran, dtype = self._header(archive, "arr_0")
            if fortran:
                whole = np.frombuffer(file.read(), dtype).reshape(shape, order="F")
                yield lambda begin, end: np.ascontiguousarray(whole[begin:end])
            else:
                yield partial(_read_images, file, file.tell(), shape[1:])

    def check_content(self):
        """Refuse images that cannot be compared with others; reads no further than it takes to know.

        :raises UserError: when all are the same, or each is of one colour.
        """
        first, differ, varied = None, False, False
        for images in self.batches(BATCH):
            first = images[:1] if first is None else first
            differ = differ or bool((images != first).any())
            varied = varied or not one_colour(images).all()
            if differ and varied:
                return
        fault = "are of one colour each" if differ else "are the same"
        raise UserError(f"{self.path}: all {len(self)} images {fault}: look at how they were made")

    def take(self, indices):
        """(n, H, W, 3) uint8: the images of these places in the file, in one passage over it."""
        places, order = np.unique(indices, return_inverse=True)
        with self._open_images() as read:
            return np.concatenate([read(place, place + 1) for place in places.tolist()])[order]

    def some(self, count):
        """The same file, as if it had no more than so many images: drawn from all of it, for it may lie in order.

        At even distances some classes could be met more often than others; at random none is.
        """
        fewer = copy.copy(self)
        drawn = np.random.default_rng(0).choice(len(self), min(len(self), count), replace=False)
        fewer.places = np.sort(drawn).tolist()
        fewer.shape = (len(drawn), *self.shape[1:])
        return fewer

    def has_statistics(self, *names):
        return all(name in self.names for name in names)

    def statistics(self, mean, covariance):
        """A ready-made mean (d,) and covariance (d, d), such as `mu` and `sigma`, as float64.

        :raises UserError: for other shapes, other kinds of numbers, numbers that are not finite, and no covariance.
        """
        shapes = [self.arrays[name][0] for name in (mean, covariance)]
        if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2 or shapes[0] < (1,):
            raise UserError(f"{self.path}: {mean} and {covariance} have shapes {shapes}: they must be (d,) and (d, d)")
        mu, sigma = self._numbers(mean), self._numbers(covariance)
        try:
            check_covariance(sigma)
        except UserError as error:
            raise UserError(f"{self.path}: {covariance}: {error}") from error
        return mu, sigma

    def _numbers(self, name):
        shape, _, dtype = self.arrays[name]
        if dtype.kind != "f" or math.prod(shape) * dtype.itemsize > LARGEST:
            raise UserError(
                f"{self.path}: {name} is {shape} {dtype}: it must be floats, and no more than features have"
            )
        values = self._read(name).astype(np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{self.path}: {name} holds NaN or infinite numbers: make the file anew")
        return values

    def _read(self, name):
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            file, shape, fortran, dtype = self._header(archive, name)
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")

    def description(self):
        """What the file says of itself: shapes and dtypes, and its `settings` if it has such a text, as JSON values."""
        arrays = {name: {"shape": list(shape), "dtype": str(dtype)} for name, (shape, _, dtype) in self.arrays.items()}
        if "settings" not in self.names or self.arrays["settings"][2].kind != "U" or self.arrays["settings"][0]:
            return {"arrays": arrays}
        text = str(self._read("settings"))
        try:
            return {"arrays": arrays, "settings": json.loads(text)}
        except ValueError:
            return {"arrays": arrays, "settings": text}


def one_colour(images):
    """(N, H, W, C) -> (N,) bool: whether all pixels of an image are the same."""
    pixels = images.reshape(len(images), -1, images.shape[-1])
    return (pixels == pixels[:, :1]).all(axis=(1, 2))


def _read_images(file, first, shape, begin, end):
    """The images [begin, end) of an open file, the first of which lies at the byte `first`."""
    image = math.prod(shape)
    file.seek(first + begin * image)
    data = file.read((end - begin) * image)
    if len(data) != (end - begin) * image:
        raise EOFError(f"it ends within images {begin} to {end - 1}")
    return np.frombuffer(data, np.uint8).reshape(end - begin, *shape).copy()  # torch warns of what is read-only
