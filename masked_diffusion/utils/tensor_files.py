"""Files of tensors that `torch.save` wrote, as everything here reads them: without ever running what they hold."""

import argparse
import re
from pathlib import Path
from typing import Any

import blobfile as bf
import torch

from .errors import UserError


def load_state_dict(
    path: str, map_location: torch.device | str = "cpu", mmap: bool = False, weights_only: bool = True
) -> Any:
    """Read a file of tensors that `torch.save` wrote. Code in the file is never run.

    :param path: a local path, or a remote one that blobfile can read.
    :param mmap: map a local file into memory instead of reading it: its tensors are read when they are used.
    :param weights_only: must be True, as it always is here.
    :raises FileNotFoundError: if there is no such file.
    :raises UserError: for a file that is truncated, is no checkpoint, or holds objects other than tensors and the flags
        of a script; and for `weights_only` False.
    """
    if not weights_only:
        raise UserError(
            f"weights_only is {weights_only}, but {path} could then run any code: leave it out, only tensors are read"
        )
    options = {"map_location": map_location, "weights_only": True}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # of flags, in the checkpoints of DiT's train.py
            if mmap and Path(path).is_file():
                return torch.load(path, mmap=True, **options)
            with bf.BlobFile(path, "rb") as file:
                return torch.load(file, **options)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError
        raise UserError(
            f"{path} cannot be read as a checkpoint ({_unreadable_because(error)}): it is truncated, another kind of "
            "file, or holds objects other than tensors, which are never loaded"
        ) from error


def _unreadable_because(error: Exception) -> str:
    """What torch found, without its advice to load the file as code and without its bold type."""
    text = re.sub(r"\x1b\[\d+m", "", str(error)).strip() or type(error).__name__
    found = re.search(r"unsupported (?:global: )?(?:global|class|operand) [\w.]*\w", text, re.IGNORECASE)
    return found[0] if found else text.splitlines()[0].split(". ")[0]
