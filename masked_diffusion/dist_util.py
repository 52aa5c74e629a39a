"""Distributed training: process groups of torchrun, torch.distributed.launch or mpiexec, on GPUs (nccl) or CPUs (gloo).

Without a launcher, all functions work for a single process without a process group.
"""

import argparse
import os
import re
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr
from .utils.tensor_files import load_state_dict  # noqa: F401 (ADM's name)

T = TypeVar("T")
__getattr__ = module_getattr(__name__)
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")  # Open MPI, MPICH and Intel MPI, PMIx launchers
GPUS_PER_NODE = 8  # ADM's constant, for its users; nothing here uses it, since the launcher assigns the GPUs

HOST_TIMEOUT = timedelta(days=1)  # the gloo group of the hosts waits as long; it notices a dead rank at once

LOST_PEER = re.compile("closed by peer|reset by peer|broken pipe|socket closed|remote process exited", re.IGNORECASE)

_host_group: dist.ProcessGroup | None = None  # see `_hosts`
_node_group: "RankGroup | None" = None  # see `node_group`
_counts: Counter[str] = Counter()  # of `add_to_count` without a process group


def setup_dist() -> None:
    """Join the launcher's process group; without a launcher, create a group of one process.

    The published scripts call `torch.distributed` afterwards, which always needs a group. See `join_process_group`.
    """
    join_process_group()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def setup_dist_multinode(args: argparse.Namespace) -> None:
    """`setup_dist`, as the scripts of MDT call it.

    :param args: parsed flags, on which `rank`, `world_size`, `local_rank`, `gpu` and `distributed` (True) are set.
    """
    setup_dist()
    args.rank, args.world_size, args.distributed = get_rank(), get_world_size(), True
    args.local_rank = args.gpu = get_local_rank()


def join_process_group() -> None:
    """Join the process group of torchrun, torch.distributed.launch or mpiexec; without a launcher, do nothing.

    :raises UserError: if there are more processes than GPUs on a node, or the processes do not connect after a restart.
    """
    if dist.is_initialized():
        return
    if "WORLD_SIZE" not in os.environ and any(name in os.environ for name in MPI_SIZES):
        _describe_mpi_job()
    if "WORLD_SIZE" not in os.environ:
        return
    if not torch.cuda.is_available():
        _join("gloo")
        return
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"there is no GPU for local rank {local_rank}, since this node has only {num_gpus}: "
            f"start at most {num_gpus} processes per node (torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    _join("nccl", device_id=dev())


def _join(backend: str, **options: Any) -> None:
    try:
        dist.init_process_group(backend, **options)
    except RuntimeError as error:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or SHARED_STORE in os.environ:
            raise
        # After a restart torchrun uses the same store again, and gloo finds the addresses of the old processes there.
        raise UserError(
            f"the processes cannot connect after a restart: set {SHARED_STORE}=1 before starting torchrun"
        ) from error
    _hosts()  # created while all ranks are alive: the others notice at once when one of them dies later


def _describe_mpi_job() -> None:
    """Set the environment variables that torch.distributed reads, from the MPI job."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    address = None
    if world.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = socket.gethostname(), probe.getsockname()[1]
    host, port = world.bcast(address)
    same_host = world.Split_type(MPI.COMM_TYPE_SHARED)
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(same_host.rank),
        "MASTER_ADDR": "127.0.0.1" if same_host.size == world.size else host,
        "MASTER_PORT": str(port),
    }


def cleanup() -> None:
    """Leave the process group."""
    global _host_group, _node_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _host_group = _node_group = None


def dev() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def get_rank() -> int:
    """The number of this process in the job; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes in the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is rank 0."""
    return get_rank() == 0


def is_dist_avail_and_initialized() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def synchronize() -> None:
    """MDT's name for `barrier`."""
    barrier()


def get_local_rank() -> int:
    """The number of this process on its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier() -> None:
    """Wait until all ranks have called this."""
    if dist.is_initialized():
        dist.barrier()


def host_barrier(while_waiting: Callable[[], object] | None = None) -> None:
    """Wait until all ranks have called this, for hours if necessary: over gloo, without a GPU collective's time-out.

    :param while_waiting: called several times a second while this rank waits, for example to show progress.
    :raises RuntimeError: when another rank has died.
    """
    if not dist.is_initialized():
        return
    work = dist.barrier(group=_hosts(), async_op=True)
    while while_waiting and not work.is_completed():
        while_waiting()
        time.sleep(0.1)
    work.wait()


def _hosts() -> dist.ProcessGroup:
    """The gloo group of all ranks, whatever the backend of the default group. The first call must be on all ranks."""
    global _host_group
    if _host_group is None:
        _host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return _host_group


def new_host_group() -> dist.ProcessGroup | None:
    """Another gloo group of all ranks, for a thread of its own. All ranks call it together; None without a group."""
    return dist.new_group(backend="gloo", timeout=HOST_TIMEOUT) if dist.is_initialized() else None


class RankGroup(NamedTuple):
    """Some ranks of the job, and how they communicate. Without a process group: rank 0 alone.

    :param ranks: in ascending order.
    :param hosts: process group of gloo, without a GPU collective's time-out.
    :param devices: process group of the backend of the devices; None: the default group.
    """

    ranks: list[int]
    hosts: dist.ProcessGroup | None
    devices: dist.ProcessGroup | None


def all_ranks() -> RankGroup:
    """All ranks of the job."""
    return RankGroup(list(range(get_world_size())), _hosts() if dist.is_initialized() else None, None)


def ranks_by_node() -> list[list[int]]:
    """The ranks of each node. All ranks call it together."""
    nodes = defaultdict(list)
    for rank, node in enumerate(gather_objects(os.environ.get("GROUP_RANK", socket.gethostname()))):
        nodes[node].append(rank)
    return list(nodes.values())


def node_group() -> RankGroup:
    """The ranks of this process's node. The first call must be on all ranks."""
    global _node_group
    if _node_group is None:
        nodes = ranks_by_node()
        if len(nodes) == 1:
            _node_group = all_ranks()
        else:
            hosts, _ = dist.new_subgroups_by_enumeration(nodes, backend="gloo", timeout=HOST_TIMEOUT)
            devices, _ = dist.new_subgroups_by_enumeration(nodes)
            _node_group = RankGroup(next(ranks for ranks in nodes if get_rank() in ranks), hosts, devices)
    return _node_group


