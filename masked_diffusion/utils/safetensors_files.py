"""Reading safetensors files."""

from pathlib import Path

import torch

from .errors import UserError


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    :raises UserError: for a file that cannot be read, is truncated or of another format.
    """
    from safetensors import SafetensorError, safe_open

    state = {}
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for first in range(0, len(names), 16):
            # These are views of the mapped file: they would change with it, and its pages count as this process's
            # memory until the file is closed. So they are copied, and it is opened again for the next few.
            with safe_open(path, "pt") as file:
                state |= {name: file.get_tensor(name).clone() for name in names[first : first + 16]}
        return state
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it is truncated or of another format; name another file"
        ) from error
