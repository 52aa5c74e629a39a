"""How a run starts: new, from weights (fine-tuning), or resumed from a checkpoint with the same configuration."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import dist_util, logger
from ..config import LogConfig, RunConfig
from ..models import MODELS, create_model, find_model
from ..utils.errors import UserError
from ..utils.files import DiskError, write_json
from ..utils.locks import FileLock
from ..weights.checkpoint import (
    CONFIG_NAME,
    STATE_NAME,
    checkpoint_path,
    ema_name,
    find_aside,
    is_sharded,
    latest_step,
    model_name,
    opt_name,
    parse_step,
    read_config,
    run_folder,
    set_aside,
    sharded_name,
)
from ..weights.pretrained import find_weights, read_weights
from ..weights.sharded import check_parts, section_parts
from .optim import default_grad_clip

LOCK_SECONDS = 10  # that a killed run may take to let go of its folder

# ---------------------------------------------------------------- one run in a folder


@contextmanager
def own_log_dir(log_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a log directory during the block. All ranks enter it together.

    :raises UserError: when another run is in it; names its host and process.
    """
    locks = []

    def lock() -> None:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                advice = "wait for it, stop it, or choose another --log_dir"
                locks.append(FileLock(Path(log_dir, ".lock"), f"{log_dir} is being trained in", advice))
                return
            except UserError as error:
                if isinstance(error, DiskError) or time.monotonic() > end:
                    raise
                time.sleep(0.2)

    dist_util.run_on_main(lock)
    try:
        yield
    finally:
        for held in locks:
            held.release()


# ---------------------------------------------------------------- where to start


class Start(NamedTuple):
    """The checkpoint or weights that a run starts from.

    :param path: `model{step}.pt`, or the folder of a sharded checkpoint; or, with step 0, a file or folder of weights;
        None for random initial weights.
    :param step: step of the checkpoint.
    :param begins: True if this starts a new run in `log_dir`, whose flags are then recorded in `config.json`; False if
        it resumes the run there.
    """

    path: Path | None
    step: int
    begins: bool


