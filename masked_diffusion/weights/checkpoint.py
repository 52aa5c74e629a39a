"""Checkpoints on disk, written whole or not at all, and the configuration beside them.

File names are the published ones: `model{step:06d}.pt`, `ema_{rate}_{step:06d}.pt`, `opt{step:06d}.pt`. The first two
are plain state dicts. `opt` is written last, so that its presence means that the checkpoint is complete.
"""

import itertools
import json
import os
import re
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..utils.errors import UserError
from ..utils.files import DiskError, atomic_write
from .torch_file import save_tensors

CONFIG_NAME = "config.json"
SAVE_ADVICE = "free some disk space and run the same command again to resume; the last checkpoint is intact"

# ---------------------------------------------------------------- writing


def model_name(step: int) -> str:
    """File name of the weights at a step."""
    return f"model{step:06d}.pt"


def ema_name(rate: float | str, step: int) -> str:
    """File name of the EMA weights of a rate at a step."""
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step: int) -> str:
    """File name of the optimizer state, and everything else that resuming needs, at a step."""
    return f"opt{step:06d}.pt"


def checkpoint_files(
    step: int, model_state: dict[str, Any], ema_states: dict[str, dict[str, Any]], train_state: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The states of the files of a checkpoint by name, in the order in which they are written."""
    states = {opt_name(step): train_state}
    states |= {ema_name(rate, step): state for rate, state in ema_states.items()}
    return states | {model_name(step): model_state}


def save_checkpoint(
    folder: str | Path,
    step: int,
    model_state: dict[str, Any],
    ema_states: dict[str, dict[str, Any]],
    train_state: dict[str, Any],
) -> None:
    """Write a complete checkpoint, or nothing. Tensors that are gathered from ranks are in memory one at a time.

    :param model_state: the model's state dict, of tensors or `torch_file.LateTensor`s.
    :param ema_states: a state dict for each EMA rate; the rates are spelled as in `--ema_rate`.
    :param train_state: everything else that a resumed run needs.
    :raises DiskError: for example when the disk is full. No file of this step is left.
    """
    states = checkpoint_files(step, model_state, ema_states, train_state)
    files, renaming = [Path(folder, name) for name in states], False
    try:
        # All files are completely on the disk before the first one gets its final name. The stack renames them in
        # reverse order: `opt`, which marks the checkpoint as complete, appears last.
        with ExitStack() as stack:
            for path, state in zip(files, states.values(), strict=True):
                file = stack.enter_context(atomic_write(path, SAVE_ADVICE))
                save_tensors(state, file)
                file.flush()
                os.fsync(file.fileno())
            # An older checkpoint of this step must not look complete while its files are replaced one by one.
            files[0].unlink(missing_ok=True)
            renaming = True
    except DiskError:
        for path in files if renaming else ():
            path.unlink(missing_ok=True)
        raise


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Remove the partial files of killed processes, and all but the newest `keep` checkpoints, except for their EMAs.

    :param keep: 0 keeps all checkpoints.
    """
    for pattern in (".model*.partial", ".ema_*.partial", ".phema_*.partial", ".opt*.partial"):
        for path in Path(folder).glob(pattern):
            path.unlink()
    for step in complete_steps(folder)[:-keep] if keep else ():
        Path(folder, opt_name(step)).rename(Path(folder, f".{opt_name(step)}.pruned"))
    # Without `opt` the checkpoint no longer counts as complete. If this is killed here, the mark tells the next call
    # which checkpoint to finish removing.
    for mark in Path(folder).glob(".opt*.pt.pruned"):
        step = parse_step(mark.name[1:].removesuffix(".pruned"))
        for path in (Path(folder, model_name(step)), mark):
            path.unlink(missing_ok=True)


def set_aside(folder: str | Path, step: int) -> Path | None:
    """Move the checkpoints after a step into a new subfolder, with copies of the logs and the configuration.

    :param step: 0 moves all checkpoints.
    :return: the subfolder, or None if there was nothing to move.
    """
    found = (
        path
        for path in Path(folder).glob("*.pt")
        if re.fullmatch(r"(model|opt|ema_.+_|phema_.+_)\d{6,}\.pt", path.name)
    )
    files = [path for path in found if int(re.search(r"(\d+)\.pt$", path.name)[1]) > step]
    if not files:
        return None
    number = next(n for n in itertools.count(1) if not Path(folder, f"earlier_run_{n}").exists())
    aside = Path(folder, f"earlier_run_{number}")
    aside.mkdir()
    for name in (CONFIG_NAME, "progress.csv", "progress.jsonl", "log.txt"):
        if Path(folder, name).exists():
            shutil.copy2(Path(folder, name), aside / name)
    # `opt` first: without it a checkpoint does not count as complete, even if this is killed half-way.
    for path in sorted(files, key=lambda path: not path.name.startswith("opt")):
        path.rename(aside / path.name)
    return aside


def find_aside(folder: str | Path, name: str) -> Path | None:
    """The file of that name that `set_aside` moved last, or None."""
    found = Path(folder).glob(f"earlier_run_*/{name}")
    return max(found, key=lambda path: int(path.parent.name.rpartition("_")[2]), default=None)


# ---------------------------------------------------------------- finding


def parse_step(path: str | Path) -> int:
    """The step in a checkpoint's file name.

    :raises UserError: for a name without a step.
    """
    match = re.fullmatch(r"(?:model|opt|ema_[^/]*_)(\d{6,})\.pt", Path(path).name)
    if not match:
        raise UserError(f"{path} has no step in its name: it should be named like {model_name(1000)}")
    return int(match.group(1))


def complete_steps(folder: str | Path) -> list[int]:
    """The steps of all complete checkpoints in a folder, ascending."""
    steps = [parse_step(path) for path in Path(folder).glob("opt*.pt") if re.fullmatch(r"opt\d{6,}\.pt", path.name)]
    return sorted(step for step in steps if Path(folder, model_name(step)).exists())


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint in a folder, or None."""
    return max(complete_steps(folder), default=None)


def newest_ema(folder: str | Path) -> Path:
    """The newest EMA file of a training folder; if there are several rates, the one of the highest rate.

    :raises UserError: when the folder holds no checkpoint.
    """
    emas = []
    for path in Path(folder).glob("ema_*_*.pt"):
        with suppress(ValueError):  # a file of another program
            emas.append((parse_step(path), float(path.name.split("_")[1]), path))
    if not emas:
        raise UserError(f"{folder} holds no checkpoint (no ema_RATE_STEP.pt): name a file, or train first")
    return max(emas)[-1]


def read_config(path: str | Path) -> RunConfig | None:
    """Read the `config.json` that training, `scripts/export.py` or `save_pretrained` wrote beside a checkpoint.

    :param path: a checkpoint, or the folder that holds it.
    :return: the configuration, or None if there is no `config.json`.
    :raises UserError: for a file that cannot be read or holds something else; the message names the file.
    """
    file = Path(path if Path(path).is_dir() else Path(path).parent, CONFIG_NAME)
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of the disk, of UTF-8, and of JSON
        raise UserError(f"{file} cannot be read as JSON ({error}): restore or remove it") from error
    try:
        return RunConfig.from_json(found)
    except UserError as error:
        raise UserError(f"{file} is not a configuration of these models: {error}; restore or remove it") from error
