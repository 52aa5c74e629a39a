"""Packs the images of a folder into shards; `shards` describes what comes out, and reads it.

Every shard is made by itself, out of `shard_size` consecutive files, and its bytes depend on nothing but them: a killed
run goes on, and processes and ranks share the work. What is known of a finished shard waits in the folder `.packing`
for the last one; then the index is made of it.
"""

import io
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .. import dist_util, logger
from ..image_datasets import data_signature, image_classes, relative_names
from ..utils.errors import UserError
from ..utils.files import atomic_write, disk_errors, file_hash, write_json
from ..utils.image_headers import read_header as read_image_header
from ..utils.loader_processes import LoaderIterator, init_loader_process
from ..utils.tar_shards import TarWriter, find_shared_stems, member_name
from .finding import INDEX_NAME, find_images
from .sequence import ImageSequence
from .shards import (
    HEADER_NAME,
    NAMES_NAME,
    RECORD,
    RECORDS_NAME,
    UNFINISHED,
    VERSION,
    DamagedShard,
    is_packed,
    is_remote,
    read_header,
    shard_name,
)

SETTINGS_NAME = "settings.json"
ADVICE = "make room, or choose another --out; the same command goes on where it stopped"
SHOWN_BAD_IMAGES = 20

# ---------------------------------------------------------------- one shard


