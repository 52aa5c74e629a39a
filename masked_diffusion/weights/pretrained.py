"""Models from weights: a file, a training folder, an exported folder or the hub; the architecture is read off them."""

import inspect
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import dist_util, logger
from ..config import RunConfig
from ..layers.attention import UNREAD_ROWS
from ..models import SIZES, DiT, create_model, model_class
from ..utils.errors import UserError
from .checkpoint import CONFIG_NAME, newest_ema, read_config

ARCHITECTURE_KEYS = {
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "final_layer.linear.weight",
}
BIAS_NAME, INDEX_NAME = "relative_position_bias_table", "relative_position_index"
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)
EXPORTED_NAME = "model.safetensors"
HUB_NAMES = (EXPORTED_NAME, "mdt_xl2_v2_ckpt.pt", "mdt_xl2_v1_ckpt.pt")  # in a hub repository, the first that is there
PUBLISHED = "https://huggingface.co/shgao/MDT-XL2"

# ---------------------------------------------------------------- finding


def find_weights(source: str | Path) -> Path:
    """The file that a source names.

    :param source: a file (`.pt`, `.safetensors`); a training folder, of which the newest EMA is taken; an exported
        folder; or a hub id such as `shgao/MDT-XL2`, or `shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt` for one of its files.
    :raises UserError: when there is no such file, or one that begins unlike any checkpoint.
    """
    path = Path(source)
    if path.is_dir():
        path = path / EXPORTED_NAME if (path / EXPORTED_NAME).exists() else newest_ema(path)
    if path.exists():
        check_format(path)
        return path
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?", str(source))
    if hub and not (hub[2] is None and path.suffix in (".pt", ".safetensors")):
        return _fetch(hub[1], (hub[2],) if hub[2] else HUB_NAMES)
    raise UserError(f"{path} does not exist: name a checkpoint (.pt, .safetensors), a training folder or a hub id")


def check_format(path: Path) -> None:
    """Refuse a file by its first bytes, before anything slow is done with it or for it.

    :raises UserError: for a file that begins unlike those of `torch.save` and of safetensors, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another file") from error
    # A safetensors file begins with the length of its JSON header; torch.save writes a zip, and wrote pickles.
    known = head[8:9] == b"{" if path.suffix == ".safetensors" else head.startswith((b"PK", b"\x80"))
    if not known:
        kind = "safetensors" if path.suffix == ".safetensors" else "a checkpoint"
        raise UserError(f"{path} cannot be read as {kind} (it begins with {head!r}): it is of another kind, or empty")


def _fetch(repository: str, names: tuple[str, ...]) -> Path:
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


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a file: the file's own, or the EMA or model in the checkpoint of another code.

    :raises UserError: for a file that cannot be read, or holds no state dict of these models; see `check_state_dict`.
    """
    state = read_safetensors(path) if Path(path).suffix == ".safetensors" else dist_util.load_state_dict(str(path))
    for key in ("ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if isinstance(state, dict):
        state = {str(key).removeprefix("module."): value for key, value in state.items()}
    if not isinstance(state, dict) or not state.keys() >= ARCHITECTURE_KEYS:
        keys = list(state)[:3] if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} holds no state dict of DiT, MDT or MDTv2 (it begins with {keys})")
    try:
        check_state_dict(state)
    except UserError as error:
        raise UserError(f"{path} is damaged or of another program: {error}") from error
    return state


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    :raises UserError: for a file that is cut short or none.
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
            f"{path} cannot be read as safetensors ({error}): it is cut short or of another kind"
        ) from error