def find_start(log_dir: str | Path, log: LogConfig, before: RunConfig | None = None) -> Start:
    """Find what training starts from, according to the flags and the files on the disk.

    Running the same command again always resumes the run that it started: a run that started from a named file, and
    has saved checkpoints since, resumes from the newest of these.

    :param log: `resume_checkpoint` and `continue_from`, see `config.LogConfig`.
    :param before: the configuration that the run in `log_dir` was started with, if any. Its `resume_checkpoint` or
        `continue_from` is what that run started from.
    :raises UserError: for a file that does not exist or is not a checkpoint, and for a `log_dir` with another run.
    """
    newest, origin = latest_step(log_dir), log.continue_from or log.resume_checkpoint
    resumed = Start(None if newest is None else checkpoint_path(log_dir, newest), newest or 0, newest is None)
    if log.continue_from and log.resume_checkpoint != "auto":
        raise UserError(
            f"--continue_from {log.continue_from} and --resume_checkpoint {log.resume_checkpoint} cannot be used "
            "together: leave one of them out"
        )
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    same_run = before is not None and origin == (before.log.continue_from or before.log.resume_checkpoint)
    if origin == "auto" or (newest is not None and (restarted or (same_run and origin))):
        return resumed
    if not origin:
        return Start(None, 0, True)
    path = Path(origin)
    if path.resolve() == Path(log_dir).resolve():
        return resumed
    inside = run_folder(path).resolve() == Path(log_dir).resolve()
    if not path.exists() and inside:
        # The weights that this run was to start from were moved, and it was killed before its first checkpoint.
        path = find_aside(log_dir, str(path.relative_to(run_folder(path)))) or path
        inside = run_folder(path).resolve() == Path(log_dir).resolve()
    if not path.exists():
        flag = "continue_from" if log.continue_from else "resume_checkpoint"
        raise UserError(f"--{flag} {path} does not exist: name a file or folder, or leave the flag out")
    step = step_of(path)
    if log.continue_from and step is None:
        raise UserError(
            f"--continue_from {path} is not a checkpoint to resume from: name a file such as {model_name(1000)} that "
            f"has {opt_name(1000)} beside it, or a folder such as {sharded_name(1000)}; or start from its weights with "
            "--resume_checkpoint"
        )
    if inside:
        return Start(path, step or 0, True)
    if newest is not None:
        raise UserError(
            f"{log_dir} holds checkpoints of a run that did not start from {origin}: choose another --log_dir, or "
            "resume that run with --resume_checkpoint auto"
        )
    return Start(path, step if log.continue_from else 0, True)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint that a run can resume from, else None.

    :param path: a `model{step}.pt`, which needs `opt{step}.pt` beside it; or the folder of a sharded checkpoint.
    """
    try:
        step = parse_step(path)
    except ValueError:
        return None
    if is_sharded(path):
        return step if (path / STATE_NAME).exists() else None
    return step if path.name == model_name(step) and path.with_name(opt_name(step)).exists() else None


def agree_on_start(log_dir: str | Path, config: RunConfig, before: RunConfig | None) -> Start:
    """Choose what the run starts from on rank 0, for all ranks. All ranks call it together.

    If the run starts anew or at an older step, the later checkpoints in `log_dir` are moved into a subfolder, so that
    they are neither lost nor mixed with the checkpoints of this run.

    :param before: the configuration that the run in `log_dir` was started with, if any.
    :raises UserError: as `find_start`; and for files that are missing, damaged, or not to be seen by every rank.
        Nothing has been moved then.
    """
    start = dist_util.run_on_main(find_start, log_dir, config.log, before)
    if start.path is not None:
        needed, rates = [start.path], config.train.ema_rate.split(",")
        if start.step and is_sharded(start.path):
            needed += [start.path / name for name in (STATE_NAME, *(f"ema_{rate}" for rate in rates))]
        elif start.step:
            needed.append(start.path.with_name(opt_name(start.step)))
            needed += [start.path.with_name(ema_name(rate, start.step)) for rate in rates]
        missing = next((str(path) for path in needed if not path.exists()), None)
        places = dist_util.gather_objects(
            missing and f"{missing} (rank {dist_util.get_rank()}, {socket.gethostname()})"
        )
        absent = [place for place in places if place]
        if len(absent) == len(places):
            raise UserError(
                f"{absent[0]} does not exist, but resuming from step {start.step} needs it: name a checkpoint that is "
                "complete, with the --ema_rate that it was trained with"
            )
        if absent:
            raise UserError(
                f"{len(absent)} of {len(places)} ranks cannot see the checkpoint, the first missing file is "
                f"{absent[0]}: put --log_dir on storage that all nodes share"
            )
    return dist_util.run_on_main(_leave_behind, log_dir, start)


def _leave_behind(log_dir: str | Path, start: Start) -> Start:
    """Move the checkpoints that a run leaves behind. Returns its start, whose weights may have been among them."""
    if not start.begins:
        return start
    inside = start.path is not None and run_folder(start.path).resolve() == Path(log_dir).resolve()
    if inside:  # a damaged file is refused before anything moves
        read_weights(find_weights(start.path))
        if start.step and is_sharded(start.path):
            check_parts(start.path, section_parts(start.path))
    step = start.step if inside else 0
    left = set_aside(log_dir, step)
    if left:
        logger.log(f"the checkpoints after step {step} are moved to {left}")
    moved = inside and left is not None and not start.path.exists()
    return start._replace(path=left / start.path.relative_to(run_folder(start.path))) if moved else start


# ---------------------------------------------------------------- configuration


def describe_architecture(config: RunConfig, first_stage: Any, num_classes: int) -> dict[str, Any]:
    """Name and options for `create_model`, for the model that the flags describe.

    :param first_stage: the autoencoder, whose channels and downsampling decide the model's input.
    :raises UserError: when image_size is not a multiple of the downsampling.
    """
    if config.model.image_size % first_stage.downsample:
        raise UserError(
            f"--image_size is {config.model.image_size}: with --vae {config.model.vae} it must be a multiple of "
            f"{first_stage.downsample}"
        )
    options = {
        "input_size": config.model.image_size // first_stage.downsample,
        "in_channels": first_stage.channels,
        "num_classes": num_classes,
        "learn_sigma": config.diffusion.options(None)["learn_sigma"],
    }
    given = {"mask_ratio": config.model.mask_ratio, "decode_layer": config.model.decode_layer}
    given["qk_norm"] = config.model.qk_norm or None
    options |= {key: value for key, value in given.items() if value is not None}
    return {"name": config.model.model, "options": options}


def resolve(config: RunConfig) -> RunConfig:
    """The configuration with the defaults of the model's family and size filled in, so that two can be compared.

    :raises UserError: for an unknown model.
    """
    with torch.device("meta"):  # without memory for its weights
        model = create_model(config.model.model)
    train, options = config.train, config.architecture.get("options", {})
    optimizer = train.optimizer or model.default_optimizer
    diffusion = config.diffusion.options(model.default_snr_gamma)
    num_classes = options.get("num_classes") if config.model.num_classes is None else config.model.num_classes
    decode_layer = config.model.decode_layer
    return config.replaced(
        model=next(name for name, make in MODELS.items() if make is find_model(config.model.model)),
        optimizer=optimizer,
        grad_clip=default_grad_clip(optimizer) if train.grad_clip is None else train.grad_clip,
        snr_gamma=diffusion["snr_gamma"],
        learn_sigma=diffusion["learn_sigma"],
        precision=config.precision,
        use_fp16=False,
        num_classes=num_classes,
        decode_layer=model.decode_layer if decode_layer is None else decode_layer,
    )


def read_run_config(log_dir: str | Path) -> RunConfig | None:
    """The configuration of the run whose checkpoints are in a folder; None if there is no checkpoint."""
    return read_config(log_dir) if latest_step(log_dir) is not None else None


def find_differences(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings that differ and change the result of a resumed run: name, value in `before`, value in `now`.
    Facts that an older configuration does not record (class names, data signature, global batch) are not compared.

    :param before, now: from `resolve`.
    """
    old, new = before.values(), now.values()
    for _, flag in now.flags():
        if flag.metadata["changes_run"] and old[flag.name] != new[flag.name]:
            yield f"--{flag.name}", old[flag.name], new[flag.name]
    if before.rounds_lengths != now.rounds_lengths:
        yield "--compile without --exact_lengths", before.rounds_lengths, now.rounds_lengths
    for name in sorted(before.autoencoder.keys() & now.autoencoder):
        if before.autoencoder[name] != now.autoencoder[name]:
            yield f"the {name} of the autoencoder", before.autoencoder[name], now.autoencoder[name]
    if None not in (before.global_batch, now.global_batch) and before.global_batch != now.global_batch:
        yield "the global batch (--batch_size times the number of ranks)", before.global_batch, now.global_batch
    if before.classes and before.classes != now.classes:
        yield "the list of class names", *_first_difference(before.classes, now.classes)
    elif None not in (before.data_signature, now.data_signature) and before.data_signature != now.data_signature:
        yield "the list of image files", before.data_signature[:12], now.data_signature[:12]