@dataclass(frozen=True)
class Task:
    """What the shards are made of: the images, their relative names and, with classes, labels.

    :param images: what `read(index)` gives an image's bytes.
    """

    images: ImageSequence
    names: Sequence[str]
    shared_stems: np.ndarray
    labels: np.ndarray | None
    shard_size: int
    on_bad_image: str
    out: Path

    def __len__(self) -> int:
        return -(-len(self.names) // self.shard_size)

    def files(self, shard: int) -> range:
        """The files of a shard, as a range of their indices."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.names)))


class Packer(Dataset):
    """Asked for a shard by its number, it writes the shard; the item is `(number, [(name, reason) of bad images])`."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self):
        return len(self.task)

    def __getitem__(self, shard):
        return shard, write_shard(self.task, shard)


class _NotWritten(Exception):
    pass


def write_shard(task: Task, shard: int) -> list[tuple[str, str]]:
    """Write a shard, and what is known of it; with bad images and `error`, neither.

    :return: `(name, reason)` of the images whose header cannot be read.
    :raises UserError: when the disk does not take the files.
    """
    path, bad, names = task.out / shard_name(shard), [], []
    records = np.zeros(len(task.files(shard)), dtype=RECORD)
    records["shard"] = shard
    with disk_errors(path, ADVICE):
        part_path(task.out, shard).unlink(missing_ok=True)  # it must not vouch for the new shard
    try:
        with atomic_write(path, ADVICE) as file:
            tar = TarWriter(file)
            for index in task.files(shard):
                label = -1 if task.labels is None else int(task.labels[index])
                try:
                    data = task.images.read(index)
                    header = read_image_header(io.BytesIO(data))
                except (MemoryError, DamagedShard):
                    raise
                except Exception as error:  # on damaged files Pillow's readers raise nearly anything
                    reason = error.__cause__ if isinstance(error, UserError) else error
                    bad.append((task.names[index], f"cannot be read: {reason}"))
                    continue
                member = member_name(task.names[index], bool(task.shared_stems[index]))
                offset = tar.add(member, data)
                if label >= 0:
                    tar.add(member.rpartition(".")[0] + ".cls", str(label).encode())
                record = records[len(names)]
                record["offset"], record["size"], record["crc32"] = offset, len(data), zlib.crc32(data)
                record["label"], (record["width"], record["height"], record["rotated"]) = label, header
                names.append(os.fsencode(task.names[index]))
            tar.finish()
            if bad and task.on_bad_image == "error":
                raise _NotWritten
    except _NotWritten:
        return bad
    records = records[: len(names)]
    records["name_end"] = np.cumsum([len(name) for name in names], dtype=np.uint64)
    write_part(task.out, shard, records, b"".join(names), {"bytes": tar.size, "sha256": tar.sha256(), "skipped": bad})
    return bad


# ---------------------------------------------------------------- what is known of finished shards


class Part(NamedTuple):
    """A finished shard: its records, names and `{"bytes", "sha256", "skipped"}`."""

    records: np.ndarray
    names: bytes
    described: dict[str, Any]


def part_path(out: Path, shard: int) -> Path:
    return out / UNFINISHED / f"{shard_name(shard)}.npz"


def write_part(out: Path, shard: int, records: np.ndarray, names: bytes, described: dict[str, Any]) -> None:
    texts = {"names": names, "described": json.dumps(described).encode()}
    arrays = {key: np.frombuffer(text, dtype=np.uint8) for key, text in texts.items()}
    with atomic_write(part_path(out, shard), ADVICE) as file:
        np.savez(file, records=records, **arrays)


def read_part(out: Path, shard: int) -> Part | None:
    """None where the shard is not finished."""
    try:
        with np.load(part_path(out, shard), allow_pickle=False) as arrays:
            described = json.loads(arrays["described"].tobytes())
            return Part(arrays["records"], arrays["names"].tobytes(), described)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


# ---------------------------------------------------------------- the folder


def check_out(data_dir: str, out: str) -> None:
    """Refuse a place to pack into.

    :raises UserError: for none, one in a bucket, and the images' own folder.
    """
    if not out:
        raise UserError("--out is missing: name a folder to write the shards to")
    if is_remote(out):
        raise UserError(f"--out {out} is remote: pack into a local folder, and copy it")
    if data_dir and not is_remote(data_dir) and Path(out).resolve() == Path(data_dir).resolve():
        raise UserError(f"--out {out} is --data_dir: name another folder")


def pack_images(
    *,
    data_dir: str,
    out: str,
    shard_size: int,
    class_cond: bool,
    on_bad_image: str,
    num_workers: int,
    verify: bool,
) -> None:
    """Pack all images of a folder; what is there already is not done again. The ranks share out the missing shards.

    :param data_dir: what `load_data` takes. :param out: a folder that `check_out` lets pass.
    :param shard_size: files per shard.
    :param class_cond: keep labels; see `image_classes`.
    :param on_bad_image: `error`, or `skip` to leave out images whose header cannot be read; each is listed either way.
    :param verify: compare finished shards with their checksums, and pack the damaged ones again.
    :raises UserError: for bad images and bad folders, for a folder that was packed with other settings or of other
        files, and when the disk does not take the files.
    """
    folder = Path(out)
    # Without the headers: each image is opened when it is packed.
    images = find_images(data_dir, folder / UNFINISHED / INDEX_NAME, inspect=False)
    names = relative_names(images, data_dir)
    labels, classes = image_classes(images) if class_cond else (None, [])
    task = Task(images, names, find_shared_stems(names), labels, shard_size, on_bad_image, folder)
    settings = {"num_files": len(names), "source_sha256": data_signature(names), "shard_size": shard_size}
    settings |= {"class_cond": class_cond, "classes": classes}
    dist_util.run_on_main(_start, folder, settings, verify)
    missing = _find_missing(task, verify)
    bad = _pack_missing(task, missing, num_workers)
    dist_util.run_on_main(_finish, task, settings, missing, bad)


def _start(out: Path, settings: dict[str, Any], verify: bool) -> None:
    """Make the folder, or compare the one that is there with the settings."""
    with disk_errors(out / UNFINISHED, ADVICE):
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        for path in [*out.glob(".*.partial"), *(out / UNFINISHED).glob(".*.partial")]:  # of a run that was killed
            path.unlink()
    path, packed = out / UNFINISHED / SETTINGS_NAME, is_packed(str(out))
    before = read_header(str(out)) if packed else json.loads(path.read_text()) if path.exists() else {}
    for key, value in settings.items() if before else ():
        if before.get(key) != value:
            differs = f"{key} {before.get(key)}, now it is {value}"
            if key in ("num_files", "source_sha256", "classes"):
                differs = (
                    f"another list of {before.get('num_files')} images, now --data_dir has {settings['num_files']}"
                )
            raise UserError(f"{out} was packed with {differs}: repeat its settings, or choose another --out")
    if packed and verify and not _is_index_whole(out, before):
        logger.log(f"the index of {out} is damaged: all shards are packed again")
        (out / HEADER_NAME).unlink()
    if not path.exists():
        write_json(path, settings)


def _is_index_whole(out: Path, header: dict[str, Any]) -> bool:
    return all((out / name).exists() and _describe(out / name) == known for name, known in header["index"].items())


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def _find_missing(task: Task, verify: bool) -> list[int]:
    """The shards to pack, ascending, the same list on all ranks, each of which looks at its part."""
    header = read_header(str(task.out)) if is_packed(str(task.out)) else None
    own = range(dist_util.get_rank(), len(task), dist_util.get_world_size())
    found = [shard for shard in own if not _is_finished(task, shard, header, verify)]
    there = [shard for shard in found if (task.out / shard_name(shard)).exists()]
    found = dist_util.gather_objects((found, there))
    missing = sorted(shard for of_rank, _ in found for shard in of_rank)
    logger.log(f"{len(task) - len(missing)} of {len(task)} shards are there already")
    for shard in sorted(shard for _, of_rank in found for shard in of_rank):
        logger.log(f"{task.out / shard_name(shard)} is not finished, damaged or lacks images: it is packed again")
    return missing


def _is_finished(task: Task, shard: int, header: dict[str, Any] | None, verify: bool) -> bool:
    path, part = task.out / shard_name(shard), read_part(task.out, shard)
    if part is None and header is None:
        return False
    described = header["shards"][shard] if part is None else part.described
    if part and part.described["skipped"] and task.on_bad_image == "error":
        return False
    has_size = path.exists() and path.stat().st_size == described["bytes"]
    return has_size and (not verify or file_hash(path) == described["sha256"])


def _pack_missing(task: Task, missing: list[int], num_workers: int) -> list[tuple[str, str]]:
    """Pack this rank's share of the missing shards, and log how it goes. Returns the bad images of all ranks."""
    own = missing[dist_util.get_rank() :: dist_util.get_world_size()]
    sizes = {shard: len(task.files(shard)) for shard in missing}
    total, own_total = sum(sizes.values()), sum(sizes[shard] for shard in own)
    start, count, bad = time.perf_counter(), 0, []
    for shard, bad_ones in _packed(task, own, num_workers):
        bad += bad_ones
        count += sizes[shard]
        done, speed = total * count // own_total, count / (time.perf_counter() - start)
        eta = timedelta(seconds=round((own_total - count) / speed))
        logger.log(f"{done}/{total} images  {speed * total / own_total:.0f} images/s  ETA {eta}")
    return [image for of_rank in dist_util.gather_objects(bad) for image in of_rank]


def _packed(task: Task, shards: list[int], num_workers: int) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    if not shards:
        return iter(())
    loader = DataLoader(
        Packer(task),
        batch_size=None,
        sampler=shards,
        num_workers=min(num_workers, len(shards)),
        prefetch_factor=1 if num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=init_loader_process,
    )
    return LoaderIterator(loader)


def _as_it_is(item):
    return item


def _finish(task: Task, settings: dict[str, Any], packed: list[int], bad: list[tuple[str, str]]) -> None:
    """List the bad images, and write the index of a folder that has none."""
    for name, reason in bad[:SHOWN_BAD_IMAGES]:
        logger.log(f"{name} {reason}")
    if len(bad) > SHOWN_BAD_IMAGES:
        logger.log(f"... and {len(bad) - SHOWN_BAD_IMAGES} more")
    if bad and task.on_bad_image == "error":
        name, reason = bad[0]
        raise UserError(
            f"{len(bad)} bad images, the first: {name} {reason}; repair them, or leave them out with "
            "--on_bad_image skip: the same command then goes on"
        )
    out = task.out
    if is_packed(str(out)):
        _check_repaired(out, packed)
    else:
        _write_index(task, settings)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # NFS keeps files that are mapped until this process ends


def _check_repaired(out: Path, packed: list[int]) -> None:
    """The shards that were damaged, packed again, must be what the index describes."""
    header = read_header(str(out))
    for shard in packed:
        if read_part(out, shard).described["sha256"] != header["shards"][shard]["sha256"]:
            raise UserError(
                f"{out / shard_name(shard)} was packed again and has become another: images of --data_dir "
                f"have changed; choose another --out, or remove {out / HEADER_NAME} to pack all of them again"
            )


def _write_index(task: Task, settings: dict[str, Any]) -> None:
    parts = [read_part(task.out, shard) for shard in range(len(task))]
    records = np.concatenate([part.records for part in parts])
    names = np.frombuffer(b"".join(part.names for part in parts), dtype=np.uint8)
    skipped = [image for part in parts for image in part.described["skipped"]]
    if not len(records):
        raise UserError(f"all {len(skipped)} images are bad, the first: {' '.join(skipped[0])}")
    lost = np.setdiff1d(np.arange(len(settings["classes"])), records["label"])
    if len(lost):
        name = settings["classes"][lost[0]]
        raise UserError(f"no image of class {name!r} can be read: repair or remove them, and choose another --out")
    starts = np.cumsum([0] + [len(part.names) for part in parts[:-1]])
    records["name_end"] += np.repeat(starts, [len(part.records) for part in parts]).astype(np.uint64)
    for name, array in ((RECORDS_NAME, records), (NAMES_NAME, names)):
        with atomic_write(task.out / name, ADVICE) as file:
            np.save(file, array, allow_pickle=False)
    kept = task.names
    if skipped:
        left_out = {name for name, _ in skipped}
        kept = kept.take([index for index, name in enumerate(kept) if name not in left_out])
    shards = [
        {"name": shard_name(shard), "images": len(part.records)}
        | {key: part.described[key] for key in ("bytes", "sha256")}
        for shard, part in enumerate(parts)
    ]
    header = {"version": VERSION, "num_images": len(records), "files_sha256": data_signature(kept)} | settings
    header |= {"index": {name: _describe(task.out / name) for name in (RECORDS_NAME, NAMES_NAME)}}
    write_json(task.out / HEADER_NAME, header | {"skipped": skipped, "shards": shards})