def check_state_dict(state: dict[str, Any]) -> None:
    """Refuse what no model of this package could compute with.

    :param state: with the keys `ARCHITECTURE_KEYS`.
    :raises UserError: for entries that are no tensors, are empty, not finite, or not of a floating-point format (tables
        of indices aside), and for tables whose shapes contradict each other. The caller names the file.
    """
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is a {type(value).__name__} instead of a tensor")
        if value.layout != torch.strided or value.is_meta:
            raise UserError(f"{name} holds no numbers in plain rows ({value.layout}, {value.device})")
        if not value.numel():
            raise UserError(f"{name} is empty, of shape {tuple(value.shape)}")
        wanted = INDEX_DTYPES if name.endswith(INDEX_NAME) else WEIGHT_DTYPES
        if value.dtype not in wanted:
            raise UserError(f"{name} is of {value.dtype}, but must be of {' or '.join(map(str, wanted))}")
        if not all(math.isfinite(extreme) for extreme in value.aminmax()):  # NaN makes both extremes NaN
            raise UserError(f"{name} holds numbers that are not finite (NaN or infinity)")

    def check(name, fits, wanted):
        if not fits(state[name].shape):
            raise UserError(f"{name} has the shape {tuple(state[name].shape)}, but must have {wanted}")

    check("x_embedder.proj.weight", lambda s: len(s) == 4 and s[2] == s[3], "(D, C, patch, patch)")
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    check("y_embedder.embedding_table.weight", lambda s: len(s) == 2 and s[1] == width, f"(classes + 1, {width})")
    check("pos_embed", lambda s: len(s) == 3 and s == (1, math.isqrt(s[1]) ** 2, width), f"(1, square, {width})")
    outputs = patch**2 * channels
    check(
        "final_layer.linear.weight",
        lambda s: len(s) == 2 and s[0] in (outputs, 2 * outputs) and s[1] == width,
        f"({outputs} or {2 * outputs}, {width})",
    )
    tokens = state["pos_embed"].shape[1]
    offsets = (2 * math.isqrt(tokens) - 1) ** 2 + UNREAD_ROWS
    for name, value in state.items():
        if name == "decoder_pos_embed":
            check(name, lambda s: s == (1, tokens, width), f"(1, {tokens}, {width})")
        elif name.endswith(BIAS_NAME):
            check(name, lambda s: len(s) == 2 and s[0] == offsets, f"({offsets}, heads)")
        elif name.endswith(INDEX_NAME):
            check(name, lambda s: s == (tokens, tokens), f"({tokens}, {tokens})")
            if value.min() < 0 or value.max() >= offsets:
                raise UserError(f"{name} points beyond the {offsets} rows of its table")


def read_sizes(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """The sizes that a checked state dict cannot hide: input_size, in_channels, patch_size, hidden_size and depth."""
    hidden_size, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    return {
        "input_size": math.isqrt(state_dict["pos_embed"].shape[1]) * patch_size,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": sum(
            count_blocks(state_dict, stack) for stack in ("blocks", "en_inblocks", "en_outblocks", "de_blocks")
        ),
    }


def count_blocks(state_dict: dict[str, torch.Tensor], stack: str) -> int:
    return len({key.split(".")[1] for key in state_dict if key.startswith(stack + ".")})


def find_architecture(
    state_dict: dict[str, torch.Tensor], num_heads: int | None = None
) -> tuple[str, dict[str, int | bool]]:
    """Read the family, sizes and options of a model off its state dict.

    What a state dict does not hold is taken from the paper: `decode_layer` of MDT (2), the heads of DiT (by its depth
    and width).

    :param state_dict: checked by `check_state_dict`. :param num_heads: of a DiT of no named size.
    :return: name and options for `create_model`.
    :raises UserError: for a DiT of no named size, whose heads cannot be known.
    """
    found = read_sizes(state_dict)
    depth, hidden_size, patch_size = found["depth"], found["hidden_size"], found["patch_size"]
    outputs = state_dict["final_layer.linear.weight"].shape[0] // patch_size**2
    options = {
        "input_size": found["input_size"],
        "in_channels": found["in_channels"],
        "num_classes": state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": outputs == 2 * found["in_channels"],
        "patch_size": patch_size,
    }
    table = next((v for k, v in state_dict.items() if k.endswith(BIAS_NAME)), None)
    family = "DiT" if table is None else "MDT"
    if count_blocks(state_dict, "en_inblocks") or count_blocks(state_dict, "de_blocks"):
        family = "MDTv2"
        options["decode_layer"] = count_blocks(state_dict, "de_blocks")
    sizes = [name for name, size in SIZES.items() if (size["depth"], size["hidden_size"]) == (depth, hidden_size)]
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


