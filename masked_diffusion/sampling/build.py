"""From a `SampleConfig` to an image sampler: weights and model, first stage, then solver and guidance around them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import dist_util, logger
from ..config import RunConfig
from ..guidance import Guidance, resolve_channels
from ..latents.autoencoder import check_first_stage, create_first_stage
from ..layers.relative_attention import check_implementation
from ..models import MDT, create_model, model_class
from ..sample_config import CFG_SCALE, SCALE_POW, GuidanceConfig, SampleConfig, TrainedConfig, WeightsConfig
from ..utils.errors import UserError
from ..utils.files import file_hash
from ..utils.precision import PRECISIONS, check_precision, choose_precision, set_matmul_precision
from ..weights.checkpoint import CONFIG_NAME, MANIFEST_NAME
from ..weights.pretrained import OpenedWeights, build_model, configured_architecture, open_weights
from .class_names import class_names
from .cuda_graphs import GraphedForward
from .image_sampler import ImageSampler
from .solvers import DiffusionSolver, FlowSolver, SchedulerSolver, create_solver


class LoadedWeights(NamedTuple):
    """What takes long to load, and serves any number of image samplers.

    :param diffusion: options of `create_diffusion` that the model was trained with, its objective among them.
    :param class_names: in the order of their labels; [] where they are not known.
    :param files: `weights` and `guide`, each a file or None.
    :param vae: name of the first stage.
    """

    model: torch.nn.Module
    guide_model: torch.nn.Module | None
    first_stage: Any
    diffusion: dict[str, Any]
    class_names: list[str]
    files: dict[str, Path | None]
    vae: str


def load_image_sampler(
    config: SampleConfig, batch_size: int | None = None, quantize: str = "round"
) -> tuple[ImageSampler, LoadedWeights]:
    """Load weights, and put solver and guidance around them.

    :param batch_size: see `ImageSampler`; of effect in a compiled model. :param quantize: see `to_uint8`.
    :raises UserError: for weights that cannot be had, and for flags that contradict them.
    """
    weights = load_weights(config)
    return make_image_sampler(config, weights, batch_size, quantize), weights


def load_weights(config: SampleConfig) -> LoadedWeights:
    """The slow half of `load_image_sampler`. The first stage, which may have to be downloaded, comes last.

    :raises UserError: for weights that cannot be had, and for flags that contradict them.
    """
    device = dist_util.dev()
    precision = choose_precision(config.precision, device)
    if config.precision == "auto":
        logger.log(f"precision: {precision}, chosen by --precision auto for the {device.type.upper()} of this machine")
    check_precision(precision, device)
    check_implementation(config.weights.attention, device)
    set_matmul_precision(precision)
    with dist_util.main_first():
        opened = open_weights(config.weights.model_path)
        guide = open_weights(config.guidance.guide_path) if config.guidance.guide_path else None
    name, _ = configured_architecture(opened)
    # The weights of MDT do not tell its decode_layer; the other families' do.
    open_options = {"decode_layer": config.weights.decode_layer} if model_class(name) is MDT else {}
    model = build_model(opened, device, **open_options)
    check_agreement(config.weights, model)
    run = opened.run or RunConfig()
    diffusion = run.diffusion.options(model.default_snr_gamma) | {"learn_sigma": model.learn_sigma}
    check_trained(config.weights.trained, opened, diffusion | {"class_cond": model.num_classes > 0})
    guide_model = build_guide(guide, model, diffusion["objective"], device) if guide else None
    for network in filter(None, (model, guide_model)):
        network.set_attention(config.weights.attention, device)
    in_use = model.attention_in_use(device, PRECISIONS[precision])
    logger.log(f"attention: {in_use} (--attention {config.weights.attention})")
    names = class_names(run.classes, model.num_classes)
    # Made here once, so that steps and guidance that the model cannot have are refused before a download.
    solver = make_solver(config, diffusion)
    guidance = create_guidance(config.guidance, model, solver.original_num_steps)
    if unused := config.guidance.unused(guidance.rule):
        logger.log(f"not used by guidance rule {guidance.rule}: {', '.join(unused)}")
    vae = config.weights.vae_decoder or run.model.vae
    with dist_util.main_first():
        compiled = ["decoder"] if config.weights.compile else []
        first_stage = create_first_stage(vae, device, config.weights.vae_precision, compiled)
    check_first_stage(first_stage, model.in_channels, run.autoencoder)
    check_image_size(config.weights, model, first_stage)
    if config.weights.compile:
        for network in filter(None, (model, guide_model)):
            network.compile_blocks()
            network.forward = GraphedForward(network)
    files = {"weights": opened.path, "guide": guide.path if guide else None}
    return LoadedWeights(model, guide_model, first_stage, diffusion, names, files, vae)


def make_image_sampler(
    config: SampleConfig, weights: LoadedWeights, batch_size: int | None = None, quantize: str = "round"
) -> ImageSampler:
    """The quick half of `load_image_sampler`: it takes milliseconds.

    :raises UserError: for steps that the solver cannot take, and for guidance that the model cannot have.
    """
    solver = make_solver(config, weights.diffusion)
    return ImageSampler(
        weights.model,
        solver,
        weights.first_stage,
        guidance=create_guidance(config.guidance, weights.model, solver.original_num_steps),
        guide_model=weights.guide_model,
        clip_denoised=config.solver.clip_denoised,
        precision=choose_precision(config.precision, dist_util.dev()),
        decode_batch=config.weights.decode_batch,
        batch_size=batch_size if config.weights.compile else None,
        quantize=quantize,
        seed=config.solver.seed,
    )


def make_solver(config: SampleConfig, diffusion: dict[str, Any]) -> DiffusionSolver | SchedulerSolver | FlowSolver:
    """The solver that flags describe. See `create_solver`.

    :param diffusion: options of `create_diffusion` that the model was trained with.
    """
    name = config.solver.name(diffusion["objective"])
    return create_solver(name, config.solver.num_sampling_steps, diffusion)


def create_guidance(config: GuidanceConfig, model: torch.nn.Module, diffusion_steps: int) -> Guidance:
    """The guidance that flags describe, with their defaults.

    :param model: has a rule of its own. :param diffusion_steps: of the trained schedule.
    """
    return Guidance(
        config.rule(model.guidance_rule),
        CFG_SCALE if config.cfg_scale is None else config.cfg_scale,
        SCALE_POW if config.scale_pow is None else config.scale_pow,
        config.guidance_interval or (0, diffusion_steps),
        resolve_channels(config.guided_channels, model.in_channels),
        config.skip_guidance_below,
        diffusion_steps,
    )


def weights_hash(path: Path) -> str:
    """Of a file of weights; of a subfolder of a sharded checkpoint, its name and the checksums in the manifest."""
    return f"{file_hash(path.parent / MANIFEST_NAME)} {path.name}" if path.is_dir() else file_hash(path)


def describe(config: SampleConfig, image_sampler: ImageSampler, weights: LoadedWeights) -> dict[str, Any]:
    """What images are a function of, but for their labels, as JSON values. All ranks call it together.

    The files are hashed, which takes seconds for a large model.
    """
    hashes = {key: path and weights_hash(path) for key, path in weights.files.items()} if dist_util.is_main() else None
    return {
        "vae": weights.vae,
        "vae_precision": weights.first_stage.precision,
        "precision": image_sampler.precision,
        "seed": config.solver.seed,
        "solver": image_sampler.solver.name,
        "num_sampling_steps": config.solver.num_sampling_steps,
        "clip_denoised": config.solver.clip_denoised,
        "guidance": image_sampler.denoise.guidance.describe(),
        "quantize": image_sampler.quantize,
        **dist_util.broadcast_object(hashes),
    }


# ---------------------------------------------------------------- flags and weights that must fit


def check_agreement(config: WeightsConfig, model: torch.nn.Module) -> None:
    """Refuse flags that describe another model than the checkpoint's.

    :raises UserError: naming the flag and both values.
    """
    pairs = {"decode_layer": (config.decode_layer, model.decode_layer)}
    if config.model:
        with torch.device("meta"):
            pairs["model"] = size_of(create_model(config.model)), size_of(model)
    for name, (asked, found) in pairs.items():
        if asked not in (None, found):
            raise UserError(f"--{name} asks for {asked}, but the checkpoint has {found}: leave the flag out")


def check_trained(config: TrainedConfig, opened: OpenedWeights, trained: dict[str, Any]) -> None:
    """Refuse flags that describe another training than the checkpoint's.

    :param trained: what is known of it, by the names of the flags.
    :raises UserError: naming the flag and both values.
    """
    for name, asked in config.values().items():
        if asked in (None, trained[name]):
            continue
        if opened.run or name in ("class_cond", "learn_sigma"):  # which the weights show
            raise UserError(f"--{name} asks for {asked}, but the checkpoint has {trained[name]}: leave the flag out")
        raise UserError(
            f"--{name} asks for {asked}, but there is no {CONFIG_NAME} beside {opened.path}, which then counts as "
            f"trained with {trained[name]}: leave the flag out, or write {json.dumps({'diffusion': {name: asked}})} "
            "into that file"
        )


def check_image_size(config: WeightsConfig, model: torch.nn.Module, first_stage: Any) -> None:
    """Refuse an image size that model and first stage do not make.

    :raises UserError: naming the flag and both values.
    """
    size = model.input_size * first_stage.downsample
    if config.image_size not in (None, size):
        raise UserError(f"--image_size asks for {config.image_size}, but the checkpoint has {size}: leave the flag out")


def size_of(model: torch.nn.Module) -> str:
    return f"{type(model).__name__} of depth {model.depth}, width {model.hidden_size}, patch {model.patch_size}"


def build_guide(opened: OpenedWeights, model: torch.nn.Module, objective: str, device: torch.device) -> torch.nn.Module:
    """The weaker model of autoguidance.

    :param objective: that `model` was trained with.
    :raises UserError: when it denoises other things than `model`.
    """
    guide, run = build_model(opened, device), opened.run or RunConfig()
    if run.diffusion.objective != objective:
        raise UserError(
            f"the guide {opened.path} was trained with --objective {run.diffusion.objective}, but the model with "
            f"{objective}: they must be the same"
        )
    for name in ("input_size", "in_channels", "out_channels", "num_classes"):
        own, other = getattr(model, name), getattr(guide, name)
        if own != other:
            raise UserError(
                f"the guide {opened.path} has {name} {other}, but the model has {own}: they must be the same"
            )
    return guide
