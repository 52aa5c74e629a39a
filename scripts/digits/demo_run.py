"""What the demo and the studies of its model share: guidance, grader, and the folder that `make demo` leaves."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from masked_diffusion.guidance import Guidance
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.weights.pretrained import build_model, open_weights

grade_digits = load_evaluations("grade_digits")

GUIDANCE = Guidance("power-cosine", 1.5, scale_pow=1.0)  # small classes of small images need little of it


class DemoRun(NamedTuple):
    """What `make demo` left."""

    model: torch.nn.Module
    diffusion: dict[str, Any]  # options of `create_diffusion` that it was trained with
    data: Path  # folder with the real digits, `train` and `test`


def open_demo(folder: str) -> DemoRun:
    """Load the model of the demo.

    :param folder: the demo's `--out`.
    :raises UserError: where the demo has not been run.
    """
    train, data = Path(folder, "train"), Path(folder, "data")
    for path in (train, data / "test"):
        if not path.is_dir():
            raise UserError(f"{path} is not there: run `make demo` first, or name its folder with --demo")
    opened = open_weights(train)
    model = build_model(opened)
    return DemoRun(model, opened.run.diffusion.options(model.default_snr_gamma), data)