def _first_difference(before: tuple[str, ...], now: tuple[str, ...]) -> tuple[str, str]:
    """The first difference between two lists of class names: a short description of each side."""
    if len(before) != len(now):
        return f"{len(before)} classes", f"{len(now)} classes"
    label = next(i for i, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1])
    return f"{before[label]!r} for label {label}", f"{now[label]!r}"


def check_same_run(log_dir: str | Path, config: RunConfig, before: RunConfig | None) -> None:
    """Refuse to resume a run with settings that change its result.

    :param config: from `resolve`.
    :param before: the configuration of the run in `log_dir`, from `resolve`; None if there is nothing to resume.
    :raises UserError: for the first such setting; the message has both values.
    """
    if before is None or config.log.allow_config_change:
        return
    for name, old, new in find_differences(before, config):
        raise UserError(
            f"{name} was {old} when {log_dir} was begun, now it is {new}: repeat it, choose another --log_dir, or "
            "accept the change with --allow_config_change True"
        )


def write_run_config(log_dir: str | Path, config: RunConfig, before: RunConfig | None, begins: bool) -> None:
    """Write the configuration beside the checkpoints. A resumed run keeps the record of what it started from.

    :param begins: see `Start`.
    """
    if not begins and before is not None:
        config = config.replaced(resume_checkpoint=before.log.resume_checkpoint, continue_from=before.log.continue_from)
    write_json(Path(log_dir, CONFIG_NAME), config.to_json())
