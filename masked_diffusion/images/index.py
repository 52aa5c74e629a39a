"""What an unpacked folder of images holds, found out once and kept: the index of a data set.

Listing a million files and opening each to read its header takes minutes, on a network disk half an hour. Rank 0 does
it once and writes the index, a folder of

- `names.npy`: uint8, the images' names below their folder, one after the other, in the order of `list_image_files`;
- `records.npy`: (N,) of `RECORD`, where each name ends, the label, and what the image's header says;
- `checked.npy`: (n,) of `CHECKED`, size and time of some files, by which a change is noticed;
- `index.json`: of which folder, the class names, why images are bad, size and SHA-256 of each file above. It is written
  last: where it is, the index is complete.

Every later start memory-maps the index, once a quick look at the folder finds that nothing has changed (`find_misfit`).
"""

import hashlib
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import blobfile as bf
import numpy as np

from ..utils.errors import UserError
from ..utils.files import atomic_write, disk_errors, file_hash, write_json
from ..utils.image_headers import NO_HEADER, THREADS, read_headers
from ..utils.progress import Progress
from ..utils.remote_files import is_remote
from .listing import Listing, check_listed, list_names
from .sequence import ImageSequence, StreamedSignature, check_header, read_image_file

VERSION = 1
HEADER_NAME, RECORDS_NAME, NAMES_NAME, CHECKED_NAME = "index.json", "records.npy", "names.npy", "checked.npy"
RECORD = np.dtype(
    [
        ("name_end", "<u8"),
        ("label", "<i4"),  # -1 for a name without a class
        ("width", "<u4"),
        ("height", "<u4"),
        ("rotated", "<u2"),  # 1: its EXIF data ask for a rotation
        ("bad", "<u2"),  # 1: its header cannot be read
    ]
)
CHECKED = np.dtype([("row", "<i8"), ("size", "<i8"), ("mtime_ns", "<i8")])
NOT_THERE = -1  # as the size of a file that cannot be looked at
HEADER_TYPES = {
    "data_dir": str, "num_images": int, "files_sha256": str, "inspected": bool, "folders": list, "other_formats": dict,
    "reasons": list, "arrays": dict, "made": str,
}  # fmt: skip
SAMPLE = 512  # files that are looked at before an index is used again
MAX_CLASSES = 1 << 20
MAX_REASONS = 1000
FILES_PER_TASK = 64
ADVICE = "make room, or choose another --index"


