"""Parallel training: data-parallel, with a sharded optimizer (ZeRO-1), or with everything sharded (FSDP, HSDP).

With any kind of sharding, checkpoints hold unsharded tensors in the layout of a run on one process. They are saved and
loaded tensor by tensor: beside its own shards, no rank has more than one tensor in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .. import dist_util
from ..config import SHARDS
from ..utils.errors import UserError
from ..weights.torch_file import LateTensor, late_tensors
from .objective import TwoPassObjective
from .optim import create_optimizer
from .receive import SentTensor, outline_of

# ---------------------------------------------------------------- the module to train


def shard_model(model: torch.nn.Module, shard: str) -> None:
    """With `fsdp` and `hsdp`, replace the parameters by this rank's shards, in place. Other kinds leave them whole.

    :param model: may be on the meta device; see `load_model_state`.
    :param shard: one of `config.SHARDS`.
    :raises UserError: for any other value; for `fsdp` and `hsdp` outside a process group; and for `hsdp` when the nodes
        have different numbers of ranks.
    """
    if shard not in SHARDS:
        raise UserError(f"shard is {shard!r}: choose one of {', '.join(SHARDS)}")
    if shard in ("none", "zero1"):
        return
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise UserError(f"--shard {shard} needs a process group: start the script with torchrun")
    layout = {"mesh": dist_util.all_ranks().ranks, "mesh_dim_names": ("shard",)}
    if shard == "hsdp":
        layout = {"mesh": _nodes(), "mesh_dim_names": ("replicate", "shard")}
    mesh = DeviceMesh(dist_util.dev().type, **layout)
    for block in model.all_blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _nodes() -> list[list[int]]:
    nodes = dist_util.ranks_by_node()
    if len(set(map(len, nodes))) > 1:
        counts = ", ".join(str(len(ranks)) for ranks in nodes)
        raise UserError(
            f"--shard hsdp needs the same number of ranks on every node, but they have {counts}: start as many on each "
            "(torchrun --nproc_per_node), or choose --shard fsdp"
        )
    return nodes


def parallelize(objective: TwoPassObjective, shard: str) -> torch.nn.Module:
    """The module to call in training. Call it after `shard_model`, and when the parameters have their values."""
    if shard in ("fsdp", "hsdp") or dist_util.get_world_size() == 1:
        return objective
    ids = [dist_util.dev()] if dist_util.dev().type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)


@contextmanager
def accumulating(module: torch.nn.Module, last: bool) -> Iterator[None]:
    """A forward and backward pass of gradient accumulation, where the ranks exchange gradients in the last one only.

    But with `fsdp` they do in every pass: else each would hold the gradients of the whole model, as much memory as
    sharding them saves. With `hsdp` the ranks of a node do, and the nodes exchange their sums in the last pass.

    :param module: from `parallelize`.
    :param last: whether this is the last pass of the step.
    """
    if isinstance(module, DistributedDataParallel):
        with nullcontext() if last else module.no_sync():
            yield
        return
    if hasattr(module.model, "set_requires_all_reduce"):  # of a model that `fully_shard` has changed
        module.model.set_requires_all_reduce(last)
    yield


def drop_gathered(model: torch.nn.Module) -> None:
    """With `fsdp` and `hsdp`, forget the full parameters that a forward pass without a backward pass has left.

    They are those outside of the blocks. The next pass would take them, although the shards may have changed since.
    """
    if hasattr(model, "reshard"):
        model.reshard()


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


# ---------------------------------------------------------------- from shards to whole tensors


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered from its shards. All ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(eq=False)
class SpreadTensor(LateTensor):
    """A tensor that the ranks gather to the CPU of rank 0 when it is written; see `run_with_gathering`."""


def gather_late(tensor: torch.Tensor) -> torch.Tensor | SpreadTensor:
    """The tensor itself, or for a sharded one what gathers it when it is written."""
    if not isinstance(tensor, DTensor):
        return tensor
    return SpreadTensor(tensor.shape, tensor.dtype, partial(_gather_shards, tensor.detach()))


def _gather_shards(tensor: DTensor) -> torch.Tensor:
    _call_other_ranks()
    return tensor.full_tensor().cpu() if dist_util.is_main() else tensor.full_tensor()


def _gather_from(owner: int, shape: torch.Size, dtype: torch.dtype, own: torch.Tensor | None) -> torch.Tensor | None:
    """On rank 0 the tensor of a rank, on its CPU. `own` is that tensor on its rank, None on the others."""
    _call_other_ranks()
    if owner == 0:
        return own
    if dist_util.get_rank() == owner:
        dist.send(own.contiguous(), 0)
    if not dist_util.is_main():
        return None
    whole = torch.empty(shape, dtype=dtype, device=dist_util.dev())
    dist.recv(whole, owner)
    return whole.cpu()


def _call_other_ranks() -> None:
    """Rank 0 tells the others, which wait in `run_with_gathering`, that it needs their parts of the next tensor."""
    if dist_util.is_main():
        dist_util.broadcast_object(True)


def run_with_gathering(function: Callable[..., Any], states: Iterable[Any], *args: Any) -> None:
    """Run on rank 0 a function that writes `states`; the others take part in gathering. All ranks call it together.

    They wait on their hosts, so that a slow disk of rank 0 does not run into a GPU collective's time-out.

    :param states: with the `SpreadTensor`s that the function makes, in this order, or until it fails.
    :raises UserError: and RuntimeError, as `dist_util.run_on_main`.
    """

    def run() -> None:
        try:
            function(*args)
        finally:
            dist_util.broadcast_object(False)

    if not dist_util.is_main():
        spread = (late for late in chain.from_iterable(map(late_tensors, states)) if isinstance(late, SpreadTensor))
        while dist_util.broadcast_object(None):
            next(spread).make()
    dist_util.run_on_main(run)


def optimizer_state(optimizer: torch.optim.Optimizer, params: Sequence[torch.nn.Parameter]) -> dict[str, Any]:
    """The optimizer's state dict, whose sharded tensors are `SpreadTensor`s. All ranks call it together.

    :param params: those of the optimizer, in its order.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        # Its own state dict would need `consolidate_state_dict`, which sends all of it through the GPUs at once.
        groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
        return {"state": _zero1_entries(optimizer, params), "param_groups": groups}
    state = optimizer.state_dict()
    entries = {
        index: {key: gather_late(value) if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return state | {"state": entries}


def _zero1_entries(optimizer: ZeroRedundancyOptimizer, params: Sequence[torch.nn.Parameter]) -> dict[int, dict]:
    """The entries of all parameters, each of which is on the rank that updates the parameter."""
    local = optimizer.optim.state
    own = {index: local[param] for index, param in enumerate(params) if param in local}
    outlines = dist_util.gather_objects(outline_of(own))

    def spread(owner: int, index: int, key: str, value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.ndim):
            return value
        held = own[index][key] if owner == dist_util.get_rank() else None
        return SpreadTensor(value.shape, value.dtype, partial(_gather_from, owner, value.shape, value.dtype, held))

    entries = {
        index: {key: spread(owner, index, key, value) for key, value in entry.items()}
        for owner, outline in enumerate(outlines)
        for index, entry in outline.items()
    }
    return dict(sorted(entries.items()))


# ---------------------------------------------------------------- from whole tensors to shards


def _own_part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of this rank's part of a full tensor, sharded in the same way as `like`. Nothing is communicated."""
    if isinstance(like, DTensor):
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                chunks = whole.chunk(like.device_mesh.size(dim), placement.dim)
                rank = like.device_mesh.get_local_rank(dim)
                whole = chunks[rank] if rank < len(chunks) else whole.narrow(placement.dim, 0, 0)
    return whole


def shard_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full tensor in memory of its own, on the device of `like` and sharded in the same way."""
    part = _own_part(whole, like).to(like.device, copy=True, memory_format=torch.contiguous_format)
    if not isinstance(like, DTensor):
        return part
    sizes = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **sizes)


def make_empty(model: torch.nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory without values; any other one stays as it is."""
    if any(param.is_meta for param in model.parameters()):
        model.to_empty(device=device)


@torch.no_grad()
def fill(target: torch.Tensor, source: torch.Tensor | SentTensor) -> None:
    """Overwrite a tensor of any kind of sharding with a full one. For a `SentTensor`, all ranks call it together."""
    whole = source.receive(target.device) if isinstance(source, SentTensor) else source
    local = target.to_local() if isinstance(target, DTensor) else target
    local.copy_(_own_part(whole, target))


def load_model_state(model: torch.nn.Module, state: dict[str, SentTensor], device: torch.device) -> None:
    """Overwrite the parameters and buffers of a model with full ones. All ranks call it together.

    :param model: sharded or not; from the meta device it is moved to `device`.
    """
    make_empty(model, device)
    for name, value in model.state_dict().items():
        fill(value, state[name])


def copy_all(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    """Overwrite each target with its source, which is sharded in the same way."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], params: Sequence[torch.nn.Parameter]
) -> None:
    """Load a state dict of full `SentTensor`s into an optimizer with any kind of sharding. All ranks call it together.

    :param params: those of the optimizer, in its order.
    """
    local = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    updated = {id(param) for group in local.param_groups for param in group["params"]}
    entries = {}
    for index, entry in state["state"].items():
        param, own = params[index], {}
        for key, value in entry.items():
            whole = value.receive(param.device) if isinstance(value, SentTensor) else value
            if id(param) in updated:
                own[key] = shard_like(whole, param) if isinstance(value, SentTensor) else whole
            del whole
        if own:
            entries[index] = own
    optimizer.load_state_dict(state | {"state": entries})
