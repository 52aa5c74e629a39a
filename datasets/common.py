"""Shared by the dataset scripts: reading sources, naming classes, and writing files whole or not at all."""

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
from typing import Any, BinaryIO, NamedTuple, NoReturn

from tqdm.auto import tqdm

EXTENSIONS = ("jpg", "jpeg", "png", "gif")  # the formats that training reads


class UserError(ValueError):
    """A problem that the person who started the script can fix. The message is one sentence for that person."""


class File(NamedTuple):
    """A file of a source.

    :param name: its path in the source; for `write_images`, its name in the output.
    :param open: opens it for reading.
    :param size: in bytes, if it is known without reading the file.
    :param local: its path on disk, if it has one.
    """

    name: str
    open: Callable[[], BinaryIO]
    size: int | None = None
    local: str | None = None


# ---------------------------------------------------------------- command line


def make_parser(description: str, link: bool = True) -> argparse.ArgumentParser:
    """A parser of SOURCE and OUT, and with `link` also of --link."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the downloaded data to read; see above")
    parser.add_argument("out", help="folder to write CLASSID_IMGID images and classes.json into")
    if link:
        parser.add_argument(
            "--link",
            choices=("True", "False"),
            default="False",
            help="True: make symbolic links to the images instead of copies; SOURCE must be a folder (default: False)",
        )
    return parser


def run(main: Callable[[], None]) -> None:
    """Run an entry point. Errors that the user can fix are printed as one sentence, with exit code 2.

    These are `UserError` and errors of the operating system: a missing file, a full disk, a folder that cannot be read.
    Any other exception is a bug of the script and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _stop(error)
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        _stop(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


def _stop(sentence: object) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def progress(items: Iterable, unit: str = "image", total: int | None = None) -> Iterable:
    """Iterate over the items, with a progress bar if the output is a terminal."""
    return tqdm(items, unit=unit, total=total, disable=None)


# ---------------------------------------------------------------- sources


@contextmanager
def open_source(source: str, out: str) -> Iterator[tuple[list[File], list[str]]]:
    """The files of a tar, or of a folder with all its subfolders; and the names of the folders at its top level.

    :raises UserError: for a missing source, a damaged tar, and a folder that is inside `out` or contains it.
    """
    source = Path(source)
    if source.is_dir():
        top, target = source.resolve(), Path(out).resolve()
        if top.is_relative_to(target) or target.is_relative_to(top):
            raise UserError(
                f"{out} and {source} are the same folder or one is inside the other: write to another folder"
            )
        yield _folder_files(top)
    elif source.is_file():
        with source.open("rb") as file, open_tar(file, source) as files_and_folders:
            yield files_and_folders
    else:
        raise UserError(f"{source} is neither a folder nor a file: name the data that you have downloaded")


def _folder_files(top: Path) -> tuple[list[File], list[str]]:
    def refuse(error: OSError) -> NoReturn:  # by default os.walk silently skips folders that it cannot read
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
    """The files of an open tar, compressed or not, and the names of the folders at its top level.

    Members are only read, never unpacked, so that the archive cannot choose a path to write to.

    :param name: name of the archive in messages.
    """
    try:
        with tarfile.open(fileobj=file) as tar:
            yield _tar_files(tar, name)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the operating system, not of the archive
            raise
        reason = str(error).partition(":\n")[0]  # the other lines list every compression that tarfile tried
        raise UserError(f"{name} cannot be read as a tar ({reason}): download it again") from error


def _tar_files(tar: tarfile.TarFile, name: str | Path) -> tuple[list[File], list[str]]:
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
    # tarfile takes a truncated or damaged header for the end of the archive. The real end is a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut short or damaged at byte {tar.offset}")
    return files, sorted(folders)


def is_image(path: str) -> bool:
    """Whether a file's name is that of an image which training reads."""
    name = path.rsplit("/", 1)[-1]
    return not name.startswith(".") and "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


# ---------------------------------------------------------------- classes


def images_by_class(files: Iterable[File], folders: Iterable[str], source: str) -> dict[str, list[File]]:
    """`{class: its images}`, sorted by class. Each folder at the top level of the source is a class.

    :raises UserError: when there are no classes, for a class without images, and for an image outside all classes.
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
    """`{class name: class id}`. Labels follow the sorted order of the ids.

    Plain names are used as ids. Numbers are padded with zeros. If any name has an underscore, where training would end
    the class name, or another special character, the ids are the positions in the sorted list of names.
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
    """The images of a class, renamed to CLASSID_IMGID; IMGID is the path of the image in its class folder.

    :raises UserError: when two images get the same name.
    """
    named = {}
    for image in images:
        image_id = image.name.replace("/", "-")
        name = image_id if image_id.startswith(f"{class_id}_") else f"{class_id}_{image_id}"
        if name in named:
            raise UserError(f"{source} has two images that would be named {name}: rename one of them")
        named[name] = image._replace(name=name)
    return list(named.values())


# ---------------------------------------------------------------- output


def write_images(out: str, classes: dict[str, str], images: Iterable[File], link: bool = False) -> None:
    """Write classes.json, and all images that are not in `out` yet.

    :param classes: `{class id: readable name}`; added to the classes that `out` has already.
    :param images: each is read when it is written.
    :param link: make symbolic links instead of copies; only for images in a folder.
    :raises UserError: when `out` holds other classes, or a different image of the same name.
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
            raise UserError("--link True needs images in a folder, but the source is an archive: leave the flag out")
        with whole_file(path) as unfinished:
            if link:
                unfinished.symlink_to(image.local)
            else:
                with image.open() as source, unfinished.open("wb") as file:
                    shutil.copyfileobj(source, file)
        written += 1
    print(f"{out}: {len(classes)} classes, {written} images written, {there} existed already")


def _check_same(path: Path, image: File) -> None:
    size = image.size if image.local is None else os.path.getsize(image.local)
    if size is not None and size != path.stat().st_size:
        raise UserError(
            f"{path} exists already, with {path.stat().st_size} bytes, but the source's image has {size}: "
            "remove it, or write to another folder"
        )


def _write_classes(path: Path, classes: dict[str, str]) -> None:
    known = {}
    if path.exists():
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not a JSON dictionary of class ids and names ({error}): remove it") from error
    for class_id, name in classes.items():
        if known.get(class_id, name) != name:
            raise UserError(
                f"class {class_id} is {known[class_id]!r} in {path}, but {name!r} in the source: "
                "write to another folder"
            )
    moved = [class_id for class_id, name in known.items() if class_id not in classes and name in classes.values()]
    if moved:
        raise UserError(
            f"{path} has {known[moved[0]]!r} as class {moved[0]}, but the source gives it another class id: write to "
            "another folder"
        )
    merged = dict(sorted({**known, **classes}.items()))
    if merged != known:
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `path` at the end, so that a killed script leaves no incomplete file."""
    unfinished = path.with_name(path.name + ".partial")
    # A killed script may have left a symbolic link here, and writing to it would overwrite the source.
    unfinished.unlink(missing_ok=True)
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno is not None and error.filename is None:  # the error of a full disk does not name the file
            error.filename = str(path)
        raise


def encode_png(image: Any) -> BinaryIO:
    """Encode a PIL image as PNG, as an open file."""
    file = io.BytesIO()
    image.save(file, format="png")
    file.seek(0)
    return file
