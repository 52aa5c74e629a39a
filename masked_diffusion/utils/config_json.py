"""The form of a `config.json`, which may come from another program or be damaged."""

from typing import Any

from .errors import UserError


def check_config_json(found: Any) -> None:
    """Refuse parsed JSON that is not the `config.json` of a training run, an export or `save_pretrained`.

    :raises UserError: for entries of the wrong type. The message says what is wrong; the caller adds the file's name.
    """
    if not isinstance(found, dict):
        raise UserError(f"it holds a {type(found).__name__} instead of a dictionary")
    for key in ("model", "diffusion", "flags"):
        part = found.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"its {key!r} is {part!r} instead of a dictionary")
    model = found.get("model")
    if model and not (isinstance(model.get("name"), str) and isinstance(model.get("options", {}), dict)):
        raise UserError(f"its 'model' is {model!r}: it needs a 'name', and 'options' that are a dictionary")
    classes, vae = found.get("classes") or [], found.get("vae", "ema")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError("its 'classes' are not a list of names")
    if not isinstance(vae, str):
        raise UserError(f"its 'vae' is {vae!r} instead of a name")
