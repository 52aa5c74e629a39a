"""Writing a sharded checkpoint: all ranks together, each its part. `sharded` describes the format, and reads it."""

import io
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ..utils.errors import UserError
from ..utils.files import disk_errors, sync_folder, write_json
from .checkpoint import MANIFEST_NAME, SAVE_ADVICE, STATE_NAME, prune_checkpoints, sharded_name
from .sharded import Part, Section


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all ranks of a gloo group, in the order of the ranks; without a group, that of this process."""
    gathered = [value] * (1 if group is None else group.size())
    if group is not None:
        dist.all_gather_object(gathered, value, group=group)
    return gathered


class _ChecksumFile(io.BufferedWriter):
    """A new file that computes its CRC-32 while it is written, from the first byte to the last."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.crc32 = 0

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return super().write(data)


class _ChecksumFiles(FileSystem):
    """The files of a writer. `written` has size and CRC-32 of each by name."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, int]] = {}

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        with disk_errors(path, SAVE_ADVICE), _ChecksumFile(Path(path)) as file:
            yield file
            if not file.closed:
                file.flush()
        # Metadata is written under a temporary name.
        name = Path(path).name.removesuffix(".tmp")
        self.written[name] = {"bytes": Path(path).stat().st_size, "crc32": file.crc32}


class _Writer(FileSystemWriter):
    """Writes this rank's file of a section, and computes its checksum."""

    def __init__(self, section: Path):
        super().__init__(section, per_thread_copy_ahead=0)  # one tensor at a time is copied to the CPU
        self.fs = _ChecksumFiles()

    def storage_meta(self) -> None:
        """Nothing: it would be the folder's temporary name."""


class _SavePlanner(DefaultSavePlanner):
    """Plans the parts of a section. `create_global_plan` leaves each part to one of the ranks that hold it."""

    def __init__(self, section: Section):
        super().__init__(flatten_state_dict=False)
        self.section = section

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(name, part) for name, part in self.section.items() if part.local.numel()])
        return self.plan

    def _item(self, name: str, part: Part) -> WriteItem:
        chunk = ChunkStorageMetadata(part.offset, part.local.shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), part.size)
        return WriteItem(MetadataIndex(name, part.offset), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, item: WriteItem) -> torch.Tensor:
        part = self.section[item.index.fqn]
        return part.local.to(part.dtype)


def write_sharded(
    folder: Path, step: int, sections: Mapping[str, Section], state: bytes, group: dist.ProcessGroup | None, keep: int
) -> None:
    """Write a sharded checkpoint, whole or not at all, and prune the older ones.

    All ranks of the group call it together. Parts that several ranks hold are spread over them.

    :param folder: the training folder.
    :param sections: what this rank holds, by section.
    :param state: what `state.pt` is to hold; that of the group's first rank counts.
    :param group: a gloo group that nobody else uses meanwhile; None for one process.
    :param keep: see `prune_checkpoints`.
    :raises UserError: on all ranks, when one could not write, for example to a full disk. Nothing of it is left.
    :raises RuntimeError: on the other ranks, when one failed otherwise.
    """
    rank = 0 if group is None else group.rank()
    planners = {name: _SavePlanner(section) for name, section in sections.items()}
    proposals = _gather(
        # The name is drawn anew each time, so that a process of a killed run cannot write into this checkpoint.
        (secrets.token_hex(4), {name: planner.create_local_plan() for name, planner in planners.items()}), group
    )  # fmt: skip
    partial = folder / f".{sharded_name(step)}.{proposals[0][0]}.partial"
    writers, metadata = {}, {}
    failure, results, written = None, {}, {}
    try:
        for name, planner in planners.items():
            # Every rank makes the same plan of all the ranks' plans, so that none has to be sent back.
            plans, metadata[name] = planner.create_global_plan([plans[name] for _, plans in proposals])
            writer = writers[name] = _Writer(partial / name)
            with disk_errors(partial, SAVE_ADVICE):
                writer.prepare_local_plan(planner.plan)  # makes the folder
            plan = planner.finish_plan(writer.prepare_global_plan(plans)[rank])
            if plan.items:
                results[name] = writer.write_data(plan, planner).wait()
                sync_folder(partial / name)
            written |= {f"{name}/{file}": facts for file, facts in writer.fs.written.items()}
    except Exception as error:
        failure = error
    outcomes = _gather((failure and (isinstance(failure, UserError), str(failure)), results, written), group)
    failures = [(number, *told) for number, (told, _, _) in enumerate(outcomes) if told]
    if rank == 0 and not failures:
        try:
            for name, writer in writers.items():
                found = metadata[name].state_dict_metadata
                # Tensors in the order of the model, whichever ranks write them.
                metadata[name].state_dict_metadata = {key: found[key] for key in sections[name] if key in found} | found
                writer.finish(metadata[name], [found[name] for _, found, _ in outcomes if name in found])
                written |= {f"{name}/{file}": facts for file, facts in writer.fs.written.items()}
            for _, _, theirs in outcomes:
                written |= theirs
            _finish(folder, partial, step, written, state)
            prune_checkpoints(folder, keep)
        except Exception as error:
            failure, failures = error, [(0, isinstance(error, UserError), str(error))]
    failures = _gather(failures, group)[0]
    if not failures:
        return
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    if failure is not None:
        raise failure
    number, is_user_error, message = failures[0]
    raise UserError(message) if is_user_error else RuntimeError(f"rank {number} failed: {message}")


def _finish(folder: Path, partial: Path, step: int, written: dict[str, Any], state: bytes) -> None:
    """Write what only one rank writes, and give the checkpoint its name."""
    path, old = folder / sharded_name(step), folder / f".{sharded_name(step)}.replaced"
    files = _ChecksumFiles()
    with files.create_stream(partial / STATE_NAME, "wb") as file:
        file.write(state)
        file.flush()
        os.fsync(file.fileno())
    write_json(partial / MANIFEST_NAME, {"parts": written | files.written})
    with disk_errors(path, SAVE_ADVICE):
        for section in {partial / name for name in written}:
            sync_folder(section.parent)
        sync_folder(partial)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        partial.rename(path)
        sync_folder(folder)
        shutil.rmtree(old, ignore_errors=True)