class ImageIndex(ImageSequence):
    """The images of an unpacked folder, in the place of the list that `list_image_files` returns.

    Pickled, it is the index's folder and, for a part, the rows.

    :param folder: of the index; a local one.
    :param sha256: of `index.json`, which must be this one; None: any.
    :param rows, prefix: see `ImageSequence`; prefix: the images' folder with a slash at its end.
    :raises UserError: when the index is missing, cut short, of another version or another one than `sha256` says.
    """

    def __init__(self, folder: str | Path, sha256: str | None, rows: np.ndarray | None, prefix: str) -> None:
        self.folder = Path(folder)
        self.header, self.sha256 = _read_header(self.folder / HEADER_NAME)
        if sha256 not in (None, self.sha256):
            raise UserError(f"{self.folder} has been made again meanwhile: start again")
        names, records, self._checked = (
            self._load(name, dtype)
            for name, dtype in ((NAMES_NAME, np.dtype(np.uint8)), (RECORDS_NAME, RECORD), (CHECKED_NAME, CHECKED))
        )
        if len(records) != self.header["num_images"] or int(records["name_end"][-1]) != len(names):
            raise UserError(f"{self.folder}: {RECORDS_NAME} and {NAMES_NAME} do not fit together")
        super().__init__(records, names, self.header["classes"] or [], rows, prefix)

    def __reduce__(self):
        return type(self), (self.folder, self.sha256, self.rows, self.prefix)

    def _part(self, rows: np.ndarray | None, prefix: str) -> "ImageIndex":
        return ImageIndex(self.folder, self.sha256, rows, prefix)

    def _load(self, name: str, dtype: np.dtype) -> np.ndarray:
        path = self.folder / name
        try:
            if path.stat().st_size != self.header["arrays"][name]["size"]:
                raise ValueError(f"it has {path.stat().st_size} bytes")
            loaded = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # each access is cheaper so
            if loaded.ndim != 1 or loaded.dtype != dtype:
                raise ValueError(f"it holds {loaded.dtype} {loaded.shape}")
            return loaded
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error})") from error

    def check_arrays(self) -> None:
        """Compare the files with their checksums, without mapping them.

        :raises UserError: for the first one that is another.
        """
        for name, described in self.header["arrays"].items():
            if file_hash(self.folder / name) != described["sha256"]:
                raise UserError(f"{self.folder / name} is damaged")

    def read(self, index: int) -> bytes:
        """The bytes of an image's file.

        :raises UserError: when they cannot be read; the message names it.
        """
        return read_image_file(self[index])

    def bad(self) -> dict[int, str]:
        """Why images cannot be read, by index, ascending; those that can be read are not in it."""
        reasons = dict(self.header["reasons"])
        bad = np.flatnonzero(self._column("bad")).tolist()
        return {index: reasons.get(index if self.rows is None else int(self.rows[index]), NO_HEADER) for index in bad}

    def classes(self) -> tuple[np.ndarray, list[str]]:
        """(N,) int64 labels and the sorted class names, as `image_classes` makes them of the paths.

        :raises UserError: for a name without a class, and for a million of classes.
        """
        labels = self._column("label")
        if self.header["classes"] is None:
            raise UserError(
                f"{self.prefix} has more than {MAX_CLASSES} classes: the class is the file name up to its first "
                "underscore; rename the files, or train without labels (--class_cond False)"
            )
        if labels.min() < 0:
            raise UserError(no_class_message(self[int(np.argmin(labels))]))
        return super().classes()

    def signature(self) -> str:
        """The `data_signature` of the names relative to the folder."""
        return self.header["files_sha256"] if self.rows is None else super().signature()

    # ------------------------------------------------------------ does it still fit

    def find_misfit(self, data_dir: str) -> str | None:
        """Why the index is not that of a folder as it is now; None if nothing speaks against it.

        The times of the folder and of all subfolders tell that a file was added, removed or renamed. Size and time are
        compared of `SAMPLE` files and of all bad ones, so that a bad one may be repaired. A file that was overwritten
        in place is noticed only if it is one of them. A bucket has no subfolders: there the sample is all.
        """
        if self.header["data_dir"] != resolved(data_dir):
            return f"it is that of {self.header['data_dir']}"
        prefix = bf.join(data_dir, "")
        folders = [(prefix + name, mtime_ns) for name, mtime_ns in self.header["folders"]]
        files = [prefix + self._name(row) for row in self._checked["row"].tolist()]
        for (path, before), (_, now) in zip(folders, _stat_all([path for path, _ in folders]), strict=True):
            if now != before:
                return f"{path} has changed"
        before = self._checked[["size", "mtime_ns"]].tolist()
        return next((f"{files[i]} has changed" for i, now in enumerate(_stat_all(files)) if now != before[i]), None)


def no_class_message(path: str) -> str:
    """What is said of a file name without a class."""
    return (
        f"{path} has no class in its name: rename it to CLASS_ANYTHING (datasets/class_folders.py does this for a "
        "folder per class), or train without labels (--class_cond False)"
    )


def resolved(data_dir: str) -> str:
    """A folder's path, however it was written."""
    return data_dir.rstrip("/") if is_remote(data_dir) else os.path.realpath(data_dir)


def _stat(path: str) -> tuple[int, int]:
    """Size and modification time in ns of a file."""
    try:
        if is_remote(path):
            found = bf.stat(path)
            return found.size, int(found.mtime * 1e9)
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError:
        return NOT_THERE, NOT_THERE


