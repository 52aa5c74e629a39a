"""The state of a run in sharded checkpoints: what each rank writes, and how it finds its part again."""

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from .. import dist_util
from ..utils.errors import UserError
from ..utils.tensor_files import load_state_dict
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


def _optimizer_tensors(
    entries: dict[int, dict[str, Any]], averages: dict[str, list[torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The tensors of the section `optimizer` by their names in it."""
    named = {f"state.{i}.{key}": value for i, entry in entries.items() for key, value in entry.items()}
    named |= {f"phema.{width}.{i}": value for width, found in averages.items() for i, value in enumerate(found)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


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
    optimizer = _optimizer_tensors(_entries(state), state.phema.averages)
    return {"model": model} | sections | {"optimizer": {name: Part.of(value) for name, value in optimizer.items()}}


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
    emas = {f"ema_{rate}": dict(zip(state.names, average, strict=True)) for rate, average in state.ema.items()}
    targets = {"model": state.model.state_dict()} | emas
    with dist_util.failing_together():
        files = section_parts(path, {"", "optimizer", *targets})
        own_share = list(files)[dist_util.get_rank() :: dist_util.get_world_size()]
        check_parts(path, {name: files[name] for name in own_share})
        contents = {name: read_contents(path / name) for name in (*targets, "optimizer")}
        small = load_state_dict(str(path / STATE_NAME))
        keys = {"optimizer", "scaler", "schedule_sampler", "guardian", "phema", "step", "rollbacks", "train_seconds"}
        if not isinstance(small, dict) or not small.keys() >= keys or "state" not in small["optimizer"]:
            raise UserError(f"{path / STATE_NAME} is no training state of this code: restore it")
        state.phema.check_widths(small["phema"])
        for name, tensors in targets.items():
            _check_fit(path / name, contents[name], tensors)
        entries = _new_entries(state, contents["optimizer"], small["optimizer"]["state"])
        targets["optimizer"] = _optimizer_tensors(entries, state.phema.averages)
        _check_fit(path / "optimizer", contents["optimizer"], targets["optimizer"])
    for name, tensors in targets.items():
        differs = name == "optimizer" and isinstance(state.opt, ZeroRedundancyOptimizer)
        _read(path / name, contents[name], tensors, differs)
    state.opt.load_state_dict({"state": entries, "param_groups": small["optimizer"]["param_groups"]})
    state.load_counters(small)


def _read(path: Path, contents: Contents, tensors: dict[str, torch.Tensor], differs: bool) -> None:
    """Read a section. What every rank holds whole is read by the first rank of each node, which gives it to the others.

    :param differs: whether the ranks hold different tensors.
    """
    node = dist_util.node_group()
    first = dist_util.get_rank() == node.ranks[0]
    parts = {key: Part.of(value) for key, value in tensors.items()}
    received = {key for key, value in tensors.items() if not differs and not isinstance(value, DTensor)}
    with dist_util.failing_together():
        read_parts(path, contents, {key: part for key, part in parts.items() if first or key not in received})
    for key in tensors if len(node.ranks) > 1 else ():
        if key in received:
            local = parts[key].local
            group = node.hosts if local.device.type == "cpu" else node.devices
            torch.distributed.broadcast(local, node.ranks[0], group=group)


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


def _check_fit(path: Path, contents: Contents, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        saved = contents.tensors.get(name)
        if saved is None or saved.size != tensor.shape:
            found = "is not there" if saved is None else f"has the shape {tuple(saved.size)} there"
            raise UserError(
                f"{path} is of another model than the flags describe ({name} of shape {tuple(tensor.shape)} {found}): "
                "repeat --model, --num_classes, --decode_layer and --qk_norm, or start at step 0 from its weights in "
                "another --log_dir with --resume_checkpoint"
            )
