"""Fine-tuning: start a model from weights that were trained for other classes or another image size."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import logger
from ..layers.attention import UNREAD_ROWS
from ..models import DiT
from ..utils.errors import UserError
from ..weights.checkpoint import read_config
from ..weights.pretrained import find_weights, read_weights

POSITION_TABLES = ("pos_embed", "decoder_pos_embed")
BIAS_TABLE = "relative_position_bias_table"
LABEL_TABLE = "y_embedder.embedding_table.weight"


def load_pretrained(model: DiT, source: str | Path, class_names: Sequence[str] = ()) -> None:
    """Load weights into a model that may have other classes or another input size. Every adaptation is logged.

    Position and bias tables are interpolated. Rows of the label table are copied by class name if the class names of
    both are known (those of the file from the configuration beside it), else by label if both have the same number of
    classes. The null class is always copied. All other classes keep their new initial rows and are listed.

    :param source: weights of the same family, depth and width: a file, a training folder (its newest EMA is used), an
        exported folder or a hub id; see `find_weights`. A remote path (`gs://...`) is read as a file.
    :param class_names: names of the model's classes, in the order of their labels.
    :raises UserError: when the weights do not exist, and when anything else than these tables differs.
    """
    path = source if "://" in str(source) else find_weights(source)
    state, own = read_weights(path), model.state_dict()
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unknown:
        differences = [f"lacks {sorted(missing)[:3]}"] * bool(missing) + [f"has {sorted(unknown)[:3]}"] * bool(unknown)
        raise UserError(
            f"{path} belongs to another model: it {' and it '.join(differences)}; "
            "choose the --model, --decode_layer and --qk_norm that it was trained with"
        )
    run = read_config(path)
    old_names = run.classes if run else ()
    for name, value in own.items():
        if name.endswith("relative_position_index"):
            state[name] = value
        elif name == LABEL_TABLE:
            state[name] = _move_labels(state[name], value, old_names, class_names)
        elif state[name].shape != value.shape:
            state[name] = _interpolate(name, state[name], value.shape)
    model.load_state_dict(state)
    if str(path) != str(source):
        logger.log(f"weights of {source} from {path}")


def _interpolate(name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if name in POSITION_TABLES and value.shape[2] == shape[2]:
        old, new = math.isqrt(value.shape[1]), math.isqrt(shape[1])
        grid = value.view(1, old, old, -1).permute(0, 3, 1, 2)
        logger.log(f"{name}: interpolated from {old} x {old} to {new} x {new} tokens")
        return _resize(grid, new).permute(0, 2, 3, 1).reshape(shape)
    if name.endswith(BIAS_TABLE) and value.shape[1] == shape[1]:
        old, new = math.isqrt(value.shape[0] - UNREAD_ROWS), math.isqrt(shape[0] - UNREAD_ROWS)
        grid = value[:-UNREAD_ROWS].t().reshape(1, -1, old, old)
        resized = _resize(grid, new).reshape(shape[1], -1).t()
        return torch.cat([resized, value[-UNREAD_ROWS:]])
    raise UserError(
        f"{name} has shape {tuple(value.shape)}, but the model needs {tuple(shape)}: choose the --model that these "
        "weights were trained with"
    )


def _resize(grid: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(grid.float(), (size, size), mode="bicubic", align_corners=False).to(grid.dtype)


def _move_labels(old: torch.Tensor, own: torch.Tensor, old_names: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """The model's label table, with the rows of the old table for all classes that it has."""
    if old.shape[1] != own.shape[1]:
        raise UserError(
            f"the label table is {old.shape[1]} wide, but the model's is {own.shape[1]} wide: choose the --model that "
            "these weights were trained with"
        )
    if len(old_names) == len(old) - 1 and names:
        rows = {i: old_names.index(name) for i, name in enumerate(names) if name in old_names}
    else:
        rows = {i: i for i in range(len(own) - 1)} if old.shape == own.shape else {}
    table = own.clone()
    table[-1] = old[-1]
    for new_row, old_row in rows.items():
        table[new_row] = old[old_row]
    fresh = [str(names[i]) if i < len(names) else str(i) for i in range(len(own) - 1) if i not in rows]
    if fresh:
        shown = ", ".join(fresh[:20]) + (", ..." if len(fresh) > 20 else "")
        logger.log(f"{len(fresh)} of {len(own) - 1} classes are new and start from random rows: {shown}")
    return table
