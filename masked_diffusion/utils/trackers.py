"""Experiment trackers: TensorBoard, Weights & Biases and Trackio, all with the same rows, images and configuration.

A run that resumes goes on in the tracker's own run. What it logs again, after the checkpoint that it resumed from,
replaces the old values in TensorBoard, and is a second value of its step in the others.
"""

import json
import os
import sys
import uuid
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import UserError
from .files import disk_errors, write_json

PROJECT, ID_NAME = "masked-diffusion", "tracker_run.json"
IMAGES = "images"  # before the names of images where they share a namespace with numbers, as TensorBoard's do not


class Run(NamedTuple):
    """What trackers are told of a run.

    :param folder: the log directory. :param suffix: added to the names of the run and of files.
    :param resumed_step: the step that the run resumes from; 0 or None: a new run.
    :param config: settings by name. :param id: what a tracker on a server knows the run by; None: there is none.
    """

    folder: Path
    suffix: str
    resumed_step: int | None
    config: dict[str, Any]
    id: str | None

    @property
    def name(self) -> str:
        return self.folder.name + self.suffix


class Tracker(Protocol):
    """What all of `TRACKERS` have. They write from the process that creates them."""

    def row(self, values: dict[str, float], step: int | None) -> None:
        """Add the values of a step, by name."""

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add an image: (H, W, 3) uint8 pixels."""

    def close(self) -> None:
        """Write what is left, and end."""


class TensorBoard:
    """Event files in the log directory."""

    def __init__(self, run: Run) -> None:
        # If TensorFlow is installed, TensorBoard imports it for its file functions, unless this module exists.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if run.resumed_step is None else run.resumed_step + 1
        with disk_errors(run.folder):
            self.writer = SummaryWriter(str(run.folder), purge_step=purge_step, filename_suffix=run.suffix)
            if run.config:
                lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in run.config.items())]
                self.writer.add_text("config", "\n".join(lines), run.resumed_step)

    def row(self, values: dict[str, float], step: int | None) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, whose settings are its environment variables, such as WANDB_MODE=offline."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.wandb = wandb
        options = {"dir": str(run.folder), "name": run.name, "id": run.id, "config": run.config}
        try:
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), resume="allow", **options)
        except wandb.errors.Error as error:
            raise UserError(
                f"--loggers wandb: wandb did not start ({error}); log in with `wandb login`, or set WANDB_MODE=offline "
                "and send the run later with `wandb sync`"
            ) from error
        # Its own step only grows, and would drop what a resumed run logs again.
        self.run.define_metric("*", step_metric="step")

    def row(self, values: dict[str, float], step: int | None) -> None:
        self.run.log(values)  # `step` is one of them

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.run.log({f"{IMAGES}/{name}": self.wandb.Image(pixels), "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of Trackio: on this machine, or where its environment variables such as TRACKIO_SPACE_ID say."""

    def __init__(self, run: Run) -> None:
        import trackio

        self.trackio = trackio
        name = f"{run.name}-{run.id}"  # it tells runs apart by their names
        trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, config=run.config, resume="allow")

    def row(self, values: dict[str, float], step: int | None) -> None:
        self.trackio.log({key: value for key, value in values.items() if key != "step"}, step=step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.trackio.log({f"{IMAGES}/{name}": self.trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def check_installed(names: Iterable[str]) -> None:
    """Refuse trackers whose packages are missing, before any work.

    :raises UserError: for the first of them; the message says what to install.
    """
    for name in names:
        spec = None if name in sys.modules else find_spec(name)
        if name not in sys.modules and (spec is None or spec.origin is None):  # a folder of that name has no origin
            raise UserError(
                f"--loggers {name} needs the package {name}, which is not installed: pip install {name}, or leave it "
                "out"
            )


def start_trackers(
    names: Iterable[str], folder: str | Path, suffix: str, resumed_step: int | None, config: dict[str, Any]
) -> list[Tracker]:
    """Start some of `TRACKERS`; see `Run` for the other parameters.

    :raises UserError: when a tracker refuses to start.
    """
    folder, names = Path(folder).absolute(), tuple(names)
    known_by = run_id(folder, resumed_step) if set(names) - {"tensorboard"} else None
    run = Run(folder, suffix, resumed_step, json.loads(json.dumps(config, default=str)), known_by)
    return [TRACKERS[name](run) for name in names]


def run_id(folder: Path, resumed_step: int | None) -> str:
    """The name under which trackers know the run of a log directory; a new one for a new run."""
    path = folder / ID_NAME
    if resumed_step and path.exists():
        try:
            return str(json.loads(path.read_text())["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} does not hold the name of a run ({error!r}): remove it, to go on in a new run of the trackers"
            ) from error
    found = uuid.uuid4().hex[:8]
    write_json(path, {"id": found})
    return found
