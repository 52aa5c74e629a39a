"""What the scripts share: flags, and the objects that flags describe."""

import argparse
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from . import dist_util, logger
from .models import create_model
from .published import (  # noqa: F401  (where ADM's and MDT's scripts import them from)
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    diffusion_defaults,
    model_and_diffusion_defaults,
    str2bool,
)
from .respace import create_diffusion, create_gaussian_diffusion  # noqa: F401
from .training.ema import DTYPES
from .training.guardian import TrainingFault
from .training.optim import OPTIMIZERS
from .training.parallel import SHARDS
from .utils.errors import UserError
from .utils.files import write_json
from .utils.not_rebuilt import module_getattr
from .utils.precision import PRECISIONS
from .weights.checkpoint import CONFIG_NAME, latest_step, read_config

__getattr__ = module_getattr(__name__)


def optional_float(text):
    return None if text.lower() == "none" else float(text)


def make_parser(description):
    """A parser that shows defaults, and takes the `--local-rank` that torch.distributed.launch passes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_model_flags(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="MDTv2_S_2", help="family, size and patch size: MDTv2_XL_2, DiT_B_4, ...")
    group.add_argument("--image_size", type=int, default=256, help="height and width of the images")
    group.add_argument(
        "--mask_ratio", type=optional_float, help="share of tokens a masked pass drops; None: no such pass"
    )
    group.add_argument("--decode_layer", type=int, help="blocks after the side-interpolater; None: the paper's number")
    group.add_argument("--num_classes", type=int, help="rows of the label table; None: as many as the data has")
    group.add_argument("--vae", default="ema", help="first stage: ema, mse, a hub id, a folder; identity for pixels")


def add_diffusion_flags(parser):
    group = parser.add_argument_group("diffusion")
    group.add_argument("--diffusion_steps", type=int, default=1000, help="timesteps of the noise schedule")
    group.add_argument("--noise_schedule", default="linear", help="linear or squaredcos_cap_v2")
    group.add_argument("--learn_sigma", type=str2bool, default=True, help="learn the reverse process's variance")
    group.add_argument(
        "--sigma_small", type=str2bool, default=False, help="without learn_sigma: the posterior's variance"
    )
    group.add_argument("--use_kl", type=str2bool, default=False, help="train on the variational bound")
    group.add_argument("--predict_xstart", type=str2bool, default=False, help="predict x_start instead of eps")
    group.add_argument("--predict_v", type=str2bool, default=False, help="predict v instead of eps")
    group.add_argument("--rescale_learned_sigmas", type=str2bool, default=False, help="bound times steps / 1000")
    group.add_argument(
        "--snr_gamma", type=optional_float, default=argparse.SUPPRESS,
        help="Min-SNR weight of the MSE, or None (default: 5.0 for MDTv2, None for MDT and DiT)",
    )  # fmt: skip


def add_train_flags(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", default="", help="folder of images named CLASS_ANYTHING, with subfolders")
    data.add_argument("--latent_dir", default="", help="what encode_latents.py made of the images, instead of data_dir")
    data.add_argument("--class_cond", type=str2bool, default=True, help="train with class labels")
    data.add_argument("--random_crop", type=str2bool, default=False, help="crop at random instead of the centre")
    data.add_argument("--random_flip", type=str2bool, default=True, help="mirror half of the images")
    data.add_argument("--on_bad_image", choices=("error", "skip"), default="error", help="unreadable or tiny images")
    data.add_argument(
        "--num_workers", type=int, default=4, help="loader processes per rank; 0: in the training process"
    )

    train = parser.add_argument_group("training")
    train.add_argument("--batch_size", type=int, default=32, help="images per rank and step")
    train.add_argument("--microbatch", type=int, default=-1, help="images per forward pass; -1: all of batch_size")
    train.add_argument("--optimizer", choices=OPTIMIZERS, help="None: adan for MDTv2, adamw for MDT and DiT")
    train.add_argument("--lr", type=float, default=3e-4, help="learning rate")
    train.add_argument("--weight_decay", type=float, default=0.0, help="weight decay")
    train.add_argument("--grad_clip", type=float, help="global gradient norm, 0: unclipped; None: 1 for adan, else 0")
    train.add_argument(
        "--lr_anneal_steps", type=int, default=0, help="anneal lr to zero until this step, and end there"
    )
    train.add_argument("--max_steps", type=int, default=0, help="end after this step; 0: go on")
    train.add_argument("--ema_rate", default="0.9999", help="EMA rates, separated by commas")
    train.add_argument("--phema", default="", help="widths of EMAs to reconstruct from later, such as 0.05,0.10")
    train.add_argument("--phema_dtype", choices=DTYPES, default="fp32", help="format of their snapshots")
    train.add_argument("--schedule_sampler", default="uniform", help="timesteps: uniform or loss-second-moment")
    train.add_argument("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of the network")
    train.add_argument("--compile", type=str2bool, default=False, help="compile the blocks")
    train.add_argument("--exact_lengths", type=str2bool, default=False, help="with compile: do not round kept lengths")
    train.add_argument("--grad_checkpoint", type=str2bool, default=False, help="compute activations twice, keep few")
    train.add_argument("--split_backward", type=str2bool, default=False, help="backward after each pass: less memory")
    train.add_argument("--shard", choices=SHARDS, default="none", help="zero1: optimizer state, fsdp: everything")
    train.add_argument("--use_fp16", type=str2bool, default=False, help="the same as --precision fp16")
    train.add_argument("--fp16_scale_growth", type=float, default=1e-3, help="log2 of the loss scale's growth per step")
    train.add_argument("--seed", type=int, default=0, help="of data order, weights and noise")

    guard = parser.add_argument_group("guardian")
    guard.add_argument("--max_bad_steps", type=int, default=10, help="stop after so many non-finite steps in a row")
    guard.add_argument("--spike_zscore", type=float, default=6.0, help="report losses so far above the recent mean")
    guard.add_argument("--rollback_on_spike", type=int, default=0, help="go back to the last checkpoint, so many times")

    look = parser.add_argument_group("evaluation on the way")
    look.add_argument("--eval_interval", type=int, default=0, help="steps between evaluations of the EMA; 0: none")
    look.add_argument("--eval_samples", type=int, default=1000, help="images to draw for each")
    look.add_argument("--eval_reference", default="", help="npz to compare them with, as for evaluations/evaluator.py")

    files = parser.add_argument_group("files")
    files.add_argument("--log_dir", help="None: $OPENAI_LOGDIR, or output")
    files.add_argument("--keep", type=int, default=0, help="keep the newest so many checkpoints; 0: all")
    files.add_argument("--sample_interval", type=int, default=0, help="steps between EMA sample grids; 0: none")
    files.add_argument("--allow_config_change", type=str2bool, default=False, help="resume with other flags")
    files.add_argument("--log_interval", type=int, default=100, help="steps between log lines")
    files.add_argument("--save_interval", type=int, default=10000, help="steps between checkpoints")
    files.add_argument(
        "--resume_checkpoint", default="auto", help="auto: the newest of log_dir; a file; or '' to start afresh"
    )


def check_positive(args, *names):
    """Refuse flags that are not positive, before anything starts."""
    for name in names:
        if getattr(args, name) <= 0:
            raise UserError(f"{name} is {getattr(args, name)}: it must be positive")


def precision_of(args):
    return "fp16" if args.use_fp16 else args.precision


def model_config(args, first_stage, num_classes):
    """Name and options of the model that flags describe.

    :raises UserError: when the first stage cannot halve image_size down to the model's input.
    """
    if args.image_size % first_stage.downsample:
        raise UserError(f"image_size ({args.image_size}) must be a multiple of {first_stage.downsample}")
    options = {
        "input_size": args.image_size // first_stage.downsample,
        "in_channels": first_stage.channels,
        "num_classes": num_classes,
        "learn_sigma": args.learn_sigma,
    }
    given = {"mask_ratio": args.mask_ratio, "decode_layer": args.decode_layer}
    options |= {key: value for key, value in given.items() if value is not None}
    return {"name": args.model, "options": options}


def diffusion_config(args):
    """Options of `create_diffusion` that flags describe."""
    config = {
        "diffusion_steps": args.diffusion_steps,
        "noise_schedule": args.noise_schedule,
        "learn_sigma": args.learn_sigma,
        "sigma_small": args.sigma_small,
        "use_kl": args.use_kl,
        "predict_xstart": args.predict_xstart,
        "predict_v": args.predict_v,
        "rescale_learned_sigmas": args.rescale_learned_sigmas,
    }
    return config | {"snr_gamma": getattr(args, "snr_gamma", 5.0 if args.model.startswith("MDTv2") else None)}


# Flags that change what a run computes. Others, of speed and files, may change when it is resumed.
RUN_FLAGS = (
    "model image_size mask_ratio decode_layer num_classes vae diffusion_steps noise_schedule learn_sigma sigma_small "
    "use_kl predict_xstart predict_v rescale_learned_sigmas snr_gamma class_cond random_crop random_flip optimizer lr "
    "weight_decay grad_clip lr_anneal_steps ema_rate phema schedule_sampler precision use_fp16 exact_lengths seed "
    "global_batch"
)


def save_config(log_dir, config, allow_change=False):
    """Leave the configuration beside the checkpoints.

    :raises UserError: when the folder holds a run with another value of a flag that matters, unless changes are
        allowed; names the flag and both values.
    """
    before = {} if latest_step(log_dir) is None else read_config(log_dir)
    for name in RUN_FLAGS.split():
        old, new = before.get("flags", {}).get(name), config["flags"].get(name)
        if before and old != new and not allow_change:
            raise UserError(
                f"--{name} was {old} when {log_dir} was begun, now it is {new}: repeat it, "
                "choose another --log_dir, or say --allow_config_change True"
            )
    if dist_util.is_main():
        write_json(Path(log_dir, CONFIG_NAME), config)


def create_model_and_diffusion(config):
    """The model and the diffusion of a configuration."""
    return create_model(config["model"]["name"], **config["model"]["options"]), create_diffusion(**config["diffusion"])


def run(main):
    """Run an entry point. What went wrong by input, disk or divergence is a sentence; its traceback goes to log.txt."""
    try:
        main()
    except (ValueError, OSError, TrainingFault) as error:
        lines = str(error).strip().splitlines()
        # A loader process sends its whole traceback, of which the last line is the sentence.
        sentence = lines[-1].removeprefix("ValueError: ") if lines[0].startswith("Caught ValueError") else str(error)
        if logger.get_dir():
            with suppress(OSError), Path(logger.get_dir(), "log.txt").open("a") as file:
                file.write(traceback.format_exc())
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    finally:
        dist_util.cleanup()
