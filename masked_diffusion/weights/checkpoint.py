"""Files on disk: checkpoints that are whole or absent, and the configuration beside them.

File names are the published ones: `model{step:06d}.pt`, `ema_{rate}_{step:06d}.pt`, `opt{step:06d}.pt`. The first two
are plain state dicts. `opt` is written last: where it is, the checkpoint is complete.
"""

import itertools
import json
import re
import shutil
from pathlib import Path

import torch

from ..config import RunConfig
from ..utils.errors import UserError
from ..utils.files import atomic_write

CONFIG_NAME = "config.json"
SAVE_ADVICE = "make room and run the same command again; the last checkpoint is intact"

# ---------------------------------------------------------------- writing


def model_name(step):
    return f"model{step:06d}.pt"


def ema_name(rate, step):
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step):
    return f"opt{step:06d}.pt"


def save_checkpoint(folder, step, model_state, ema_states, train_state):
    """Write a complete checkpoint.

    :param ema_states: dict of EMA rates, as the user wrote them, to state dicts.
    :param train_state: dict of everything else that a resumed run needs.
    :raises DiskError: when the disk is full, say; no partial file stays.
    """
    files = {model_name(step): model_state}
    files |= {ema_name(rate, step): state for rate, state in ema_states.items()}
    files[opt_name(step)] = train_state
    for name, state in files.items():
        with atomic_write(Path(folder, name), SAVE_ADVICE) as file:
            torch.save(state, file)


def prune_checkpoints(folder, keep):
    """Remove all but the newest `keep` complete checkpoints, and what killed writers left; 0 keeps all of them."""
    for pattern in (".model*.partial", ".ema_*.partial", ".phema_*.partial", ".opt*.partial"):
        for path in Path(folder).glob(pattern):
            path.unlink()
    for step in complete_steps(folder)[:-keep] if keep else ():
        Path(folder, opt_name(step)).rename(Path(folder, f".{opt_name(step)}.pruned"))
    # A checkpoint that has lost its `opt` is none any more; the mark lets a killed removal be finished later.
    for mark in Path(folder).glob(".opt*.pt.pruned"):
        step = parse_step(mark.name[1:].removesuffix(".pruned"))
        for path in (Path(folder, model_name(step)), *Path(folder).glob(f"ema_*_{step:06d}.pt"), mark):
            path.unlink(missing_ok=True)


def set_aside(folder: str | Path, step: int) -> Path | None:
    """Move the checkpoints after a step into a folder of their own, with copies of the logs and the configuration.

    :param step: 0 moves them all.
    :return: that folder, or None where there was nothing to move.
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
    # `opt` first: a checkpoint without it is none, so a killed move leaves no mixture behind.
    for path in sorted(files, key=lambda path: not path.name.startswith("opt")):
        path.rename(aside / path.name)
    return aside


# ---------------------------------------------------------------- finding


def parse_step(path):
    """The step in a checkpoint's file name.

    :raises UserError: for a name that carries none.
    """
    match = re.fullmatch(r"(?:model|opt|ema_[^/]*_)(\d{6,})\.pt", Path(path).name)
    if not match:
        raise UserError(f"{path} names no step: it should be called like {model_name(1000)}")
    return int(match.group(1))


def complete_steps(folder):
    """The steps of all complete checkpoints in a folder, ascending."""
    steps = [parse_step(path) for path in Path(folder).glob("opt*.pt") if re.fullmatch(r"opt\d{6,}\.pt", path.name)]
    return sorted(step for step in steps if Path(folder, model_name(step)).exists())


def latest_step(folder):
    """The step of the newest complete checkpoint in a folder, or None."""
    return max(complete_steps(folder), default=None)


def newest_ema(folder):
    """The newest EMA of a training folder, of the slowest rate where there are several.

    :raises UserError: when the folder has no checkpoint.
    """
    emas = [path for path in Path(folder).glob("ema_*.pt") if re.fullmatch(r"ema_.+_\d{6,}\.pt", path.name)]
    if not emas:
        raise UserError(f"{folder} holds no checkpoint (no ema_RATE_STEP.pt): name a file, or train first")
    return max(emas, key=lambda path: (parse_step(path), float(path.name.split("_")[1])))


def read_config(path: str | Path) -> RunConfig | None:
    """The configuration that training, `scripts/export.py` or `save_pretrained` left beside a checkpoint, if any.

    :param path: a checkpoint, or the folder that holds it.
    :raises UserError: for a file that cannot be read or holds something else; names it.
    """
    file = Path(path if Path(path).is_dir() else Path(path).parent, CONFIG_NAME)
    if not file.exists():
        return None
    try:
        return RunConfig.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no configuration of a run: {error}") from error
