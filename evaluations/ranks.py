"""Several devices: one process each, which share out the images and send what they found to the first."""

import os
import platform
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

GRACE = 10  # seconds that an interrupted process has to end


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def has_met():
    """Whether this process communicates with others."""
    return dist.is_available() and dist.is_initialized()


def local_rank():
    """Number of this process on its machine; None where it is alone."""
    return int(os.environ["LOCAL_RANK"]) if world_size() > 1 else None


def device():
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", (local_rank() or 0) % torch.cuda.device_count())


@contextmanager
def full_float32():
    """Matrix products of float32 without TensorFloat32, which moves digits; what a training run chose comes back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def processor():
    """Name of the CPU, and how many of its cores this process may use: both can move the last digits."""
    names = []
    with suppress(OSError):  # not on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


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
    """Run this command again as so many processes. Returns the first exit status that is not 0, else 0.

    Ctrl-C ends them too, also where the terminal did not tell them of it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    try:
        for number in range(devices):
            place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": devices, "MASTER_PORT": port}
            environment = os.environ | {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
            processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
        return next(filter(None, [process.wait() for process in processes]), 0)
    except KeyboardInterrupt:
        _end(processes)
        return 128 + signal.SIGINT  # the first of them has said so


def _end(processes):
    """Interrupt processes, and kill those that wait for others in a library and do not hear it."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
