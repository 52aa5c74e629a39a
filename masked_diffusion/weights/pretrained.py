"""Load models from a file, a training folder, an exported folder or the hub. The weights tell the architecture."""

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import logger
from ..config import RunConfig
from ..layers.attention import UNREAD_ROWS
from ..models import SIZES, DiT, create_model, model_class
from ..utils.errors import UserError
from ..utils.safetensors_files import read_safetensors
from ..utils.tensor_files import load_state_dict
from .checkpoint import CONFIG_NAME, is_sharded, newest_ema, read_config

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
HUB_NAMES = (EXPORTED_NAME, "mdt_xl2_v2_ckpt.pt", "mdt_xl2_v1_ckpt.pt")  # the first that a hub repository has is used
PUBLISHED = "https://huggingface.co/shgao/MDT-XL2"

# ---------------------------------------------------------------- finding


def find_weights(source: str | Path) -> Path:
    """The path of a weights file; files on the hub are downloaded.

    :param source: a file (`.pt`, `.safetensors`); a training folder, whose newest EMA is used; a sharded checkpoint,
        whose EMA is used, or one of its subfolders; an exported folder; or a hub id such as `shgao/MDT-XL2`, or
        `shgao/MDT-XL2/mdt_xl2_v1_ckpt.pt` for one of its files.
    :return: the file, or the subfolder of a sharded checkpoint.
    :raises UserError: when there is no such file, or its first bytes are not those of a checkpoint.
    """
    path = Path(source)
    if path.is_dir() and not is_sharded(path.parent):
        path = path / EXPORTED_NAME if (path / EXPORTED_NAME).exists() else newest_ema(path)
    if path.is_dir():
        return path
    if path.exists():
        check_format(path)
        return path
    hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:/([\w./-]+))?", str(source))
    if hub and not (hub[2] is None and path.suffix in (".pt", ".safetensors")):
        return _fetch(hub[1], (hub[2],) if hub[2] else HUB_NAMES)
    raise UserError(f"{path} does not exist: name a checkpoint (.pt, .safetensors), a training folder or a hub id")


def check_format(path: Path) -> None:
    """Check the first bytes of a file, before any slow step such as loading it or downloading a VAE.

    :raises UserError: for a file that cannot be read, or is written neither by `torch.save` nor by safetensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another file") from error
    # A safetensors file begins with the length of its JSON header. torch.save writes a zip file; old versions a pickle.
    known = head[8:9] == b"{" if path.suffix == ".safetensors" else head.startswith((b"PK", b"\x80"))
    if not known:
        kind = "safetensors" if path.suffix == ".safetensors" else "a checkpoint"
        raise UserError(
            f"{path} cannot be read as {kind} (it begins with {head!r}): it is empty or of another format; name "
            "another file"
        )


def _fetch(repository: str, names: tuple[str, ...]) -> Path:
    """Download the first of `names` that a hub repository has, unless it is in the local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline, reason = False, None
    for name in names:
        try:
            path = Path(hf_hub_download(repository, name, local_files_only=offline))
            if name == EXPORTED_NAME:
                hf_hub_download(repository, "config.json", local_files_only=offline)
            return path
        except LocalEntryNotFoundError as error:  # no connection: one of the other names may be in the cache
            reason, offline = reason or error, True
        except EntryNotFoundError as error:
            reason = reason or error
        except Exception as error:  # a repository that does not exist, is private or has an invalid name
            reason = error
            break
    sentence = " ".join(str(reason).split()).split(". ")[0]
    raise UserError(
        f"{repository} is not a local path, and cannot be downloaded from the hub ({sentence}): download "
        f"{' or '.join(names)} of it by hand (the published weights: {PUBLISHED}) and name that file"
    ) from reason


# ---------------------------------------------------------------- reading


def read_weights(path: str | Path, mmap: bool = False) -> dict[str, torch.Tensor]:
    """The state dict in a file. In checkpoints of other codebases it is the entry `ema`, `model` or `state_dict`.

    :param mmap: see `load_state_dict`; only for files that this code wrote.

    :raises UserError: for a file that cannot be read or holds no state dict of these models; see `check_state_dict`.
    """
    state = read_tensors(path, mmap)
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
        raise UserError(f"{path} is damaged or of another program: {error}; name another file") from error
    return state


def read_tensors(path: str | Path, mmap: bool = False) -> Any:
    """What a file of tensors holds, or a subfolder of a sharded checkpoint.

    :param mmap: see `load_state_dict`.
    """
    if is_sharded(Path(path).parent):
        from .sharded import read_section

        return read_section(Path(path))
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    return load_state_dict(str(path), mmap=mmap)


def check_state_dict(state: dict[str, Any]) -> None:
    """Refuse a state dict that no model of this package could use.

    :param state: with at least the keys `ARCHITECTURE_KEYS`.
    :raises UserError: for entries that are not tensors, are empty, not finite or not floating-point (except tables of
        indices), and for tables whose shapes contradict each other. The caller adds the file's name.
    """
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{name} is a {type(value).__name__} instead of a tensor")
        if value.layout != torch.strided or value.is_meta:
            raise UserError(f"{name} is not a dense tensor with data ({value.layout}, {value.device})")
        if not value.numel():
            raise UserError(f"{name} is empty, of shape {tuple(value.shape)}")
        wanted = INDEX_DTYPES if name.endswith(INDEX_NAME) else WEIGHT_DTYPES
        if value.dtype not in wanted:
            raise UserError(f"{name} is of {value.dtype}, but must be of {' or '.join(map(str, wanted))}")
        if not all(math.isfinite(extreme) for extreme in value.aminmax()):  # NaN makes both extremes NaN
            raise UserError(f"{name} holds numbers that are not finite (NaN or infinity)")

    def check(name: str, fits: Callable[[torch.Size], bool], wanted: str) -> None:
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
                raise UserError(f"{name} has an index outside the {offsets} rows of its table")


