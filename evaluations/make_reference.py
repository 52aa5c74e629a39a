"""Make a reference batch out of a dataset: images as ADM crops them, with mu, sigma, mu_s and sigma_s beside them."""

if __spec__ is None:  # started as a script, which is part of no package
    from as_package import run_script

    raise SystemExit(run_script(__file__))

import argparse
import io
import json
import lzma
import os
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from . import console, ranks
from .errors import UserError
from .evaluator import add_network_flags, check_network_flags, create_network, say
from .features import Needs, collect
from .files import check_outputs, file_hash, inception_places
from .npz_reader import NpzImages
from .suite import READY_MADE

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif")
DAMAGE = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)  # of a tar


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("source", help="a folder of images with its subfolders, or a tar of them")
    parser.add_argument("out", help="the npz to write")
    parser.add_argument("--image_size", type=int, default=256, help="height and width to crop to")
    parser.add_argument("--num_images", type=int, default=0, help="so many of them, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--below", default="", help="only what lies below this folder of the source: train, say")
    add_network_flags(parser)
    return parser.parse_args()


class ImageFolder:
    """Images below a folder and below the folders that links in it lead to, by name."""

    def __init__(self, root):
        self.root = Path(root)

    def names(self):
        found, above = [], {str(self.root): [os.path.realpath(self.root)]}  # of each folder, and what it lies in
        for folder, folders, files in os.walk(self.root, followlinks=True):
            found += [path for path in map(Path(folder).joinpath, files) if path.is_file()]
            chain = above.pop(folder)
            for name in list(folders):
                place = os.path.join(folder, name)
                if os.path.realpath(place) in chain:
                    folders.remove(name)  # a link to a folder that it lies in itself: its images have been found
                else:
                    above[place] = [*chain, os.path.realpath(place)]
        return [str(path.relative_to(self.root)) for path in found]

    def read(self, names):
        for name in names:
            yield name, (self.root / name).read_bytes()


class ImageTar:
    """Images of a tar, compressed or not, by name; what it holds is only ever decoded as images."""

    def __init__(self, path):
        self.path = path

    def names(self):
        with self._open() as archive:
            return [member.name.removeprefix("./") for member in archive if member.isfile()]

    def read(self, names):
        wanted = set(names)
        with self._open() as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in wanted:
                    wanted.remove(name)  # a tar may hold a name twice
                    yield name, archive.extractfile(member).read()

    @contextmanager
    def _open(self):
        """The archive. What a damaged one raises within the block becomes one sentence."""
        try:
            with tarfile.open(self.path) as archive:
                yield archive
        except DAMAGE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.path} cannot be read as a tar ({reason}): copy it again") from error


def open_source(path):
    """An `ImageFolder` or an `ImageTar`."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: name a folder of images or a tar of them")
    return ImageFolder(path) if os.path.isdir(path) else ImageTar(path)


def choose(source, path, below, num_images, seed):
    """Sorted names of the images to take.

    :raises UserError: when there are fewer than asked for, or fewer than two.
    """
    prefix = f"{below.strip('/')}/" if below else ""
    names = sorted({n for n in source.names() if n.lower().endswith(EXTENSIONS) and n.startswith(prefix)})
    if len(names) < max(num_images, 2):
        raise UserError(f"{path} holds {len(names)} images below {prefix or '.'}: {max(num_images, 2)} are needed")
    if num_images:
        chosen = np.random.default_rng(seed).choice(len(names), num_images, replace=False)
        names = [names[i] for i in np.sort(chosen)]
    return names


def center_crop(image, size):
    """The centre crop of ADM's loader: (size, size, 3) uint8.

    The image is halved with a box filter while it can be, then brought to its size by a bicubic one.
    """
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def decode(name, data, size):
    try:
        with Image.open(io.BytesIO(data)) as image:
            return center_crop(image.convert("RGB"), size)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as an image ({error}): mend or remove it") from error


@contextmanager
def open_member(archive, name, shape, dtype):
    """A member of an npz to write an array's bytes into."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        description = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def write_images(path, args):
    """An npz of the chosen images, in the order in which the source has them. Returns their number.

    One image is in memory at a time.
    """
    source = open_source(args.source)
    names = choose(source, args.source, args.below, args.num_images, args.seed)
    with zipfile.ZipFile(path, "w") as archive:
        shape = (len(names), args.image_size, args.image_size, 3)
        with open_member(archive, "arr_0", shape, np.uint8) as file:
            for name, data in tqdm(source.read(names), total=len(names), unit="image", desc="cropping"):
                file.write(np.ascontiguousarray(decode(name, data, args.image_size)).tobytes())
    return len(names)


def add_arrays(path, arrays):
    with zipfile.ZipFile(path, "a") as archive:
        for name, array in arrays.items():
            with open_member(archive, name, array.shape, array.dtype) as file:
                file.write(array.tobytes())
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make(args):
    """Write the npz beside its name, and give it that name when all of it is on the disk."""
    network, inception = create_network(args)
    beside = Path(args.out).with_name(f".{Path(args.out).name}.partial.npz")
    settings = {"source": args.source, "below": args.below, "image_size": args.image_size, "seed": args.seed}
    try:
        count = ranks.on_first(lambda: write_images(beside, args))
        collected = collect(NpzImages(beside), network, Needs(statistics=set(READY_MADE)), args.batch_size)
        if ranks.rank() > 0:
            return
        settings |= {"backend": network.name, "inception_sha256": file_hash(inception)}
        arrays = {"settings": np.array(json.dumps(settings))}
        for name, keys in READY_MADE.items():
            arrays |= zip(keys, collected.statistics[name].result(), strict=True)
        add_arrays(beside, arrays)
        beside.replace(args.out)
        say(f"wrote {args.out}: {count} images of {args.image_size} x {args.image_size}")
    except OSError as error:
        raise UserError(f"{args.out} cannot be made of {args.source} ({error}): mend the file or make room") from error
    finally:
        if ranks.rank() == 0:
            beside.unlink(missing_ok=True)


def main():
    args = parse_args()
    check_network_flags(args)
    if args.image_size < 1:
        raise UserError(f"--image_size is {args.image_size}: it must be positive")
    if args.num_images < 0 or args.num_images == 1:
        raise UserError(f"--num_images is {args.num_images}: statistics need at least 2, and 0 is all")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}: it must not be negative")
    open_source(args.source)
    check_outputs({"OUT": args.out}, [args.source, *inception_places(args.inception)])
    if args.devices > 1 and "WORLD_SIZE" not in os.environ:
        return ranks.launch(args.devices)
    return make(args)


if __name__ == "__main__":
    console.run(main)
