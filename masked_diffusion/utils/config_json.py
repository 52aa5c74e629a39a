"""The form of a `config.json`, which may come from another program or be damaged."""

import math
from typing import Any

from .errors import UserError


def check_config_json(found: Any) -> None:
    """Refuse parsed JSON that is not the `config.json` of a training run, an export or `save_pretrained`.

    :raises UserError: for entries of the wrong type. The message says what is wrong; the caller adds the file's name.
    """
    if not isinstance(found, dict):
        raise UserError(f"it holds a {type(found).__name__} instead of a dictionary")
    for key in ("model", "diffusion", "flags", "auto_microbatch"):
        part = found.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"its {key!r} is {part!r} instead of a dictionary")
    model = found.get("model")
    if model and not (isinstance(model.get("name"), str) and isinstance(model.get("options", {}), dict)):
        raise UserError(f"its 'model' is {model!r}: it needs a 'name', and 'options' that are a dictionary")
    autoencoder = found.get("autoencoder", {})
    if not isinstance(autoencoder, dict) or not all(map(_is_number, autoencoder.values())):
        raise UserError(f"its 'autoencoder' is {autoencoder!r}: it must be a dictionary of numbers")
    if autoencoder and not ({"scale", "shift"} <= set(autoencoder) and autoencoder["scale"] > 0):
        raise UserError(f"its 'autoencoder' is {autoencoder!r}: it needs a scale above 0 and a shift")
    classes, vae = found.get("classes") or [], found.get("vae", "ema")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError("its 'classes' are not a list of names")
    if not isinstance(vae, str):
        raise UserError(f"its 'vae' is {vae!r} instead of a name")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
