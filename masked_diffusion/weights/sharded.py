"""Sharded checkpoints: folders that all ranks write together, each its part, in torch.distributed.checkpoint's format.

A checkpoint is `sharded{step:06d}` with one subfolder, here called a section, for each whole file: `model`,
`ema_{rate}`, `phema_{width}` and `optimizer`; with `state.pt`, the small rest; and with `manifest.json`, which has size
and CRC-32 of each file. It is written beside, under another name, and gets its own when the last part is on the disk.

`torch.distributed.checkpoint` describes a section in a pickle, `.metadata`. It is read here without its classes, and
parts are read with `weights_only=True`: code in a checkpoint is never run. This module reads; `sharded_writer` writes.
"""

import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from ..utils.errors import UserError
from ..utils.tensor_files import load_state_dict
from .checkpoint import MANIFEST_NAME, STATE_NAME

METADATA_NAME = ".metadata"
DAMAGE_ADVICE = "restore it, or go back to an older checkpoint with --resume_checkpoint"
DTYPES = {"float16", "float32", "float64", "bfloat16", "int8", "uint8", "int16", "int32", "int64", "bool"}
DESCRIPTIONS = {
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


class Part(NamedTuple):
    """What one rank holds of a tensor.

    :param local: the part, on any device. :param offset: where it begins in the tensor.
    :param size: of the whole tensor. :param dtype: on the disk.
    """

    local: torch.Tensor
    offset: torch.Size
    size: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> "Part":
        """This rank's part of a tensor; a plain tensor is one part."""
        if not isinstance(tensor, DTensor):
            return cls(tensor.detach(), torch.Size([0] * tensor.ndim), tensor.shape, dtype or tensor.dtype)
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tensor.detach().to_local(), chunk.offsets, tensor.shape, dtype or tensor.dtype)


Section = Mapping[str, Part]


class Place(NamedTuple):
    """Where a part is: the bytes from `offset` on of a file."""

    file: str
    offset: int
    length: int


class Contents(NamedTuple):
    """What a section holds.

    :param tensors: format, size and division of each tensor. :param places: where each part of it is.
    """

    tensors: dict[str, TensorStorageMetadata]
    places: dict[MetadataIndex, Place]


class _Described:
    """Stands for any class of `torch.distributed.checkpoint.metadata`, and keeps what it would be made of."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Descriptions(pickle.Unpickler):
    """Makes nothing but tuples, formats of numbers and `_Described`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in DTYPES:
            return getattr(torch, name)
        if name in DESCRIPTIONS.get(module, ()):
            return type(name, (_Described,), {})  # a new one each time: the pickle may change it
        raise UserError(f"it asks for {module}.{name}, which no description of tensors needs")


def read_contents(section: Path) -> Contents:
    """What a section holds.

    :raises UserError: for a description that is missing or damaged, asks for other classes than it needs, or names
        other files than parts beside it.
    """
    path = section / METADATA_NAME
    try:
        with path.open("rb") as file:
            found = _Descriptions(file).load().state
        return Contents(
            dict(_tensor(name, each.state) for name, each in found["state_dict_metadata"].items()),
            dict(_place(index.state, info.state) for index, info in found["storage_data"].items()),
        )
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {DAMAGE_ADVICE}") from error
    except Exception as error:  # unpickling, and looking at what it gave, raises anything
        raise UserError(f"{path} cannot be read as a description of tensors ({error}): {DAMAGE_ADVICE}") from error


def _tensor(name: str, described: dict[str, Any]) -> tuple[str, TensorStorageMetadata]:
    dtype, size = described["properties"].state[0], torch.Size(described["size"])
    chunks = [
        ChunkStorageMetadata(torch.Size(chunk.state["offsets"]), torch.Size(chunk.state["sizes"]))
        for chunk in described["chunks"]
    ]
    held = sum(chunk.sizes.numel() for chunk in chunks)
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or held != size.numel():
        raise UserError(f"{name} of shape {tuple(size)} and format {dtype} has {held} numbers")
    return name, TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _place(index: dict[str, Any], info: dict[str, Any]) -> tuple[MetadataIndex, Place]:
    place = Place(info["relative_path"], info["offset"], info["length"])
    if not re.fullmatch(r"__\d+_\d+\.distcp", place.file) or info.get("transform_descriptors"):
        raise UserError(f"{place.file} is no part of it")
    return MetadataIndex(index["fqn"], index["offset"]), place


