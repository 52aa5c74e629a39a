"""Where a run starts: fresh, from weights, or from a checkpoint; and whether its configuration is still the same."""

import os
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import dist_util, logger
from ..config import LogConfig, RunConfig
from ..models import MODELS, create_model, find_model
from ..utils.errors import UserError
from ..utils.files import write_json
from ..weights.checkpoint import (
    CONFIG_NAME,
    ema_name,
    find_aside,
    latest_step,
    model_name,
    opt_name,
    parse_step,
    read_config,
    set_aside,
)
from ..weights.pretrained import find_weights, read_weights
from .optim import default_grad_clip

# ---------------------------------------------------------------- where to start


class Start(NamedTuple):
    """What a run starts from.

    :param path: `model{step}.pt`, or with step 0 a file or folder of weights; None for fresh weights.
    :param step: of the checkpoint.
    :param begins: whether a run begins here, rather than going on: its origin is then written down.
    """

    path: Path | None
    step: int
    begins: bool


def find_start(log_dir: str | Path, log: LogConfig, before: RunConfig | None = None) -> Start:
    """Where training starts, of what lies on the disk.

    The same command always goes on with what it began: a run that was begun from a named file, and has checkpoints of
    its own by now, resumes from the newest of them.

    :param log: `resume_checkpoint` and `continue_from`, see `config.LogConfig`.
    :param before: the configuration that the run in `log_dir` was begun with, which names its origin.
    :raises UserError: for a file that does not exist or is no checkpoint, and for a `log_dir` that holds another run.
    """
    newest, origin = latest_step(log_dir), log.continue_from or log.resume_checkpoint
    going_on = Start(None if newest is None else Path(log_dir, model_name(newest)), newest or 0, newest is None)
    if log.continue_from and log.resume_checkpoint != "auto":
        raise UserError(
            f"--continue_from {log.continue_from} and --resume_checkpoint {log.resume_checkpoint} exclude each other: "
            "leave one of them out"
        )
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    same_run = before is not None and origin == (before.log.continue_from or before.log.resume_checkpoint)
    if origin == "auto" or (newest is not None and (restarted or (same_run and origin))):
        return going_on
    if not origin:
        return Start(None, 0, True)
    path = Path(origin)
    if path.resolve() == Path(log_dir).resolve():
        return going_on
    if not path.exists() and path.parent.resolve() == Path(log_dir).resolve():
        # The weights that this run was to begin from were moved aside, and it was killed before its first checkpoint.
        path = find_aside(log_dir, path.name) or path
    if not path.exists():
        flag = "continue_from" if log.continue_from else "resume_checkpoint"
        raise UserError(f"--{flag} {path} does not exist: name a file or folder, or leave the flag out")
    step = step_of(path)
    if log.continue_from and step is None:
        raise UserError(
            f"--continue_from {path} is no checkpoint to resume from: name a {model_name(1000)} with its "
            f"{opt_name(1000)} beside it, or start from its weights with --resume_checkpoint"
        )
    if path.parent.resolve() == Path(log_dir).resolve():
        return Start(path, step or 0, True)
    if newest is not None:
        raise UserError(
            f"{log_dir} holds checkpoints of a run that was not begun from {origin}: choose another --log_dir, or "
            "resume that run with --resume_checkpoint auto"
        )
    return Start(path, step if log.continue_from else 0, True)


def step_of(path: Path) -> int | None:
    """The step of a `model{step}.pt` that has its `opt{step}.pt` beside it; None for every other file."""
    try:
        step = parse_step(path)
    except ValueError:
        return None
    return step if path.name == model_name(step) and path.with_name(opt_name(step)).exists() else None