def add_to_count(key: str, amount: int) -> int:
    """Add to a counter that all ranks share and that starts at 0, and return the sum. No rank waits for another."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store().add(key, amount)
    _counts[key] += amount
    return _counts[key]


@contextmanager
def main_first() -> Iterator[None]:
    """Run a `with` block on rank 0 first, for example to download a file that the other ranks find in the cache.

    :raises UserError: on all ranks, if rank 0 raised one.
    :raises RuntimeError: on the other ranks, if rank 0 raised another error.
    """
    if not is_main():
        _raise_failure(broadcast_object(None))
    try:
        yield
    except BaseException as error:
        if is_main():
            broadcast_object(_describe_failure(error))
        raise
    if is_main():
        broadcast_object(None)


def run_on_main(function: Callable[..., T], *args: Any) -> T:
    """Run a function on rank 0 and return its result on all ranks, which all call this.

    :raises UserError: on all ranks, if rank 0 raised one.
    :raises RuntimeError: on the other ranks, if rank 0 raised another error.
    """
    failure = result = None
    if is_main():
        try:
            result = function(*args)
        except BaseException as error:
            broadcast_object((_describe_failure(error), None))
            raise
    failure, result = broadcast_object((failure, result))
    _raise_failure(failure)
    return result


@contextmanager
def failing_together() -> Iterator[None]:
    """A block that fails on all ranks when it fails on one. All ranks enter it together.

    :raises UserError: on all ranks, if one raised it.
    :raises RuntimeError: on the other ranks, if one raised another error.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failures = gather_objects(error and _describe_failure(error))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        _raise_failure(failure, rank)


def _describe_failure(error: BaseException) -> tuple[bool, str]:
    return isinstance(error, UserError), str(error) or type(error).__name__


def _raise_failure(failure: tuple[bool, str] | None, rank: int = 0) -> None:
    if failure is not None:
        is_user_error, message = failure
        error = UserError(message) if is_user_error else RuntimeError(f"rank {rank} failed: {message}")
        error.is_repeated = True
        raise error


def is_repeated(error: BaseException) -> bool:
    """Whether another rank has raised the error first, and this one only repeats it."""
    return getattr(error, "is_repeated", False)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only means that another rank has ended, which waiting for it has shown."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and bool(LOST_PEER.search(str(error)))


def is_first(key: str) -> bool:
    """Whether this is the first process of the job that calls this with `key`; True only on rank 0 without a group."""
    if not dist.is_initialized():
        ranks = (os.environ.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"))
        return next((int(rank) for rank in ranks if rank), 0) == 0
    try:
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:  # the process with the store has ended
        return is_main()


def is_first_of_node(key: str) -> bool:
    """Whether this is the first process of its node that calls this with `key`; local rank 0 without a group."""
    if not dist.is_initialized():
        return get_local_rank() == 0
    return is_first(f"{key} on node {os.environ.get('GROUP_RANK', 0)}")


def end_restarts() -> None:
    """Stop torchrun instead of letting it restart the job, for an error that every restart would repeat.

    Only one process per node may call it: a second signal would interrupt torchrun's clean-up.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if left <= 0:
        return
    with suppress(OSError):  # no /proc on this system
        if b"torch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            print("torchrun is told to end the job: its messages below can be ignored", file=sys.stderr, flush=True)
            os.kill(os.getppid(), signal.SIGTERM)


def sync_params(params: Iterable[Tensor]) -> None:
    """Replace the values of the tensors by those of rank 0."""
    if dist.is_initialized():
        for param in params:
            dist.broadcast(param.data, 0)


def all_gather_rows(rows: Tensor) -> Tensor:
    """(N, ...) on each rank -> (N * world_size, ...) on all ranks, in the order of the ranks; N is the same on all."""
    if not dist.is_initialized():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, on all ranks. It overwrites `values`."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def broadcast_object(value: Any) -> Any:
    """The value of rank 0, on all ranks; any Python object."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0, group=_hosts())  # rank 0 may be late: a download, a slow disk
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks, on all ranks; any Python objects."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value, group=_hosts())  # a rank may be late: a slow disk
    return gathered


def any_rank(flag: bool) -> bool:
    """Whether the flag is True on at least one rank; all ranks call this and get the same answer.

    The ranks communicate over gloo, so that none has to wait for its GPU.
    """
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_hosts())
    return bool(value)