def checksum(header: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of the rest of a header."""
    rest = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _stat_all(paths: Sequence[str]) -> list[tuple[int, int]]:
    tasks = [paths[start : start + FILES_PER_TASK] for start in range(0, len(paths), FILES_PER_TASK)]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(chain.from_iterable(pool.map(lambda task: [_stat(path) for path in task], tasks)))


def _read_header(path: Path) -> tuple[dict[str, Any], str]:
    """The header, and the SHA-256 of its file."""
    try:
        data = path.read_bytes()
        header = json.loads(data)
        check_header(header, VERSION, HEADER_TYPES)
        if not isinstance(header["classes"], list | None):
            raise ValueError(f"its 'classes' is {header['classes']!r}")
        if header.get("checksum") != checksum(header):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    return header, hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- making it


def open_index(folder: Path, data_dir: str, inspected: bool) -> tuple[ImageIndex | None, str]:
    """The index in a folder if it is whole and fits the images' folder; else None and the reason.

    :param inspected: whether the images' headers must be in it.
    """
    if not (folder / HEADER_NAME).exists():
        return None, "there is none"
    try:
        index = ImageIndex(folder, None, None, bf.join(data_dir, ""))
        index.check_arrays()
    except (UserError, OSError) as error:
        return None, str(error)
    if inspected and not index.header["inspected"]:
        return None, "it has the names alone"
    reason = index.find_misfit(data_dir)
    return (None, reason) if reason else (index, "")


def make_index(folder: Path, data_dir: str, inspect: bool) -> ImageIndex:
    """List a folder of images, read their headers, and write the index. One process does it.

    :param folder: of the index, which replaces one that is there.
    :param inspect: read the headers; False: the names are enough.
    :raises UserError: when the images' folder cannot be listed or holds no image, and when the disk takes no index.
    """
    with disk_errors(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.partial"):  # left by a killed process
            path.unlink()
        (folder / HEADER_NAME).unlink(missing_ok=True)  # it must not vouch for the new arrays
    listing, prefix = Listing(), bf.join(data_dir, "")
    header, names, records = _list(data_dir, listing)
    paths = ImageSequence(records, names, [], None, prefix)
    bad = {}
    if inspect:
        with Progress(len(records), "image headers") as progress:
            headers = read_headers(paths, progress=progress.add)
        records["width"], records["height"], records["rotated"] = *headers.sizes.T, headers.rotated
        bad = headers.bad
        records["bad"][list(bad)] = 1
    sample = np.random.default_rng(0).choice(len(records), min(SAMPLE, len(records)), replace=False)
    rows = np.union1d(sample, np.array(list(bad), dtype=np.int64)).tolist()
    stats = _stat_all([paths[row] for row in rows])
    checked = np.array([(row, *stat) for row, stat in zip(rows, stats, strict=True)], dtype=CHECKED)
    header |= {"inspected": inspect, "reasons": list(bad.items())[:MAX_REASONS], "arrays": {}}
    for name, values in ((NAMES_NAME, names), (RECORDS_NAME, records), (CHECKED_NAME, checked)):
        with atomic_write(folder / name, ADVICE) as file:
            np.save(file, values, allow_pickle=False)
        path = folder / name
        header["arrays"][name] = {"size": path.stat().st_size, "sha256": file_hash(path)}
    write_json(folder / HEADER_NAME, header | {"checksum": checksum(header)})
    return ImageIndex(folder, None, None, prefix)


def _list(data_dir: str, listing: Listing) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The header of a new index as far as a listing gives it, all names, and the records with name ends and labels."""
    blob, ends, labels, classes = bytearray(), array("Q"), array("i"), {}
    signature = StreamedSignature()
    with Progress(None, "files listed") as progress:
        for subfolder, chunk in list_names(data_dir, listing, progress.add):
            signature.add([subfolder + name for name in chunk])
            for name in chunk:
                blob += os.fsencode(subfolder + name)
                ends.append(len(blob))
                class_name, underscore, _ = name.partition("_")
                label = -1
                if underscore and len(classes) <= MAX_CLASSES:
                    label = classes.setdefault(class_name, len(classes))
                labels.append(label)
    check_listed(data_dir, len(ends), listing)
    records = np.zeros(len(ends), dtype=RECORD)
    records["name_end"] = np.frombuffer(ends, dtype=np.uint64)
    order = sorted(classes)
    ranks = np.zeros(len(classes) + 1, dtype=np.int32)
    ranks[-1] = -1  # of the label -1
    for rank, class_name in enumerate(order):
        ranks[classes[class_name]] = rank
    records["label"] = ranks[np.frombuffer(labels, dtype=np.int32)]
    header = {
        "version": VERSION,
        "made": time.strftime("%Y-%m-%d %H:%M:%S"),
        "data_dir": resolved(data_dir),
        "num_images": len(records),
        "files_sha256": signature.finish(),
        "classes": order if len(classes) <= MAX_CLASSES else None,
        "other_formats": dict(listing.other_formats),
        "folders": listing.folders,
    }
    return header, np.frombuffer(blob, dtype=np.uint8), records


def other_formats(index: ImageIndex) -> Counter[str]:
    """Number of files by extension that look like images and are not read."""
    return Counter(index.header["other_formats"])
