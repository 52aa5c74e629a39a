"""Several devices: one process each, which share out the images and send what they found to the first."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    """Number of this process on its machine; None where it is alone."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else None


def device():
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", (local_rank() or 0) % torch.cuda.device_count())


def own_part(count):
    """First and last + 1 of this rank's share of `count` images."""
    return count * rank() // world_size(), count * (rank() + 1) // world_size()


def gather(value):
    """The values of all ranks, in their order, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    _meet()
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def on_first(function):
    """Call a function on rank 0 while the others wait. Returns its value on every rank.

    What it raises is raised on rank 0, and the others exit with status 2.
    """
    if world_size() == 1:
        return function()
    _meet()
    fault, outcome = None, [None]
    if rank() == 0:
        try:
            outcome = [(function(), True)]
        except Exception as error:  # of whatever kind: the others would wait for ever
            fault, outcome = error, [(None, False)]
    dist.broadcast_object_list(outcome, 0)
    if fault is not None:
        raise fault
    value, succeeded = outcome[0]
    if not succeeded:
        raise SystemExit(2)
    return value


def _meet():
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=1))


def launch(devices):
    """Run this command again as so many processes. Returns the first exit status that is not 0, else 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for number in range(devices):
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": devices, "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    return next(filter(None, [process.wait() for process in processes]), 0)
