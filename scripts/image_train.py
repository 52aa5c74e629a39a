"""Train MDTv2, MDT or DiT on a folder of images. Run the same command again to resume where it stopped."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from masked_diffusion import create_diffusion, create_model, dist_util, logger, presets, script_util
from masked_diffusion.config import RunConfig
from masked_diffusion.latents.autoencoder import adopt_older_scale, create_first_stage, describe_first_stage
from masked_diffusion.layers.relative_attention import check_implementation
from masked_diffusion.models import model_class
from masked_diffusion.sampling.during_training import create_hooks
from masked_diffusion.train_util import Hook, TrainLoop
from masked_diffusion.training import preflight
from masked_diffusion.training.batch import choose_microbatch, share_batch
from masked_diffusion.training.data import find_data
from masked_diffusion.training.forecast import Forecast
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.training.resume import (
    agree_on_start,
    check_same_run,
    describe_architecture,
    own_log_dir,
    read_run_config,
    resolve,
    write_run_config,
)
from masked_diffusion.utils import last_words
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.precision import check_precision, set_matmul_precision
from masked_diffusion.weights.checkpoint import run_folder


def make_model(config: RunConfig) -> torch.nn.Module:
    """The model that a configuration describes, with the initial weights of its seed."""
    torch.manual_seed(config.train.seed)
    return create_model(config.architecture["name"], **config.architecture["options"])


def build_model(config: RunConfig) -> torch.nn.Module:
    """The model to train, on the meta device: the training loop gives each rank its weights, or its part of them."""
    with torch.device("meta"):
        model = make_model(config)
    model.set_attention(config.train.attention, dist_util.dev())
    if config.train.grad_checkpoint:
        model.enable_grad_checkpoint()
    if config.train.compile:
        model.compile_blocks(dynamic=config.train.exact_lengths)
    return model


def build_objective(config: RunConfig) -> TwoPassObjective:
    """What is trained: `build_model`'s model with the loss of its diffusion."""
    model = build_model(config)
    diffusion = create_diffusion(**config.diffusion.options(model.default_snr_gamma))
    kept_multiple = max(1, model.num_patches // 16) if config.rounds_lengths else 1
    return TwoPassObjective(model, diffusion, config.precision, kept_multiple)


def create_comparison(reference: str, size: tuple[int, int], device: torch.device) -> Callable:
    """What compares samples with `--eval_reference`; see `LiveEvaluation` in evaluations/live.py."""
    live = load_evaluations("live")
    try:
        return live.LiveEvaluation(reference, size, device)
    except live.UserError as error:  # of evaluations/, which knows nothing of this package's
        raise UserError(f"--eval_reference: {error}") from error


def main() -> None:
    # What is wrong with the flags is said before anything is listed, fetched or built.
    config = script_util.parse_flags(RunConfig, __doc__)
    model_class(config.model.model)
    dist_util.join_process_group()
    check_precision(config.precision, dist_util.dev())
    check_implementation(config.train.attention, dist_util.dev())
    set_matmul_precision(config.precision)
    loggers = filter(None, config.log.loggers.split(","))
    logger.configure(config.log.log_dir, quiet=not dist_util.is_main(), loggers=tuple(loggers))
    with own_log_dir(logger.get_dir()), last_words.of_signals(logger.get_dir()), closing(logger.get_current()):
        if config.model.preset:
            logger.log(presets.describe(config.model.preset, config.values()))
        train(share_batch(config, dist_util.get_world_size()), logger.get_dir())


def train(config: RunConfig, log_dir: str, size: Mapping[str, int] | None = None, hooks: Sequence[Hook] = ()) -> None:
    """Find the data, build what is trained, and train it from where the run starts.

    :param size: options of `create_model` in which the model differs from the size that its name stands for.
    :param hooks: called after every step, behind those that the flags ask for.
    """
    data = find_data(config)
    before = dist_util.run_on_main(read_run_config, log_dir)
    origin = log_dir if before or not config.log.continue_from else run_folder(config.log.continue_from)
    begun = before or dist_util.run_on_main(read_run_config, origin)
    with dist_util.main_first():
        compiled = ["encoder"] if config.train.compile else []
        first_stage = create_first_stage(config.model.vae, dist_util.dev(), config.model.vae_precision, compiled)
    if begun:
        adopt_older_scale(first_stage, begun.autoencoder)
    num_classes = (config.model.num_classes or len(data.class_names)) if config.data.class_cond else 0
    architecture = describe_architecture(config, first_stage, num_classes)
    architecture["options"] |= size or {}
    config = resolve(config.replaced(num_classes=num_classes)).replaced(
        architecture=architecture,
        autoencoder=describe_first_stage(first_stage),
        classes=tuple(data.class_names),
        data_signature=data.signature,
        global_batch=config.train.batch_size * dist_util.get_world_size(),
    )
    check_same_run(origin, config, begun and resolve(begun))
    config = choose_microbatch(config, partial(build_objective, config), begun)
    objective = build_objective(config)
    model = objective.model
    preflight.report(config, model, first_stage, num_images=len(data.names), labels=data.labels)
    loop = TrainLoop(
        config,
        objective,
        data,
        first_stage=first_stage,
        log_dir=log_dir,
        hooks=(Forecast(config), *create_hooks(config, model, first_stage, create_comparison), *hooks),
        make_model=partial(make_model, config),
    )
    start = agree_on_start(log_dir, config, before)
    dist_util.run_on_main(write_run_config, log_dir, config, before, start.begins)
    loop.resume(start)
    loop.run_loop()


if __name__ == "__main__":
    script_util.run(main)
