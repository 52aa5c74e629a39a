"""Checkpoints on disk, written whole or not at all, and the configuration beside them.

File names are the published ones: `model{step:06d}.pt`, `ema_{rate}_{step:06d}.pt`, `opt{step:06d}.pt`. The first two
are plain state dicts. `opt` is written last, so that its presence means that the checkpoint is complete.

With `--checkpoint_format sharded` a checkpoint is one folder, `sharded{step:06d}`, that gets its name when all of it is
on the disk; see `weights.sharded`. Its subfolders are `model`, `optimizer`, `ema_{rate}` and `phema_{width}`.
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
STATE_NAME = "state.pt"  # of a sharded checkpoint: with it, a run can be resumed from the folder
MANIFEST_NAME = "manifest.json"  # of a sharded checkpoint: size and checksum of each of its files
PARTIAL_FILES = tuple(f".{name}*.partial" for name in ("model", "ema_", "phema_", "opt", "grid", CONFIG_NAME))
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


def sharded_name(step: int) -> str:
    """Name of the folder of a sharded checkpoint of a step."""
    return f"sharded{step:06d}"


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


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left half-written. Only a run that owns the folder may call it, before it saves."""
    folder = Path(folder)
    for old in folder.glob(".sharded*.replaced"):
        name = old.name[1:].removesuffix(".replaced")
        if not (folder / name).exists():  # killed before the new checkpoint of this step got its name
            old.rename(folder / name)
    for pattern in (*PARTIAL_FILES, ".sharded*.partial", ".sharded*.replaced"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    prune_checkpoints(folder, 0)


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, except for their EMAs and snapshots.

    :param keep: 0 keeps all checkpoints.
    """
    # Without `opt` or `state.pt` a checkpoint no longer counts as complete. If this is killed, what is left of it tells
    # the next call which checkpoint to finish removing.
    for step in complete_steps(folder)[:-keep] if keep else ():
        if _is_whole(folder, step):
            Path(folder, opt_name(step)).rename(Path(folder, f".{opt_name(step)}.pruned"))
        Path(folder, sharded_name(step), STATE_NAME).unlink(missing_ok=True)
    for mark in Path(folder).glob(".opt*.pt.pruned"):
        step = parse_step(mark.name[1:].removesuffix(".pruned"))
        for path in (Path(folder, model_name(step)), mark):
            path.unlink(missing_ok=True)
    for path in sharded_folders(folder):
        for section in ("model", "optimizer") if not (path / STATE_NAME).exists() else ():
            shutil.rmtree(path / section, ignore_errors=True)


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
    files += [path for path in sharded_folders(folder) if parse_step(path) > step]
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
    """The file of that name that `set_aside` moved last, or None.

    :param name: relative to `folder`.
    """
    number = re.compile(r"earlier_run_(\d+)")
    return max(
        Path(folder).glob(f"earlier_run_*/{name}"), key=lambda path: int(number.search(str(path))[1]), default=None
    )


# ---------------------------------------------------------------- finding


def parse_step(path: str | Path) -> int:
    """The step in the name of a checkpoint's file, or of the folder of a sharded one.

    :raises UserError: for a name without a step.
    """
    match = re.fullmatch(r"(?:(?:model|opt|ema_[^/]*_)(\d{6,})\.pt|sharded(\d{6,}))", Path(path).name)
    if not match:
        raise UserError(f"{path} has no step in its name: it should be named like {model_name(1000)}")
    return int(match[1] or match[2])


def is_sharded(path: str | Path) -> bool:
    """Whether a path is named like the folder of a sharded checkpoint."""
    return re.fullmatch(r"sharded\d{6,}", Path(path).name) is not None


def sharded_folders(folder: str | Path) -> list[Path]:
    """The sharded checkpoints in a folder, in the order of their steps; of pruned ones the EMAs are left."""
    return sorted(
        (path for path in Path(folder).glob("sharded*") if is_sharded(path) and path.is_dir()), key=parse_step
    )


def run_folder(path: str | Path) -> Path:
    """The folder that a checkpoint is in; for a subfolder of a sharded checkpoint, the one that this is in."""
    return Path(path).parent.parent if is_sharded(Path(path).parent) else Path(path).parent


def _is_whole(folder: str | Path, step: int) -> bool:
    return Path(folder, opt_name(step)).exists() and Path(folder, model_name(step)).exists()


def complete_steps(folder: str | Path) -> list[int]:
    """The steps of all complete checkpoints in a folder, of both formats, ascending."""
    steps = [parse_step(path) for path in Path(folder).glob("opt*.pt") if re.fullmatch(r"opt\d{6,}\.pt", path.name)]
    sharded = {parse_step(path) for path in sharded_folders(folder) if (path / STATE_NAME).exists()}
    return sorted({step for step in steps if _is_whole(folder, step)} | sharded)


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint in a folder, or None."""
    return max(complete_steps(folder), default=None)


def checkpoint_path(folder: str | Path, step: int) -> Path:
    """What to resume from at a complete step: `model{step}.pt`, or the folder of a sharded checkpoint."""
    return Path(folder, model_name(step) if _is_whole(folder, step) else sharded_name(step))


def newest_ema(folder: str | Path) -> Path:
    """The newest EMA of a training folder or a sharded checkpoint; of several rates, the one of the highest rate.

    :return: a file, or a subfolder of a sharded checkpoint.
    :raises UserError: when the folder holds no checkpoint.
    """
    emas = []
    for path in Path(folder).glob("ema_*_*.pt"):
        with suppress(ValueError):  # a file of another program
            emas.append((parse_step(path), float(path.name.split("_")[1]), path))
    for checkpoint in [*sharded_folders(folder), Path(folder)]:
        for path in checkpoint.glob("ema_*/.metadata"):
            with suppress(ValueError):
                emas.append((parse_step(checkpoint), float(path.parent.name.split("_")[1]), path.parent))
    if not emas:
        raise UserError(f"{folder} holds no checkpoint (no ema_RATE_STEP.pt): name a file, or train first")
    return max(emas)[-1]


def read_config(path: str | Path) -> RunConfig | None:
    """Read the `config.json` that training, `scripts/export.py` or `save_pretrained` wrote beside a checkpoint.

    :param path: a checkpoint, or the folder that holds it.
    :return: the configuration, or None if there is no `config.json`.
    :raises UserError: for a file that cannot be read or holds something else; the message names the file.
    """
    in_sharded = is_sharded(path) or is_sharded(Path(path).parent)
    file = Path(path if Path(path).is_dir() and not in_sharded else run_folder(path), CONFIG_NAME)
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
