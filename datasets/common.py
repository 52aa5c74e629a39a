"""What the dataset scripts share: reading sources, naming classes, and files that appear whole or not at all."""

import argparse
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm.auto import tqdm

EXTENSIONS = ("jpg", "jpeg", "png", "gif")  # what the loader lists


class UserError(ValueError):
    """Something that the person who started the script can mend; its message is one sentence for that person."""


class File(NamedTuple):
    """A file of a source; `name` is its path there, or, in the hands of `write_images`, its name in the output."""

    name: str
    open: Callable[[], BinaryIO]
    size: int | None = None  # bytes, where that is known without reading
    local: str | None = None  # its path on disk, if it has one


# ---------------------------------------------------------------- command line


def make_parser(description: str, link: bool = True) -> argparse.ArgumentParser:
    """A parser of SOURCE and OUT, and of --link where links can be made."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what to read: see above")
    parser.add_argument("out", help="folder to write CLASSID_IMGID images and classes.json into")
    if link:
        parser.add_argument(
            "--link", choices=("True", "False"), default="False", help="make symbolic links to the images of a folder"
        )
    return parser


def run(main: Callable[[], None]) -> None:
    """Run an entry point. What the user can mend is printed as one sentence, and ends the script with code 2.

    That is a `UserError`, and what the system refuses: a missing file, a full disk, a folder that may not be read.
    Everything else is a fault of the script and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _stop(error)
    except OSError as error:
        if error.errno is None:  # of a library, not of the system
            raise
        _stop(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


def _stop(sentence):
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def progress(items: Iterable, unit: str = "image", total: int | None = None) -> Iterable:
    """The items, with a progress bar on a terminal."""
    return tqdm(items, unit=unit, total=total, disable=None)


# ---------------------------------------------------------------- sources


@contextmanager
def open_source(source: str, out: str) -> Iterator[tuple[list[File], list[str]]]:
    """The files of a folder, with all its subfolders, or of a tar; and the names of the folders at its top.

    :raises UserError: for a missing source, a damaged tar, and a folder that lies in `out` or around it.
    """
    source = Path(source)
    if source.is_dir():
        top, target = source.resolve(), Path(out).resolve()
        if top.is_relative_to(target) or target.is_relative_to(top):
            raise UserError(f"{out} and {source} lie one inside the other: write to a folder outside")
        yield _folder_files(top)
    elif source.is_file():
        with source.open("rb") as file, open_tar(file, source) as files_and_folders:
            yield files_and_folders
    else:
        raise UserError(f"{source} is neither a folder nor a file: name the data that you have downloaded")


def _folder_files(top):
    def refuse(error):  # without it, os.walk passes over a folder that it may not read
        raise error

    files = []
    # Class folders are often links to another disk.
    for folder, folders, names in os.walk(top, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if folder == str(top):
            first_level = list(folders)
        for name in sorted(names):
            path = os.path.join(folder, name)
            files.append(File(Path(path).relative_to(top).as_posix(), partial(open, path, "rb"), local=path))
    return files, first_level


@contextmanager
def open_tar(file: BinaryIO, name: str | Path) -> Iterator[tuple[list[File], list[str]]]:
    """The files of an open tar, compressed or not, and the names of the folders at its top.

    Members are only ever read, under names made here: nothing is unpacked to a path that the archive chose.

    :param name: what to call the archive in messages.
    """
    try:
        with tarfile.open(fileobj=file) as tar:
            yield _tar_files(tar, name)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of what the archive holds
            raise
        reason = str(error).partition(":\n")[0]  # below it tarfile lists every compression that it tried
        raise UserError(f"{name} cannot be read as a tar ({reason}): fetch it again") from error


def _tar_files(tar, name):
    files, folders = [], set()
    for member in tar:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if member.name.startswith("/") or ".." in parts:
            raise UserError(f"{name} holds {member.name!r}, which leads out of the folder: do not trust this archive")
        if any(part.startswith(".") for part in parts):
            continue
        if member.isdir():
            folders.update(parts[:1])
        elif member.isfile():
            files.append(File("/".join(parts), partial(tar.extractfile, member), size=member.size))
        elif is_image(member.name):
            raise UserError(f"{name} holds {member.name!r} as a link: unpack the archive and name its folder")
    # tarfile takes a header that is cut short, or damaged, for the end; the real one is a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut short or damaged at byte {tar.offset}")
    return files, sorted(folders)


def is_image(path: str) -> bool:
    """Whether a file's name is one that the loader lists."""
    name = path.rsplit("/", 1)[-1]
    return not name.startswith(".") and "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


# ---------------------------------------------------------------- classes


def images_by_class(files: Iterable[File], folders: Iterable[str], source: str) -> dict[str, list[File]]:
    """`{class: its images}`, a class being a folder at the top of the source, in sorted order.

    :raises UserError: without classes, for a class without images, and for an image in no class.
    """
    classes = {folder: [] for folder in folders}
    for file in files:
        folder, inside, rest = file.name.partition("/")
        if is_image(file.name):
            if not inside:
                raise UserError(f"{source} holds {file.name} beside its class folders: move it into one of them")
            classes.setdefault(folder, []).append(file._replace(name=rest))
    if not classes:
        raise UserError(f"{source} holds no class folder: name a folder, or a tar, with one folder of images per class")
    for name, images in classes.items():
        if not images:
            raise UserError(f"{source} has no image ({', '.join(EXTENSIONS)}) in {name}: fill the folder or remove it")
    return dict(sorted(classes.items()))


def class_ids(names: Iterable[str]) -> dict[str, str]:
    """`{class name: class id}`, such that the sorted ids are in label order.

    Plain names are their own ids. Numbers are padded with zeros. Where a name has an underscore, at which the loader
    would cut it, or another odd character, the ids are the ranks of the sorted names.
    """
    names = sorted(names)
    width = max(map(len, names))
    padded = [name.zfill(width) for name in names]
    if all(re.fullmatch("[0-9]+", name) for name in names) and len(set(padded)) == len(names):
        return dict(zip(names, padded, strict=True))
    if all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9.-]*", name) for name in names):
        return dict(zip(names, names, strict=True))
    return {name: f"{rank:0{len(str(len(names) - 1))}}" for rank, name in enumerate(names)}


def name_images(class_id: str, images: Sequence[File], source: str) -> list[File]:
    """A class's images with the names CLASSID_IMGID that they get; the image's id is its path in the class folder.

    :raises UserError: when two get the same name.
    """
    named = {}
    for image in images:
        image_id = image.name.replace("/", "-")
        name = image_id if image_id.startswith(f"{class_id}_") else f"{class_id}_{image_id}"
        if name in named:
            raise UserError(f"{source} has two images that would be called {name}: rename one")
        named[name] = image._replace(name=name)
    return list(named.values())


# ---------------------------------------------------------------- output


def write_images(out: str, classes: dict[str, str], images: Iterable[File], link: bool = False) -> None:
    """Write classes.json, and those images that `out` lacks.

    :param classes: `{class id: human name}`; added to the classes that `out` has.
    :param images: an iterable of `File`, read as it goes.
    :param link: write symbolic links, which takes images that lie in a folder.
    :raises UserError: when `out` holds other classes, or another image by the name of one.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _write_classes(out / "classes.json", classes)
    written = there = 0
    for image in images:
        path = out / image.name
        if path.exists():
            _check_same(path, image)
            there += 1
            continue
        if link and image.local is None:
            raise UserError("--link True takes images in a folder, but the source is an archive: leave the flag out")
        with whole_file(path) as unfinished:
            if link:
                unfinished.symlink_to(image.local)
            else:
                with image.open() as source, unfinished.open("wb") as file:
                    shutil.copyfileobj(source, file)
        written += 1
    print(f"{out}: {len(classes)} classes, {written} images written, {there} were there")


def _check_same(path, image):
    size = image.size if image.local is None else os.path.getsize(image.local)
    if size is not None and size != path.stat().st_size:
        raise UserError(
            f"{path} exists already, with {path.stat().st_size} bytes, but the source's image has {size}: "
            "remove it, or write to another folder"
        )


def _write_classes(path, classes):
    known = {}
    if path.exists():
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a JSON map of class ids to names ({error}): remove it") from error
    for class_id, name in classes.items():
        if known.get(class_id, name) != name:
            raise UserError(
                f"{path} calls class {class_id} {known[class_id]!r}, but the source {name!r}: write to another folder"
            )
    moved = [class_id for class_id, name in known.items() if class_id not in classes and name in classes.values()]
    if moved:
        raise UserError(
            f"{path} has {known[moved[0]]!r} as class {moved[0]}, which is another in the source: "
            "write to another folder"
        )
    merged = dict(sorted({**known, **classes}.items()))
    if merged != known:
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` once it is whole, so that a killed run leaves no half of a file."""
    unfinished = path.with_name(path.name + ".partial")
    # What a killed run left may be a link, and writing through it would reach the source.
    unfinished.unlink(missing_ok=True)
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno is not None and error.filename is None:  # a full disk does not say which file
            error.filename = str(path)
        raise


def encode_png(image: Any) -> BinaryIO:
    """A PIL image as an open file of PNG."""
    file = io.BytesIO()
    image.save(file, format="png")
    file.seek(0)
    return file
