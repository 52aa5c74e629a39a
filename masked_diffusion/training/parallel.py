"""Parallel training: data-parallel, with a sharded optimizer (ZeRO-1), or with everything sharded (FSDP).

With any kind of sharding, checkpoints hold unsharded tensors in the layout of a run on one process.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .. import dist_util
from ..config import SHARDS
from ..utils.errors import UserError
from .objective import TwoPassObjective
from .optim import create_optimizer


def parallelize(objective: TwoPassObjective, shard: str) -> torch.nn.Module:
    """The module to call in training; `fsdp` replaces the parameters of `objective.model` by shards, in place.

    :param shard: one of `config.SHARDS`.
    :raises UserError: for any other value, and for `fsdp` outside a process group.
    """
    if shard not in SHARDS:
        raise UserError(f"shard is {shard!r}: choose one of {', '.join(SHARDS)}")
    if shard == "fsdp":
        return _fully_shard(objective)
    if dist_util.get_world_size() == 1:
        return objective
    ids = [dist_util.dev()] if dist_util.dev().type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)


def _fully_shard(objective: TwoPassObjective) -> TwoPassObjective:
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UserError("--shard fsdp needs a process group: start the script with torchrun")
    mesh = torch.distributed.init_device_mesh(dist_util.dev().type, (dist_util.get_world_size(),))
    for block in objective.model.all_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(objective.model, mesh=mesh)
    return objective


def make_optimizer(
    name: str,
    params: Sequence[torch.nn.Parameter],
    lr: float,
    weight_decay: float,
    shard: str,
    compile: bool = False,
) -> torch.optim.Optimizer:
    """`optim.create_optimizer`, where `zero1` shards the optimizer state over the ranks."""
    if shard == "zero1" and dist_util.get_world_size() > 1:
        # ZeroRedundancyOptimizer calls optimizer_class(params, **defaults).
        return ZeroRedundancyOptimizer(
            params, optimizer_class=partial(create_optimizer, name, compile=compile), lr=lr, weight_decay=weight_decay
        )
    return create_optimizer(name, params, lr, weight_decay, compile)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered from its shards. All ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full tensor, sharded in the same way as `param`."""
    if isinstance(param, DTensor):
        return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements)
    return tensor


def copy_all(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    """Overwrite each target with its source, which is sharded in the same way."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with unsharded tensors. With ZeRO-1 rank 0 alone gets it, the other ranks get {}.

    All ranks call it together.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
        return optimizer.state_dict() if dist_util.is_main() else {}
    state = optimizer.state_dict()
    return state | {
        "state": {
            index: {
                key: gather_full(value) if isinstance(value, torch.Tensor) else value for key, value in entry.items()
            }
            for index, entry in state["state"].items()
        }
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], params: Sequence[torch.nn.Parameter]
) -> None:
    """Load a state dict of unsharded tensors into an optimizer with any kind of sharding."""
    entries = {
        index: {
            key: shard_like(value, params[index]) if isinstance(value, torch.Tensor) and value.ndim else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": entries})