def section_parts(checkpoint: Path, sections: set[str] | None = None) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of the files of a checkpoint, by name, from the manifest.

    :param sections: the sections whose files are wanted, and '' for `state.pt`; None for all.
    :raises UserError: for a manifest that is missing or damaged.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
        wanted = {
            name: parts[name] for name in sorted(parts) if sections is None or name.rpartition("/")[0] in sections
        }
        if not all(type(facts["bytes"]) is type(facts["crc32"]) is int for facts in wanted.values()):
            raise ValueError("sizes and checksums are no whole numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a list of parts ({error}): {DAMAGE_ADVICE}") from error
    return wanted


def check_parts(checkpoint: Path, parts: Mapping[str, Mapping[str, int]]) -> None:
    """Read files of a checkpoint and compare them with the manifest.

    :raises UserError: for the first one that is missing, truncated or damaged; names it.
    """
    for name, facts in parts.items():
        path, crc32, size = checkpoint / name, 0, 0
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    crc32, size = zlib.crc32(block, crc32), size + len(block)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {DAMAGE_ADVICE}") from error
        if size != facts["bytes"]:
            raise UserError(f"{path} has {size} bytes instead of {facts['bytes']}: {DAMAGE_ADVICE}")
        if crc32 != facts["crc32"]:
            raise UserError(f"{path} is damaged (its checksum is not that of the manifest): {DAMAGE_ADVICE}")


def read_parts(path: Path, contents: Contents, section: Section) -> None:
    """Overwrite parts with what a section holds of them, however it was divided when it was written.

    :param path: of the section.
    :param contents: has every name with the same size.
    :raises UserError: for files that are missing, or hold other things than described.
    """
    try:
        with ExitStack() as stack, torch.no_grad():
            files = {name: stack.enter_context((path / name).open("rb")) for name in _files(contents, section)}
            for name, part in section.items():
                for item in _read_items(contents, name, part):
                    place = contents.places[item.storage_index]
                    files[place.file].seek(place.offset)
                    data = io.BytesIO(files[place.file].read(place.length))
                    saved = torch.load(data, map_location="cpu", weights_only=True)
                    source = _narrow(saved, item.storage_offsets, item.lengths)
                    _narrow(part.local, item.dest_offsets, item.lengths).copy_(source)
    except Exception as error:  # of the disk, of unpickling, or of sizes that contradict each other
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): {DAMAGE_ADVICE}") from error


def _read_items(contents: Contents, name: str, part: Part) -> list[ReadItem]:
    chunk = ChunkStorageMetadata(part.offset, part.local.shape)
    return create_read_items_for_chunk_list(name, contents.tensors[name], [chunk]) if part.local.numel() else []


def _files(contents: Contents, section: Section) -> set[str]:
    items = (item for name, part in section.items() for item in _read_items(contents, name, part))
    return {contents.places[item.storage_index].file for item in items}


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def read_section(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a section, on the CPU. It needs no process group.

    :param path: such as `sharded000100/ema_0.9999`.
    :raises UserError: for files that are missing or damaged; names the first one.
    """
    parts = section_parts(path.parent, {path.name})
    check_parts(path.parent, parts)
    contents = read_contents(path)
    found = contents.tensors
    needed = sum(each.size.numel() * each.properties.dtype.itemsize for each in found.values())
    if needed > sum(part["bytes"] for part in parts.values()):
        raise UserError(f"{path} cannot hold the {needed} bytes that it describes: {DAMAGE_ADVICE}")
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in found.items()}
    read_parts(path, contents, {name: Part.of(tensor) for name, tensor in tensors.items()})
    return tensors


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The small rest of a checkpoint, `state.pt`, once it equals the manifest.

    :raises UserError: for a file that is missing or damaged.
    """
    check_parts(checkpoint, section_parts(checkpoint, {""}))
    return load_state_dict(str(checkpoint / STATE_NAME))


def whole_train_state(small: dict[str, Any], optimizer: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What `opt{step}.pt` of a whole checkpoint holds.

    :param small: of `read_state`. :param optimizer: the tensors of that section.
    """
    entries = {index: dict(entry) for index, entry in small["optimizer"]["state"].items()}
    averages = {width: {} for width in small["phema"]}
    for name, value in optimizer.items():
        kind, first, *rest = name.split(".")
        if kind == "state":
            entries.setdefault(int(first), {})[rest[0]] = value
        else:
            averages[f"{first}.{rest[0]}"][int(rest[1])] = value
    optimizer = small["optimizer"] | {"state": {index: entries[index] for index in sorted(entries) if entries[index]}}
    phema = {width: [found[i] for i in range(len(found))] for width, found in averages.items()}
    return small | {"optimizer": optimizer, "phema": phema}
