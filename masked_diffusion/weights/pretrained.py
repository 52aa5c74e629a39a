"""Models from weights: a file, a training folder, an exported folder or the hub; the architecture is read off them."""

import inspect
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import dist_util, logger
from ..config import RunConfig
from ..models import SIZES, DiT, create_model, model_class
from ..utils.errors import UserError
from .checkpoint import newest_ema, read_config

ARCHITECTURE_KEYS = {
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
}
EXPORTED_NAME = "model.safetensors"
HUB_NAMES = (EXPORTED_NAME, "mdt_xl2_v2_ckpt.pt", "mdt_xl2_v1_ckpt.pt")  # in a hub repository, the first that is there
PUBLISHED = "https://huggingface.co/shgao/MDT-XL2"

# ---------------------------------------------------------------- finding


def find_weights(source):
    """The file that a source names.

    :param source: a file (`.pt`, `.safetensors`); a training folder, of which the newest EMA is taken; an exported
        folder; or a hub id such as `shgao/MDT-XL2`, or `shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt` for one of its files.
    :raises UserError: when there is no such file.
    """
    path = Path(source)
    if path.is_dir():
        return path / EXPORTED_NAME if (path / EXPORTED_NAME).exists() else newest_ema(path)
    if path.exists():
        return path
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?", str(source))
    if hub and not (hub[2] is None and path.suffix in (".pt", ".safetensors")):
        return _fetch(hub[1], (hub[2],) if hub[2] else HUB_NAMES)
    raise UserError(f"{path} does not exist: name a checkpoint (.pt, .safetensors), a training folder or a hub id")


def _fetch(repository, names):
    """The first of some files that a hub repository has, from the cache or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline, reason = False, None
    for name in names:
        try:
            path = Path(hf_hub_download(repository, name, local_files_only=offline))
            if name == EXPORTED_NAME:
                hf_hub_download(repository, "config.json", local_files_only=offline)
            return path
        except LocalEntryNotFoundError as error:  # no connection: the cache may have another name
            reason, offline = reason or error, True
        except EntryNotFoundError as error:
            reason = reason or error
        except Exception as error:  # a repository that is absent, private or badly named
            reason = error
            break
    sentence = " ".join(str(reason).split()).split(". ")[0]
    raise UserError(
        f"{repository} is neither a local path nor in reach on the hub ({sentence}): fetch "
        f"{' or '.join(names)} of it (the published weights: {PUBLISHED}) and give the file's path"
    ) from reason


# ---------------------------------------------------------------- reading


def read_weights(path):
    """The state dict of a file: the file's own, or the EMA or model in the checkpoint of another code.

    :raises UserError: for a file that cannot be read, or holds no state dict.
    """
    state = read_safetensors(path) if Path(path).suffix == ".safetensors" else dist_util.load_state_dict(str(path))
    for key in ("ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not {key.removeprefix("module.") for key in state} >= ARCHITECTURE_KEYS:
        keys = list(state)[:3] if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} holds no state dict of DiT, MDT or MDTv2 (it begins with {keys})")
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_safetensors(path):
    """The tensors of a safetensors file.

    :raises UserError: for a file that is cut short or none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it is cut short or of another kind"
        ) from error


def find_architecture(state_dict, num_heads=None):
    """Read the family, sizes and options of a model off its state dict.

    What a state dict does not hold is taken from the paper: `decode_layer` of MDT (2), the heads of DiT (by its depth
    and width).

    :param num_heads: of a DiT of no named size.
    :return: name and options for `create_model`.
    :raises UserError: for a DiT of no named size, whose heads cannot be known.
    """

    def count(stack):
        return len({key.split(".")[1] for key in state_dict if key.startswith(stack + ".")})

    hidden_size, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    out_channels = state_dict["final_layer.linear.weight"].shape[0] // patch_size**2
    options = {
        "input_size": math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size,
        "in_channels": in_channels,
        "num_classes": state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
        "patch_size": patch_size,
    }
    table = next((v for k, v in state_dict.items() if k.endswith("relative_position_bias_table")), None)
    if count("en_inblocks") or count("de_blocks"):
        family, decode_layer = "MDTv2", count("de_blocks")
        depth = count("en_inblocks") + count("en_outblocks") + decode_layer
        options["decode_layer"] = decode_layer
    else:
        family, depth = "DiT" if table is None else "MDT", count("blocks")
    sizes = [name for name, size in SIZES.items() if (size.depth, size.hidden_size) == (depth, hidden_size)]
    if table is not None or num_heads is not None:
        options["num_heads"] = num_heads if table is None else table.shape[1]
    if not sizes:
        options |= {"depth": depth, "hidden_size": hidden_size}
        if "num_heads" not in options:
            raise UserError(
                f"a DiT of depth {depth} and width {hidden_size} has no name, and its weights do not tell its heads: "
                "keep the config.json of its training beside it"
            )
    return f"{family}_{sizes[0] if sizes else 'S'}_2", options


def describe(model):
    """Family and sizes of a model in a few words."""
    decoder = f", {model.decode_layer} of them decoder blocks" if model.decode_layer else ""
    return (
        f"{type(model).__name__} of {model.depth} blocks{decoder}, width {model.hidden_size}, "
        f"patch {model.patch_size}, {model.num_classes} classes, "
        f"input {model.in_channels}x{model.input_size}x{model.input_size}"
    )


class OpenedWeights(NamedTuple):
    """A file of weights, read.

    :param run: the configuration beside the file, if there is one.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    run: RunConfig | None


def open_weights(source: str | Path) -> OpenedWeights:
    """Find and read weights and the configuration beside them.

    :param source: see `find_weights`. Nothing but tensors is ever loaded from it.
    :raises UserError: for a file that is no checkpoint of these models, and for a folder without one.
    """
    path = find_weights(source)
    return OpenedWeights(path, read_weights(path), read_config(path))


def build_model(opened: OpenedWeights, device: str | torch.device = "cpu", **options: Any) -> DiT:
    """The model of opened weights, in eval mode; what was found is logged.

    The architecture comes from the configuration beside the file, if training or `save_pretrained` left one, else from
    the state dict.

    :param options: for `create_model`, where the file leaves them open: `decode_layer` of MDT, say. None is not given.
    :raises UserError: when weights and architecture do not fit.
    """
    known = opened.run.architecture if opened.run else {}
    name, found = known.get("name"), known.get("options", {})
    if name is None:  # what `save_pretrained` leaves has options alone
        name, read = find_architecture(opened.state_dict, found.get("num_heads"))
        found = read | {key: found[key] for key in inspect.signature(model_class(name)).parameters if key in found}
    options = found | {key: value for key, value in options.items() if value is not None}
    model = create_model(name, **options)
    try:
        model.load_state_dict(opened.state_dict)
    except RuntimeError as error:
        raise UserError(f"{opened.path} does not fit {name} {options}: {' '.join(str(error).split())}") from error
    logger.log(f"{opened.path}: {describe(model)}")
    return model.to(device).eval()


def load_model(source: str | Path, device: str | torch.device = "cpu", **options: Any) -> DiT:
    """A model with its weights, in eval mode: `build_model` of `open_weights`."""
    return build_model(open_weights(source), device, **options)