def agree_on_start(log_dir: str | Path, config: RunConfig, before: RunConfig | None) -> Start:
    """Rank 0's choice, for every rank. All ranks call it together.

    Checkpoints of `log_dir` that the run leaves behind, since it begins afresh or at an older step, are moved into a
    folder beside them: neither lost, nor mixed with those that will be written.

    :raises UserError: as `find_start`; and for files that are missing, damaged, or not to be seen by every rank.
        Nothing has been moved then.
    """
    start = dist_util.run_on_main(find_start, log_dir, config.log, before)
    if start.path is not None:
        needed = [start.path]
        if start.step:
            needed.append(start.path.with_name(opt_name(start.step)))
            rates = config.train.ema_rate.split(",")
            needed += [start.path.with_name(ema_name(rate, start.step)) for rate in rates]
        missing = next((str(path) for path in needed if not path.exists()), None)
        places = dist_util.gather_objects(
            missing and f"{missing} (rank {dist_util.get_rank()}, {socket.gethostname()})"
        )
        absent = [place for place in places if place]
        if len(absent) == len(places):
            raise UserError(
                f"{absent[0]} does not exist, but going on from step {start.step} needs it: name a checkpoint that is "
                "complete, with the --ema_rate that it was trained with"
            )
        if absent:
            raise UserError(
                f"{len(absent)} of {len(places)} ranks cannot see the checkpoint, the first is {absent[0]}: "
                "every node needs the same --log_dir on storage that all share"
            )
    return dist_util.run_on_main(_leave_behind, log_dir, start)


def _leave_behind(log_dir: str | Path, start: Start) -> Start:
    """Move the checkpoints that a run leaves behind. Returns its start, whose weights may have been among them."""
    if not start.begins:
        return start
    inside = start.path is not None and start.path.parent.resolve() == Path(log_dir).resolve()
    if inside:
        read_weights(find_weights(start.path))  # a damaged file is refused before anything moves
    step = start.step if inside else 0
    left = set_aside(log_dir, step)
    if left:
        logger.log(f"checkpoints after step {step} are kept in {left}")
    moved = inside and left is not None and not start.path.exists()
    return start._replace(path=left / start.path.name) if moved else start


# ---------------------------------------------------------------- configuration


def describe_architecture(config: RunConfig, first_stage: Any, num_classes: int) -> dict[str, Any]:
    """Name and options for `create_model` of the model that flags describe.

    :raises UserError: when the first stage cannot reduce image_size to the model's input.
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
        "learn_sigma": config.diffusion.learn_sigma,
    }
    given = {"mask_ratio": config.model.mask_ratio, "decode_layer": config.model.decode_layer}
    options |= {key: value for key, value in given.items() if value is not None}
    return {"name": config.model.model, "options": options}


def resolve(config: RunConfig) -> RunConfig:
    """A configuration with the defaults of the model's family and size filled in, so that two can be compared.

    :raises UserError: for a model that there is not.
    """
    with torch.device("meta"):  # its sizes alone
        model = create_model(config.model.model)
    train, options = config.train, config.architecture.get("options", {})
    optimizer = train.optimizer or model.default_optimizer
    num_classes = options.get("num_classes") if config.model.num_classes is None else config.model.num_classes
    decode_layer = config.model.decode_layer
    return config.replaced(
        model=next(name for name, make in MODELS.items() if make is find_model(config.model.model)),
        optimizer=optimizer,
        grad_clip=default_grad_clip(optimizer) if train.grad_clip is None else train.grad_clip,
        snr_gamma=config.diffusion.options(model.default_snr_gamma)["snr_gamma"],
        precision=config.precision,
        use_fp16=False,
        num_classes=num_classes,
        decode_layer=model.decode_layer if decode_layer is None else decode_layer,
    )


def read_run_config(log_dir: str | Path) -> RunConfig | None:
    """The configuration of the run whose checkpoints a folder holds; None where there is no checkpoint."""
    return read_config(log_dir) if latest_step(log_dir) is not None else None


def check_same_run(log_dir: str | Path, config: RunConfig, before: RunConfig | None) -> None:
    """Refuse to resume a run whose result would change.

    :param config, before: from `resolve`; None: there is nothing to resume.
    :raises UserError: for the first flag or fact that changes the run; names both values.
    """
    if before is None or config.log.allow_config_change:
        return
    for name, old, new in config.differences(before):
        raise UserError(
            f"{name} was {old} when {log_dir} was begun, now it is {new}: repeat it, choose another --log_dir, or say "
            "--allow_config_change True"
        )


def write_run_config(log_dir: str | Path, config: RunConfig, before: RunConfig | None, begins: bool) -> None:
    """Leave the configuration beside the checkpoints; a run that goes on keeps the origin that it began with."""
    if not begins and before is not None:
        config = config.replaced(resume_checkpoint=before.log.resume_checkpoint, continue_from=before.log.continue_from)
    write_json(Path(log_dir, CONFIG_NAME), config.to_json())
