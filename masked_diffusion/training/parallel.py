"""How the ranks share a model: data-parallel, with the optimizer sharded (ZeRO-1), or with everything sharded (FSDP).

Whatever the sharding, a checkpoint holds whole tensors in the layout of a run on one process.
"""

from functools import partial

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from .. import dist_util
from ..config import SHARDS
from ..utils.errors import UserError
from .optim import create_optimizer


def parallelize(objective, shard):
    """The module to call in training; `fsdp` replaces the parameters of `objective.model` by shards in place.

    :raises UserError: for `fsdp` outside a process group.
    """
    if shard not in SHARDS:
        raise UserError(f"shard is {shard!r}: choose one of {', '.join(SHARDS)}")
    if shard == "fsdp":
        return _fully_shard(objective)
    if dist_util.get_world_size() == 1:
        return objective
    ids = [dist_util.dev()] if dist_util.dev().type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)


def _fully_shard(objective):
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        raise UserError("--shard fsdp needs a process group: start the script with torchrun")
    mesh = torch.distributed.init_device_mesh(dist_util.dev().type, (dist_util.get_world_size(),))
    for block in objective.model.all_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(objective.model, mesh=mesh)
    return objective


def make_optimizer(name, params, lr, weight_decay, shard):
    """See `optim.create_optimizer`; with `zero1` each rank keeps the state of its share of the parameters."""
    if shard == "zero1" and dist_util.get_world_size() > 1:
        # It calls optimizer_class(params, **defaults).
        return ZeroRedundancyOptimizer(
            params, optimizer_class=partial(create_optimizer, name), lr=lr, weight_decay=weight_decay
        )
    return create_optimizer(name, params, lr, weight_decay)


def gather_full(tensor):
    """A tensor put together from its shards. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor, param):
    """A whole tensor cut as `param` is."""
    if isinstance(param, DTensor):
        return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements)
    return tensor


def copy_all(targets, sources):
    """Overwrite tensors by others that are cut alike."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def optimizer_state(optimizer):
    """The optimizer's state dict with whole tensors, on rank 0; other ranks get {}. All ranks call it."""
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


def load_optimizer_state(optimizer, state, params):
    """Give the optimizer a state dict of whole tensors, whatever its sharding."""
    entries = {
        index: {
            key: shard_like(value, params[index]) if isinstance(value, torch.Tensor) and value.ndim else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": entries})
