"""What the sampling scripts share: flags, and the weights and samplers that flags describe."""

import argparse
from typing import NamedTuple

import torch

from .. import dist_util
from ..config import RunConfig
from ..guidance import RULES, Guidance
from ..latents.autoencoder import create_first_stage
from ..models import create_model
from ..script_util import optional_float, precision_of, str2bool
from ..utils.errors import UserError
from ..utils.files import file_hash
from ..utils.precision import PRECISIONS, check_precision, set_matmul_precision
from ..weights.checkpoint import read_config
from ..weights.pretrained import find_weights, load_model
from .class_names import class_names
from .image_sampler import ImageSampler
from .solvers import SOLVERS, create_solver


def channels(text):
    """`3`, or None for `all`."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of channels nor all")
    return int(text)


def add_weights_flags(parser, default=None):
    """:param default: weights to take where none are named; None asks for some."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_path", required=default is None, default=default,
        help="checkpoint (.pt, .safetensors), training folder (its newest EMA), or hub id",
    )  # fmt: skip
    group.add_argument("--vae_decoder", help="ema, mse, a folder, identity; None: what training used, else ema")
    group.add_argument("--decode_batch", type=int, help="images that the VAE decodes at a time; None: the batch")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of the network")
    group.add_argument("--use_fp16", type=str2bool, default=False, help="the same as --precision fp16")
    group.add_argument("--compile", type=str2bool, default=False, help="compile the blocks")
    group.add_argument("--model", help="read off the checkpoint; if given, it must agree")
    group.add_argument("--image_size", type=int, help="read off the checkpoint; if given, it must agree")
    group.add_argument("--decode_layer", type=int, help="read off the checkpoint; if given, it must agree")
    group.add_argument(
        "--mask_ratio", type=optional_float, help="taken for the published commands: sampling masks nothing"
    )


def add_solver_flags(parser):
    group = parser.add_argument_group("solver")
    group.add_argument("--solver", choices=SOLVERS, help="None: ddpm, or ddim with --use_ddim True")
    group.add_argument("--num_sampling_steps", default="250", help="250; for ddpm and ddim also 10,15,20 and ddim50")
    group.add_argument("--use_ddim", type=str2bool, default=False, help="the same as --solver ddim")
    group.add_argument("--clip_denoised", type=str2bool, default=False, help="clip predicted x_start to [-1, 1]")
    group.add_argument("--seed", type=int, default=0, help="image i is a function of (seed, i)")


def add_guidance_flags(parser):
    group = parser.add_argument_group("guidance")
    group.add_argument("--cfg_cond", type=str2bool, default=False, help="guide, by the model's own rule")
    group.add_argument("--guidance", choices=RULES, help="None: power-cosine for MDT and MDTv2, constant for DiT")
    group.add_argument("--cfg_scale", type=float, default=3.8, help="guidance scale")
    group.add_argument("--scale_pow", type=float, default=4.0, help="power of the power-cosine schedule")
    group.add_argument(
        "--guidance_interval", type=float, nargs=2, default=(0, 1000), metavar=("FIRST", "LAST"),
        help="timesteps that the rule interval guides",
    )  # fmt: skip
    group.add_argument("--guide_path", help="a weaker checkpoint that guides instead of the null class: autoguidance")
    group.add_argument("--guided_channels", type=channels, default=3, help="how many channels are guided, or all")
    group.add_argument(
        "--skip_guidance_below", type=float, default=0.0,
        help="leave the guiding half out where the weight is so close to 1; 0: where it is 1; negative: never",
    )  # fmt: skip


def guidance_of(args, model, diffusion_steps):
    """The guidance that flags describe; a model has a rule of its own."""
    rule = args.guidance
    if rule is None and (args.cfg_cond or args.guide_path):
        rule = "constant" if args.guide_path else model.guidance_rule
    return Guidance(
        rule or "none",
        args.cfg_scale,
        args.scale_pow,
        tuple(args.guidance_interval),
        args.guided_channels,
        args.skip_guidance_below,
        diffusion_steps,
    )


def check_agreement(args, model, first_stage):
    """Refuse sampling flags that describe another model than the checkpoint's.

    :raises UserError: naming the flag and both values.
    """
    pairs = {
        "image_size": (args.image_size, model.input_size * first_stage.downsample),
        "decode_layer": (args.decode_layer, model.decode_layer),
    }
    if args.model:
        with torch.device("meta"):
            pairs["model"] = size_of(create_model(args.model)), size_of(model)
    for name, (asked, found) in pairs.items():
        if asked not in (None, found):
            raise UserError(f"--{name} asks for {asked}, but the checkpoint has {found}: leave the flag out")


