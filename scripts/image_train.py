"""Train MDTv2, MDT or DiT on a folder of images. Run the same command again to resume where it stopped."""

from collections.abc import Callable
from functools import partial

import torch

from masked_diffusion import create_diffusion, create_model, dist_util, logger, script_util
from masked_diffusion.config import RunConfig
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.layers.relative_attention import check_implementation
from masked_diffusion.models import model_class
from masked_diffusion.sampling.during_training import create_hooks
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training import preflight
from masked_diffusion.training.data import find_data
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
    logger.configure(config.log.log_dir, quiet=not dist_util.is_main())
    with own_log_dir(logger.get_dir()), last_words.of_signals(logger.get_dir()):
        train(config, logger.get_dir())


def train(config: RunConfig, log_dir: str) -> None:
    """Find the data, build what is trained, and train it from where the run starts."""
    data = find_data(config)
    with dist_util.main_first():
        first_stage = create_first_stage(config.model.vae, dist_util.dev())
    num_classes = (config.model.num_classes or len(data.class_names)) if config.data.class_cond else 0
    config = resolve(config.replaced(num_classes=num_classes)).replaced(
        architecture=describe_architecture(config, first_stage, num_classes),
        classes=tuple(data.class_names),
        data_signature=data.signature,
        global_batch=config.train.batch_size * dist_util.get_world_size(),
    )

    before = dist_util.run_on_main(read_run_config, log_dir)
    origin = log_dir if before or not config.log.continue_from else run_folder(config.log.continue_from)
    begun = before or dist_util.run_on_main(read_run_config, origin)
    check_same_run(origin, config, begun and resolve(begun))
    model = build_model(config)
    preflight.report(config, model, first_stage, num_images=len(data.names), labels=data.labels)
    diffusion = create_diffusion(**config.diffusion.options(model.default_snr_gamma))
    kept_multiple = max(1, model.num_patches // 16) if config.rounds_lengths else 1
    loop = TrainLoop(
        config,
        TwoPassObjective(model, diffusion, config.precision, kept_multiple),
        data,
        first_stage=first_stage,
        log_dir=log_dir,
        hooks=create_hooks(config, model, first_stage, create_comparison),
        make_model=partial(make_model, config),
    )
    start = agree_on_start(log_dir, config, before)
    dist_util.run_on_main(write_run_config, log_dir, config, before, start.begins)
    loop.resume(start)
    loop.run_loop()


if __name__ == "__main__":
    script_util.run(main)
