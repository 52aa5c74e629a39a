"""Process groups: torchrun and torch.distributed.launch, on GPUs (nccl) or CPUs (gloo); one process needs neither."""

import os
from contextlib import contextmanager

import blobfile as bf
import torch
import torch.distributed as dist


def setup_dist():
    """Join the process group that the launcher describes in the environment; alone, do nothing.

    :raises ValueError: when a launcher starts more processes on a node than it has GPUs.
    """
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ:
        return
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this node shows {num_gpus}; "
            f"start at most {num_gpus} processes per node (torchrun --nproc_per_node)"
        )
    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl", device_id=dev())


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def dev():
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return get_rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def main_first():
    """Rank 0 runs the block before the others: for downloads that the others then find in the cache."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


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


def load_state_dict(path, map_location="cpu"):
    """Read tensors that `torch.save` wrote, from a local or remote path. Code in the file is never run.

    :raises ValueError: for a file that is cut short, not a checkpoint, or holds other things than tensors.
    """
    try:
        with bf.BlobFile(path, "rb") as file:
            return torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}): it is cut short, of another kind, or holds objects "
            "that are not tensors, which are never loaded"
        ) from error