def describe(model: DiT) -> str:
    """Family and sizes of a model in a few words."""
    decoder = f", {model.decode_layer} of them decoder blocks" if model.decode_layer else ""
    return (
        f"{type(model).__name__} of {model.depth} blocks{decoder}, width {model.hidden_size}, "
        f"patch {model.patch_size}, {model.num_classes} classes, "
        f"input {model.in_channels}x{model.input_size}x{model.input_size}"
    )


class OpenedWeights(NamedTuple):
    """A file of weights, read and checked.

    :param state_dict: until `build_model` moves it into a model; empty then.
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


def configured_architecture(opened: OpenedWeights) -> tuple[str, dict[str, Any]]:
    """Name and options for `create_model`, from the configuration beside a file, else from its state dict.

    :raises UserError: for a configuration of another model, and for what `find_architecture` raises.
    """
    path, state_dict, run = opened
    known = run.architecture if run else {}
    name, options = known.get("name"), known.get("options", {})
    if name is None:  # what `save_pretrained` leaves has options alone
        name, read = find_architecture(state_dict, options.get("num_heads"))
        options = {key: options[key] for key in inspect.signature(model_class(name)).parameters if key in options}
        options = read | options
    for key, value in read_sizes(state_dict).items():
        if options.get(key, value) != value:
            raise UserError(
                f"{path.with_name(CONFIG_NAME)} has {key} {options[key]!r}, but the weights in {path.name} have "
                f"{value}: it belongs to another file"
            )
    return name, options


def build_model(opened: OpenedWeights, device: str | torch.device = "cpu", **options: Any) -> DiT:
    """The model of opened weights, in eval mode; what was found is logged.

    The architecture comes from the configuration beside the file, if training or `save_pretrained` left one, else from
    the state dict. Nothing is drawn from a random generator, and the weights are in memory once: they move out of
    `opened`, whose state dict is empty afterwards.

    :param options: for `create_model`, where the file leaves them open: `decode_layer` of MDT, say. None is not given.
    :return: a float32 model, whatever the precision of the weights.
    :raises UserError: when weights and architecture do not fit.
    """
    name, found = configured_architecture(opened)
    options = found | {key: value for key, value in options.items() if value is not None}
    try:
        with torch.device("meta"):
            model = create_model(name, **options)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # what odd options lead to
        raise UserError(f"{opened.path} is said to hold {name} {options}, which cannot be made: {error}") from error
    own = model.state_dict()
    check_fit(opened.path, own, opened.state_dict, f"{name} {options}")
    model.load_state_dict(move_tensors(opened.state_dict, own), assign=True)
    logger.log(f"{opened.path}: {describe(model)}")
    return model.to(device).eval()


def load_model(source: str | Path, device: str | torch.device = "cpu", **options: Any) -> DiT:
    """A model with its weights, in eval mode: `build_model` of `open_weights`."""
    return build_model(open_weights(source), device, **options)


def move_tensors(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Empty a state dict into another one, each tensor contiguous, in memory of its own and of the model's format.

    :param state: its tensors are let go one by one, so that those of another format are not in memory twice.
    :param own: the model's state dict, with the same keys; its formats count, not its numbers.
    """
    moved, taken = {}, set()
    for name in own:
        value = state.pop(name).detach().to(own[name].dtype).contiguous()
        memory = value.untyped_storage()
        # In the file of another code tensors may be parts of one buffer, or the same one under two names.
        if memory.nbytes() != value.nbytes or memory.data_ptr() in taken:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        moved[name] = value
    return moved


def check_fit(path: Path, own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], what: str) -> None:
    """Refuse a state dict that does not fit.

    :param own: the model's state dict. :param what: the model, for the message.
    :raises UserError: with the first keys that are missing, unknown or of another shape.
    """
    other = [f"{key} {tuple(found[key].shape)}" for key in own if key in found and found[key].shape != own[key].shape]
    faults = {
        "lacks": [key for key in own if key not in found],
        "has beyond": [key for key in found if key not in own],
        "has of another shape": other,
    }
    said = [f"{verb} {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" for verb, keys in faults.items() if keys]
    if said:
        raise UserError(f"{path} does not fit {what}: it {'; it '.join(said)}")
