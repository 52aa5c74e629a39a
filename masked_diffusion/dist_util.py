"""Process groups of torchrun, torch.distributed.launch or mpiexec, on GPUs (nccl) or CPUs (gloo); or none at all."""

import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import blobfile as bf
import torch
import torch.distributed as dist

from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr

T = TypeVar("T")
__getattr__ = module_getattr(__name__)
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")  # Open MPI, MPICH and Intel MPI, PMIx launchers


HOST_TIMEOUT = timedelta(days=1)  # of waits on the hosts; ranks that die are noticed at once
GPUS_PER_NODE = 8  # of ADM's clusters; nothing here depends on it, since a launcher says which GPU a process takes


def setup_dist():
    """Join the launcher's process group as `join_process_group` does; alone, make a group of one process.

    Published scripts call `torch.distributed` next, which needs a group in any case.
    """
    join_process_group()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def setup_dist_multinode(args):
    """`setup_dist` as MDT's scripts call it.

    :param args: parsed flags; its `rank`, `world_size`, `local_rank` and `gpu` are set, and `distributed` to True.
    """
    setup_dist()
    args.rank, args.world_size, args.distributed = get_rank(), get_world_size(), True
    args.local_rank = args.gpu = get_local_rank()


def join_process_group():
    """Join the process group of torchrun, torch.distributed.launch or mpiexec; alone, do nothing.

    :raises UserError: when a launcher starts more processes on a node than it has GPUs.
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
            f"local rank {local_rank} has no GPU of its own: this node shows {num_gpus}; "
            f"start at most {num_gpus} processes per node (torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    _join("nccl", device_id=dev())


def _join(backend, **options):
    try:
        dist.init_process_group(backend, **options)
    except RuntimeError as error:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or SHARED_STORE in os.environ:
            raise
        # torchrun reuses its store after a restart, in which gloo then finds the addresses of the dead processes.
        raise UserError(
            f"the processes do not meet after a restart: export {SHARED_STORE}=1 before torchrun"
        ) from error
    _hosts()  # now, while all ranks are there: whoever dies later is missed at once, and not waited for


def _describe_mpi_job():
    """Put an MPI job into the environment variables that torch reads."""
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


def cleanup():
    global _host_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _host_group = None


def dev():
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return get_rank() == 0


def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def synchronize():
    """Wait for all ranks: MDT's name of `barrier`."""
    barrier()


def get_local_rank() -> int:
    """The number of this process on its node, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def barrier():
    if dist.is_initialized():
        dist.barrier()


def host_barrier(while_waiting: Callable[[], object] | None = None) -> None:
    """Wait for all ranks on their hosts, for hours where it must be: no GPU's time-out runs. A dead rank is an error.

    :param while_waiting: called now and then until all are there; to show progress, say.
    """
    if not dist.is_initialized():
        return
    work = dist.barrier(group=_hosts(), async_op=True)
    while while_waiting and not work.is_completed():
        while_waiting()
        time.sleep(0.1)
    work.wait()


def _hosts():
    """The group in which ranks meet on their hosts, whatever the backend of the default group. All ranks ask first."""
    global _host_group
    if _host_group is None:
        _host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return _host_group


def add_to_count(key: str, amount: int) -> int:
    """Add to a number that all ranks share, 0 at first, and return what it is then. No rank waits for another."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store().add(key, amount)
    _counts[key] += amount
    return _counts[key]


_counts = Counter()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others: for downloads that the others then find in the cache.

    :raises UserError: on the other ranks too, where rank 0 failed with one.
    """
    if not is_main():
        _raise_main_failure(broadcast_object(None))
    try:
        yield
    except BaseException as error:
        if is_main():
            broadcast_object(_describe_failure(error))
        raise
    if is_main():
        broadcast_object(None)


def run_on_main(function: Callable[..., T], *args: Any) -> T:
    """Rank 0's result of a function, on every rank. All ranks call it; where rank 0 fails, none waits for it.

    :raises UserError: on every rank, where rank 0 failed with one.
    """
    failure = result = None
    if is_main():
        try:
            result = function(*args)
        except BaseException as error:
            broadcast_object((_describe_failure(error), None))
            raise
    failure, result = broadcast_object((failure, result))
    _raise_main_failure(failure)
    return result


def _describe_failure(error: BaseException) -> tuple[bool, str]:
    return isinstance(error, UserError), str(error) or type(error).__name__


def _raise_main_failure(failure: tuple[bool, str] | None) -> None:
    if failure is not None:
        is_user_error, message = failure
        raise UserError(message) if is_user_error else RuntimeError(f"rank 0 failed: {message}")


def is_first(key: str) -> bool:
    """Whether this is the first process of the job to ask with this key. Before the ranks have met, rank 0 is."""
    if not dist.is_initialized():
        ranks = (os.environ.get(name) for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"))
        return next((int(rank) for rank in ranks if rank), 0) == 0
    try:
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:  # the process that held the store has ended
        return is_main()


def is_first_of_node(key: str) -> bool:
    """Whether this is the first process of its node to ask with this key; local rank 0, before the ranks have met."""
    if not dist.is_initialized():
        return get_local_rank() == 0
    return is_first(f"{key} on node {os.environ.get('GROUP_RANK', 0)}")


def end_restarts() -> None:
    """Let torchrun end the job, where it would start it again: for an error that would only come back.

    One process per node calls it: a second signal would interrupt torchrun's clean-up.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if left <= 0:
        return
    with suppress(OSError):  # no /proc on this system
        if b"torch" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            print("torchrun is told to end the job; what it prints below says no more", file=sys.stderr, flush=True)
            os.kill(os.getppid(), signal.SIGTERM)


def sync_params(params):
    """Overwrite every tensor with rank 0's."""
    if dist.is_initialized():
        for param in params:
            dist.broadcast(param.data, 0)


def all_gather_rows(rows):
    """(N, ...) on each rank -> (N * world_size, ...) in the order of the ranks. All ranks bring the same N."""
    if not dist.is_initialized():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def mean_over_ranks(values):
    """The mean over ranks of a 1-D tensor, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= get_world_size()
    return values


def broadcast_object(value):
    """Rank 0's value on every rank, which may be any Python object."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, 0, group=_hosts())  # rank 0 may come late, from a download or a slow disk
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank, known to all: they meet on their hosts, and no GPU is waited for."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_hosts())
    return bool(value)


_host_group = None


def load_state_dict(path, map_location="cpu"):
    """Read tensors that `torch.save` wrote, from a local or remote path. Code in the file is never run.

    :raises UserError: for a file that is cut short, not a checkpoint, or holds other things than tensors.
    """
    try:
        with bf.BlobFile(path, "rb") as file:
            return torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint ({reason}): it is cut short, of another kind, or holds objects "
            "that are not tensors, which are never loaded"
        ) from error
