"""The state of a run in sharded checkpoints: what each rank writes, and how it finds its part again."""

import io
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from .. import dist_util
from ..utils.errors import UserError
from ..weights.checkpoint import STATE_NAME
from ..weights.sharded import Contents, Part, Section, check_parts, read_contents, read_parts, section_parts
from .ema import DTYPES
from .state import TrainState

# ---------------------------------------------------------------- what a rank holds


def _entries(state: TrainState) -> dict[int, dict[str, Any]]:
    """The optimizer's state of the parameters that this rank updates, by their index: all but with ZeRO-1."""
    own = state.opt.optim if isinstance(state.opt, ZeroRedundancyOptimizer) else state.opt
    held = {id(param) for group in own.param_groups for param in group["params"]}
    return {i: own.state.get(param, {}) for i, param in enumerate(state.params) if id(param) in held}


def state_sections(state: TrainState) -> dict[str, Section]:
    """This rank's parts of all tensors of a checkpoint, by section and name. No rank waits for another.

    An EMA has the entries that are not averaged too, so that it is a whole state dict.
    """
    model = {name: Part.of(value) for name, value in state.model.state_dict().items()}
    averages = {f"ema_{rate}": (average, None) for rate, average in state.ema.items()}
    dtype = DTYPES[state.config.train.phema_dtype]
    averages |= {f"phema_{width}": (average, dtype) for width, average in state.phema.averages.items()}
    sections = {
        name: model | {key: Part.of(value, dtype) for key, value in zip(state.names, average, strict=True)}
        for name, (average, dtype) in averages.items()
    }
    optimizer = {
        f"state.{i}.{key}": Part.of(value)
        for i, entry in _entries(state).items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    for width, average in state.phema.averages.items():
        optimizer |= {f"phema.{width}.{i}": Part.of(value) for i, value in enumerate(average)}
    return {"model": model} | sections | {"optimizer": optimizer}


def small_state(state: TrainState) -> bytes:
    """What `state.pt` holds: a whole checkpoint's `opt` without its tensors. All ranks call it together."""
    numbers = {
        i: {key: value for key, value in entry.items() if not isinstance(value, torch.Tensor)}
        for i, entry in _entries(state).items()
    }
    numbers = {i: entry for found in dist_util.gather_objects(numbers) for i, entry in found.items()}
    groups = torch.optim.Optimizer.state_dict(state.opt)["param_groups"]
    held = {"optimizer": {"state": dict(sorted(numbers.items())), "param_groups": groups}}
    held |= {"phema": {width: [] for width in state.phema.averages}} | state.counters()
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------- resuming


def load_sharded(state: TrainState, path: Path) -> None:
    """Load a sharded checkpoint into a run with any number of ranks and kind of sharding. All ranks call it together.

    Each rank reads its own part. Before anything is overwritten, all files are compared with the manifest, each by one
    of the ranks.

    :param path: the folder of the checkpoint.
    :raises UserError: on all ranks, for files that are missing or damaged and for a checkpoint of another model.
    """
    with dist_util.failing_together():
        emas = {f"ema_{rate}": average for rate, average in state.ema.items()}
        names = ["model", *emas, "optimizer"]
        files = section_parts(path, {"", *names})
        shared = list(files)[dist_util.get_rank() :: dist_util.get_world_size()]
        check_parts(path, {name: files[name] for name in shared})
        contents = {name: read_contents(path / name) for name in names}
        small = dist_util.load_state_dict(str(path / STATE_NAME))
        keys = {"optimizer", "scaler", "schedule_sampler", "guardian", "phema", "step", "rollbacks", "train_seconds"}
        if not isinstance(small, dict) or not small.keys() >= keys or "state" not in small["optimizer"]:
            raise UserError(f"{path / STATE_NAME} is no training state of this code: restore it")
        state.phema.check_widths(small["phema"])
        entries = _new_entries(state, contents["optimizer"], small["optimizer"]["state"])
        targets = {"model": state.model.state_dict()}
        targets |= {name: dict(zip(state.names, average, strict=True)) for name, average in emas.items()}
        targets["optimizer"] = {
            f"state.{i}.{key}": value
            for i, entry in entries.items()
            for key, value in entry.items()
            if isinstance(value, torch.Tensor)
        }
        for width, average in state.phema.averages.items():
            targets["optimizer"] |= {f"phema.{width}.{i}": value for i, value in enumerate(average)}
        sections = {name: {key: Part.of(value) for key, value in found.items()} for name, found in targets.items()}
        for name, section in sections.items():
            _check_fit(path / name, contents[name], section)
    for name, section in sections.items():
        own_part = {key for key, value in targets[name].items() if isinstance(value, DTensor)}
        if name == "optimizer" and isinstance(state.opt, ZeroRedundancyOptimizer):
            own_part = section.keys()
        _read(path / name, contents[name], section, own_part)
    state.opt.load_state_dict({"state": entries, "param_groups": small["optimizer"]["param_groups"]})
    state.load_counters(small)


def _read(path: Path, contents: Contents, section: Section, own_part: Collection[str]) -> None:
    """Read a section. What every rank holds whole is read by the first rank of each node, which gives it to the others.

    :param own_part: names of the tensors of which each rank reads what it holds.
    """
    node = dist_util.node_group()
    first = dist_util.get_rank() == node.ranks[0]
    with dist_util.failing_together():
        read_parts(path, contents, {key: part for key, part in section.items() if first or key in own_part})
    for key, part in section.items():
        if key not in own_part and len(node.ranks) > 1:
            group = node.hosts if part.local.device.type == "cpu" else node.devices
            torch.distributed.broadcast(part.local, node.ranks[0], group=group)


def _new_entries(state: TrainState, contents: Contents, numbers: dict[int, dict[str, Any]]) -> dict[int, dict]:
    """Memory for the optimizer's state of the parameters that this rank updates, sharded like them, and its numbers."""
    entries = {i: dict(numbers.get(i, {})) for i in _entries(state)}
    for name, saved in contents.tensors.items():
        found = re.fullmatch(r"state\.(\d+)\.(\w+)", name)
        if not found or int(found[1]) not in entries:
            continue
        param, dtype = state.params[int(found[1])].detach(), saved.properties.dtype
        if saved.size == param.shape:
            entries[int(found[1])][found[2]] = torch.empty_like(param, dtype=dtype)
        elif not saved.size:
            entries[int(found[1])][found[2]] = torch.empty((), dtype=dtype)  # optimizers count their steps on the CPU
        else:
            raise UserError(
                f"the optimizer's {name} has the shape {tuple(saved.size)}, but must have {tuple(param.shape)}"
            )
    return {i: entry for i, entry in entries.items() if entry}


def _check_fit(path: Path, contents: Contents, section: Section) -> None:
    for name, part in section.items():
        saved = contents.tensors.get(name)
        if saved is None or saved.size != part.size:
            found = "is not there" if saved is None else f"has the shape {tuple(saved.size)} there"
            raise UserError(
                f"{path} is of another model than the flags describe ({name} of shape {tuple(part.size)} {found}): "
                "repeat --model, --num_classes and --decode_layer, or start at step 0 from its weights in another "
                "--log_dir with --resume_checkpoint"
            )