def size_of(model):
    return f"{type(model).__name__} of depth {model.depth}, width {model.hidden_size}, patch {model.patch_size}"


class Weights(NamedTuple):
    """What takes long to load, and serves any number of samplers."""

    model: torch.nn.Module
    first_stage: object
    guide_model: torch.nn.Module | None
    diffusion: dict  # options of `create_diffusion` that the model was trained with
    names: list  # of the classes; [] where nobody knows them
    files: dict  # `weights` and `guide`: the files, or None
    settings: dict  # what else images are a function of as far as weights go, as JSON values


class Loaded(NamedTuple):
    sampler: ImageSampler
    names: list  # of the classes; [] where nobody knows them
    files: dict  # as in `Weights`
    settings: dict  # what images are a function of, but for the files and their classes, as JSON values


def load_sampler(args, batch_size=None):
    """Build what the flags of this module describe.

    :param batch_size: see `ImageSampler`; of effect in a compiled model.
    :raises UserError: for weights that cannot be had, and for flags that contradict them or each other.
    """
    solver_name(args)  # flags that contradict each other are refused before the weights are loaded
    return make_sampler(args, load_weights(args), batch_size)


def load_weights(args):
    """Load what `add_weights_flags` and `--guide_path` describe.

    :raises UserError: for weights that cannot be had, and for flags that contradict them.
    """
    precision = precision_of(args)
    check_precision(precision, dist_util.dev())
    set_matmul_precision(precision)
    with dist_util.main_first():
        weights = find_weights(args.model_path)
        guide = find_weights(args.guide_path) if args.guide_path else None
        run = read_config(weights) or RunConfig()
        vae = args.vae_decoder or run.model.vae
        first_stage = create_first_stage(vae, dist_util.dev())
    model = load_model(weights, dist_util.dev(), decode_layer=args.decode_layer)
    check_agreement(args, model, first_stage)
    guide_model = load_guide(guide, model) if guide else None
    if args.compile:
        for network in filter(None, (model, guide_model)):
            network.compile_blocks()
    files, settings = {"weights": weights, "guide": guide}, {"vae": vae, "precision": precision}
    diffusion = run.diffusion.options(model.default_snr_gamma) | {"learn_sigma": model.learn_sigma}
    names = class_names(run.classes, model.num_classes)
    return Weights(model, first_stage, guide_model, diffusion, names, files, settings)


def solver_name(args):
    """The solver that flags ask for.

    :raises UserError: where two flags ask for two.
    """
    if args.use_ddim and args.solver not in (None, "ddim"):
        raise UserError(f"--use_ddim True and --solver {args.solver} contradict each other: leave one out")
    return args.solver or ("ddim" if args.use_ddim else "ddpm")


def make_sampler(args, weights, batch_size=None):
    """Put solver and guidance of the flags around loaded weights; this takes milliseconds.

    :param weights: from `load_weights`. :param batch_size: as in `load_sampler`.
    :raises UserError: for steps that the solver cannot take, and for guidance that the model cannot have.
    """
    solver = create_solver(solver_name(args), args.num_sampling_steps, weights.diffusion)
    guidance = guidance_of(args, weights.model, solver.original_num_steps)
    sampler = ImageSampler(
        weights.model,
        solver,
        weights.first_stage,
        guidance=guidance,
        guide_model=weights.guide_model,
        clip_denoised=args.clip_denoised,
        precision=weights.settings["precision"],
        decode_batch=args.decode_batch,
        batch_size=batch_size if args.compile else None,
        seed=args.seed,
    )
    settings = weights.settings | {
        "seed": args.seed,
        "solver": solver_name(args),
        "num_sampling_steps": args.num_sampling_steps,
        "clip_denoised": args.clip_denoised,
        "guidance": guidance.describe(),
    }
    return Loaded(sampler, weights.names, weights.files, settings)


def load_guide(path, model):
    """The weaker model of autoguidance.

    :raises UserError: when it denoises other things than `model`.
    """
    guide = load_model(path, dist_util.dev())
    for name in ("input_size", "in_channels", "out_channels", "num_classes"):
        own, other = getattr(model, name), getattr(guide, name)
        if own != other:
            raise UserError(f"the guide {path} has {name} {other}, but the model has {own}: they must be the same")
    return guide


def hash_files(files):
    """SHA-256 of each of `Weights.files`, computed on rank 0: seconds for a large model."""
    hashes = {key: path and file_hash(path) for key, path in files.items()} if dist_util.is_main() else None
    return dist_util.broadcast_object(hashes)
