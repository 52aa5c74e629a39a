"""Writing files as `torch.save` does, but tensor by tensor: one that is spread over ranks is whole while it is written.

`torch.save` first collects all tensors and then writes them, so that they are in memory together. The format is a zip
file: `data.pkl` holds everything but the numbers of the tensors, and `data/0`, `data/1`, ... hold these, uncompressed.
"""

import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, BinaryIO
from zipfile import ZipFile, ZipInfo

import torch

FORMAT_VERSION = b"3\n"  # of all files since PyTorch 1.6
ALIGNMENT = 64  # bytes; a memory map needs aligned numbers
LOCAL_HEADER = 30 + 20  # bytes before the name of a record, and those of its sizes in 64 bits
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(eq=False)
class LateTensor:
    """A tensor that is made when it is written, and let go afterwards.

    :param dtype: of the file. :param make: makes it, in any format and on any device.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def convert_late(tensor: torch.Tensor | LateTensor, dtype: torch.dtype) -> torch.Tensor | LateTensor:
    """A tensor that is converted to another format when it is written."""
    if tensor.dtype == dtype:
        return tensor
    if isinstance(tensor, LateTensor):
        return replace(tensor, dtype=dtype)  # `save_tensors` converts what it makes
    return LateTensor(tensor.shape, dtype, lambda: tensor)


@dataclass(eq=False)
class _Numbers:
    """Where `data.pkl` points to the numbers of a tensor."""

    identity: tuple


class _Pickler(pickle.Pickler):
    """Pickles tensors without their numbers, as plain contiguous ones on the CPU."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[torch.Tensor | LateTensor] = []

    def persistent_id(self, value: Any) -> tuple | None:
        return value.identity if isinstance(value, _Numbers) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor | LateTensor):
            return NotImplemented
        count, strides = 1, []
        for size in reversed(value.shape):
            strides.insert(0, count)
            count *= max(size, 1)
        numbers = _Numbers(("storage", STORAGES[value.dtype], str(len(self.tensors)), "cpu", value.shape.numel()))
        self.tensors.append(value)
        arguments = numbers, 0, tuple(value.shape), tuple(strides), False, OrderedDict()
        return torch._utils._rebuild_tensor_v2, arguments  # the name that files of all versions of PyTorch have


def _pickle(state: Any) -> tuple[bytes, list[torch.Tensor | LateTensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(state)
    return file.getvalue(), pickler.tensors


def late_tensors(state: Any) -> list[LateTensor]:
    """The tensors of a state that are made when they are written, in the order of writing."""
    return [tensor for tensor in _pickle(state)[1] if isinstance(tensor, LateTensor)]


def save_tensors(state: Any, file: BinaryIO) -> None:
    """Write what `torch.load(file, weights_only=True)` reads, with one tensor at a time in memory beside `state`.

    :param state: dicts, lists and plain values, with tensors on any device, and `LateTensor`s.
    :param file: can be written and searched.
    """
    pickled, tensors = _pickle(state)
    with ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", sys.byteorder)
        for number, tensor in enumerate(tensors):
            record = ZipInfo(f"archive/data/{number}")
            fill = -(file.tell() + LOCAL_HEADER + len(record.filename) + 4) % ALIGNMENT
            record.extra = b"FB" + fill.to_bytes(2, "little") + bytes(fill)
            with archive.open(record, "w", force_zip64=True) as target:
                whole = tensor.make() if isinstance(tensor, LateTensor) else tensor
                target.write(whole.detach().cpu().to(tensor.dtype).contiguous().view(-1).view(torch.uint8).numpy())
                del whole
        archive.writestr("archive/version", FORMAT_VERSION)
