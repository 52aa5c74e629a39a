"""The batch of a step: how the ranks share it, and in which microbatches each rank computes its part."""

import gc
import os
from bisect import bisect_left
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .. import dist_util, logger
from ..config import RunConfig
from ..resample import create_named_schedule_sampler
from ..utils.errors import UserError
from .objective import TwoPassObjective
from .preflight import state_bytes

GPU_SHARE, CPU_SHARE = 0.95, 0.8  # of the memory that a run may fill; the rest is for libraries and fragmentation
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def share_batch(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the `batch_size` of each rank in the place of `global_batch_size`.

    :raises UserError: when the ranks cannot share the batch equally.
    """
    total = config.train.global_batch_size
    if total is None:
        return config
    if total % world_size:
        near = max(round(total / world_size), 1) * world_size
        raise UserError(
            f"--global_batch_size {total} cannot be shared by {world_size} ranks: it must be a multiple of "
            f"{world_size}, such as {near}"
        )
    return config.replaced(batch_size=total // world_size, global_batch_size=None)


# ---------------------------------------------------------------- --microbatch auto


def choose_microbatch(
    config: RunConfig, make_objective: Callable[[], TwoPassObjective], before: RunConfig | None
) -> RunConfig:
    """The configuration with a number in the place of `--microbatch auto`. All ranks call it together.

    The number is recorded: a run that resumes in the same circumstances keeps it, so that it computes the same. No
    random number is drawn.

    :param config: from `resume.resolve`, with architecture and global batch filled in.
    :param make_objective: what the run trains, with a model on the meta device.
    :param before: the configuration of the run that is resumed, if any.
    :raises UserError: when not even one image fits.
    """
    if config.train.microbatch != "auto":
        return config
    circumstances = _describe_circumstances(config)
    known = before.auto_microbatch if before else None
    if known and known.get("circumstances") == circumstances:
        num = known["microbatch"]
        logger.log(f"--microbatch auto: {num} of {config.train.batch_size} images, as this run has found before")
    else:
        num = min(dist_util.gather_objects(_find_microbatch(config, make_objective())))
        if not num:
            raise UserError(
                "--microbatch auto: not even one image at a time fits in the memory of this device: try "
                "--split_backward True, --grad_checkpoint True, --precision bf16, --shard zero1 or fsdp, or a smaller "
                "--model"
            )
        logger.log(f"--microbatch auto: {num} of {config.train.batch_size} images is the largest microbatch that fits")
    return config.replaced(microbatch=num, auto_microbatch={"circumstances": circumstances, "microbatch": num})


def _describe_circumstances(config: RunConfig) -> dict[str, Any]:
    """What the largest microbatch depends on, as JSON has it."""
    train = config.train
    names = ("batch_size", "optimizer", "ema_rate", "phema", "compile", "exact_lengths", "grad_checkpoint")
    found = {name: getattr(train, name) for name in (*names, "split_backward", "shard", "attention")}
    found |= {"architecture": config.architecture, "precision": config.precision, "global_batch": config.global_batch}
    return found | {"devices": sorted(set(dist_util.gather_objects(_describe_device())))}


def _describe_device() -> str:
    if dist_util.dev().type == "cuda":
        return f"{torch.cuda.get_device_name()} of {torch.cuda.mem_get_info()[1] / 2**30:.1f} GiB"
    return f"CPU with {total_memory() / 2**30:.1f} GiB"


def _find_microbatch(config: RunConfig, objective: TwoPassObjective) -> int:
    """The largest divisor of this rank's batch that fits in the memory of its device; 0 if none does."""
    batch_size, num_params = config.train.batch_size, sum(param.numel() for param in objective.parameters())
    passes = ("full", "masked") if config.train.split_backward and objective.masked else ("both",)
    objective.to_empty(device=dist_util.dev()).train()
    with torch.no_grad():
        for tensor in chain(objective.parameters(), objective.buffers()):
            tensor.zero_()  # the memory does not depend on the values
    divisors = [num for num in range(1, batch_size + 1) if batch_size % num == 0]
    with torch.compiler.set_stance("force_eager"):  # compiled code takes less memory, but minutes for each size
        fitting = _count_fitting(objective, divisors, passes, int(state_bytes(config, num_params)))
    return divisors[fitting - 1] if fitting else 0


def _count_fitting(objective: TwoPassObjective, sizes: list[int], passes: tuple[str, ...], state: int) -> int:
    """How many of the sizes of a microbatch, in ascending order, fit in memory.

    :param passes: what the loop runs one after the other, each with its backward pass.
    :param state: bytes of weights, gradients, optimizer state and EMA.
    """
    num_params = sum(param.numel() for param in objective.parameters())
    if dist_util.dev().type == "cuda":
        reserve = state - 8 * num_params  # weights are there already, and gradients come in a trial
        reserve += 4 * num_params if dist_util.get_world_size() > 1 else 0  # the buckets of DistributedDataParallel
        reserve += int((1 - GPU_SHARE) * torch.cuda.mem_get_info()[1])
        return bisect_left(sizes, True, key=lambda num: not fits_on_gpu(objective, num, passes, reserve))
    # What a trial would find on a GPU is computed here: a CPU that runs out of memory kills the process.
    one, two = (max(activation_bytes(objective, num, each) for each in passes) for num in (1, 2))
    available = CPU_SHARE * available_memory() / len(dist_util.node_group().ranks)
    logger.log(
        f"--microbatch auto: {(two - one) / 2**20:.2f} MiB of activations per image, beside {state / 2**30:.2f} GiB of "
        f"weights, gradients, optimizer state and EMA, of {available / 2**30:.2f} GiB for this process"
    )
    return sum(state + num * (two - one) <= available for num in sizes)


def draw_largest(objective: TwoPassObjective, num: int) -> dict[str, torch.Tensor]:
    """Inputs of a step of `num` images that keeps as many tokens as a masked pass can. No random number is drawn."""
    model, device = objective.model, next(objective.parameters()).device
    x_start = torch.zeros(num, model.in_channels, model.input_size, model.input_size, device=device)
    t, _ = create_named_schedule_sampler("uniform", objective.diffusion).sample(num, device, torch.zeros)
    rows = {"x_start": x_start, "t": t}
    if model.num_classes:
        rows["y"] = torch.zeros(num, dtype=torch.long, device=device)
    return rows | objective.draw(x_start, torch.zeros, torch.zeros_like, torch.zeros)


def fits_on_gpu(objective: TwoPassObjective, num: int, passes: tuple[str, ...], reserve: int) -> bool:
    """Whether forward and backward passes of `num` images fit on the GPU.

    :param passes: what the loop runs one after the other, each with its backward pass.
    :param reserve: bytes that something else will take.
    """
    held, fits = None, True
    try:
        held = torch.empty(reserve, dtype=torch.uint8, device=dist_util.dev())
        for each in passes:
            objective(**draw_largest(objective, num), passes=each)["loss"].sum().backward()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        fits = False  # the tensors of the failed pass are let go of when this block ends
    del held
    objective.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    logger.log(f"--microbatch auto: {num} images " + ("fit" if fits else "do not fit"))
    return fits


def activation_bytes(objective: TwoPassObjective, num: int, passes: str = "both") -> int:
    """Bytes that a forward pass of `num` images keeps for the backward pass, without the parameters."""
    kept = {}  # by storage; holding them keeps their memory from being used again meanwhile

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    def keep_inputs(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        for value in inputs:  # all that gradient checkpointing keeps of a block
            if isinstance(value, torch.Tensor):
                keep(value)

    hooks = [block.register_forward_pre_hook(keep_inputs) for block in objective.model.all_blocks()]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective(**draw_largest(objective, num), passes=passes)
    finally:
        for hook in hooks:
            hook.remove()
    own = {value.untyped_storage()._cdata for value in chain(objective.parameters(), objective.buffers())}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def available_memory() -> int:
    """Bytes of main memory that are free on this machine, and within the limit of its container."""
    try:
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = 2**10 * int(lines["MemAvailable"].split()[0])
    except OSError:  # no Linux: whatever else runs, half of the memory is likely to be free
        return total_memory() // 2
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def total_memory() -> int:
    """Bytes of main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