def read_sizes(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    """The sizes that a state dict shows: input_size, in_channels, patch_size, hidden_size and depth.

    :param state_dict: checked by `check_state_dict`.
    """
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
    """The number of blocks in a stack such as `blocks` or `de_blocks`."""
    return len({key.split(".")[1] for key in state_dict if key.startswith(stack + ".")})


def find_architecture(
    state_dict: dict[str, torch.Tensor], num_heads: int | None = None
) -> tuple[str, dict[str, int | bool]]:
    """Determine the family, sizes and options of a model from its state dict.

    What a state dict does not show is taken from the paper: `decode_layer` of MDT (2), and the number of heads of DiT
    without QK-norm (from its depth and width).

    :param state_dict: checked by `check_state_dict`.
    :param num_heads: needed for a DiT whose depth and width are none of the named sizes.
    :return: name and options for `create_model`.
    :raises UserError: for such a DiT without `num_heads`.
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
    sizes = [name for name, size in SIZES.items() if (size.depth, size.hidden_size) == (depth, hidden_size)]
    head_norm = next((v for k, v in state_dict.items() if k.endswith("attn.q_norm.weight")), None)
    if head_norm is not None:
        options["qk_norm"], num_heads = True, hidden_size // len(head_norm)
    if table is not None or num_heads is not None:
        options["num_heads"] = num_heads if table is None else table.shape[1]
    if not sizes:
        options |= {"depth": depth, "hidden_size": hidden_size}
        if "num_heads" not in options:
            raise UserError(
                f"a DiT of depth {depth} and width {hidden_size} is none of the named sizes, and its weights do not "
                "tell the number of heads: put the config.json of its training beside it"
            )
    return f"{family}_{sizes[0] if sizes else 'S'}_2", options


def describe(model: DiT) -> str:
    """A short description of a model: its family and sizes."""
    decoder = f", {model.decode_layer} of them decoder blocks" if model.decode_layer else ""
    decoder += ", with QK-norm" if model.qk_norm else ""
    return (
        f"{type(model).__name__} of {model.depth} blocks{decoder}, width {model.hidden_size}, "
        f"patch {model.patch_size}, {model.num_classes} classes, "
        f"input {model.in_channels}x{model.input_size}x{model.input_size}"
    )


class OpenedWeights(NamedTuple):
    """The checked contents of a weights file.

    :param state_dict: until `build_model` moves it into a model; empty then.
    :param run: the configuration beside the file, or None.
    """

    path: Path
    state_dict: dict[str, torch.Tensor]
    run: RunConfig | None


def open_weights(source: str | Path) -> OpenedWeights:
    """Find and read a weights file and the configuration beside it.

    :param source: see `find_weights`. Only tensors are loaded from it, never code.
    :raises UserError: for a file that is not a checkpoint of these models, and for a folder without one.
    """
    path = find_weights(source)
    return OpenedWeights(path, read_weights(path), read_config(path))


def configured_architecture(opened: OpenedWeights) -> tuple[str, dict[str, Any]]:
    """Name and options for `create_model`, from the configuration beside the file or else from the weights.

    :raises UserError: for a configuration that belongs to another model, and as `find_architecture`.
    """
    path, state_dict, run = opened
    known = run.architecture if run else {}
    name, options = known.get("name"), known.get("options", {})
    if name is None:  # the file of `save_pretrained` has only options
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
    """Build the model of opened weights, in eval mode, and log what it is.

    The architecture comes from the configuration beside the file, if there is one, else from the state dict. Nothing is
    drawn from a random generator, and the weights are in memory once: they move out of `opened`, whose state dict is
    empty afterwards.

    :param options: for `create_model`, to add what the file does not tell, such as `decode_layer` of MDT. None means
        not given.
    :return: a float32 model, for weights of any precision.
    :raises UserError: when weights and architecture do not match.
    """
    name, found = configured_architecture(opened)
    options = found | {key: value for key, value in options.items() if value is not None}
    try:
        with torch.device("meta"):
            model = create_model(name, **options)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # impossible options raise any of these
        raise UserError(
            f"{opened.path}: the model {name} {options} cannot be built ({error}): the file or {CONFIG_NAME} beside it "
            "is damaged or of another program"
        ) from error
    own = model.state_dict()
    check_fit(opened.path, own, opened.state_dict, f"{name} {options}")
    model.load_state_dict(move_tensors(opened.state_dict, own), assign=True)
    logger.log(f"{opened.path}: {describe(model)}")
    return model.to(device).eval()


def load_model(source: str | Path, device: str | torch.device = "cpu", **options: Any) -> DiT:
    """Load a model with its weights, in eval mode: `open_weights`, then `build_model`."""
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
    """Refuse a state dict that does not match a model.

    :param own: the model's state dict. :param found: the state dict of the file. :param what: the model, for messages.
    :raises UserError: when keys are missing, unknown or of another shape; the message has the first ones.
    """
    other = [f"{key} {tuple(found[key].shape)}" for key in own if key in found and found[key].shape != own[key].shape]
    faults = {
        "lacks": [key for key in own if key not in found],
        "has the unknown": [key for key in found if key not in own],
        "has other shapes for": other,
    }
    said = [f"{verb} {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}" for verb, keys in faults.items() if keys]
    if said:
        raise UserError(f"{path} does not fit {what}: it {'; it '.join(said)}")
