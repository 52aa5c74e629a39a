"""Checks before training starts, and a report of the run: data, model, batch, precision and memory."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch.nn as nn

from .. import dist_util, logger
from ..config import RunConfig, TrainConfig
from ..images.sequence import ImageSequence
from ..utils.errors import UserError
from ..utils.flag_values import split_numbers
from ..utils.flops import forward_flops
from ..utils.image_headers import read_headers
from ..utils.precision import PRECISIONS

SHOWN_CLASSES, SHOWN_BAD_IMAGES, BAR = 10, 20, 40
PAPER_MASK_RATIO = 0.3

# ---------------------------------------------------------------- the images


class Inspection(NamedTuple):
    """What the headers of images tell, by the images' indices, ascending.

    :param bad: why a header cannot be read.
    :param rotated: (n,) integers: the images that carry an EXIF rotation.
    :param tiny: (n,) integers: the images whose short side is less than half of image_size.
    """

    bad: dict[int, str]
    rotated: np.ndarray
    tiny: np.ndarray


def inspect_images(paths: Sequence[str], image_size: int) -> Inspection:
    """Read the header of every image; of an `ImageSequence`, what is known of it."""
    if isinstance(paths, ImageSequence):
        sizes, rotated, bad = paths.sizes(), paths.rotated(), paths.bad()
    else:
        sizes, rotated, bad = read_headers(paths)
    tiny = 2 * sizes.min(axis=1) < image_size
    tiny[list(bad)] = False
    return Inspection(bad, np.flatnonzero(rotated), np.flatnonzero(tiny))


def check_images(
    paths: Sequence[str], image_size: int, on_bad_image: str, data_dir: str = "--data_dir"
) -> Sequence[str]:
    """The paths to use: those of images that `inspect_images` does not find bad. Bad images are logged.

    :param on_bad_image: `error`, or `skip` to leave bad images out.
    :param data_dir: the folder that error messages name.
    :raises UserError: with `error` if an image is bad, and with `skip` if all images are.
    """
    bad, rotated, tiny = inspect_images(paths, image_size)
    for index, reason in islice(bad.items(), SHOWN_BAD_IMAGES):
        logger.log(f"{paths[index]} {reason}")
    if len(bad) > SHOWN_BAD_IMAGES:
        logger.log(f"... and {len(bad) - SHOWN_BAD_IMAGES} more")
    if len(rotated):
        logger.log(
            f"{len(rotated)} images carry an EXIF rotation, such as {paths[rotated[0]]}: it is not applied, as in ADM; "
            "if they should be upright, rotate their pixels first (PIL.ImageOps.exif_transpose)"
        )
    if len(tiny):
        logger.log(
            f"{len(tiny)} images are smaller than half of --image_size {image_size}, such as {paths[tiny[0]]}: they "
            "are enlarged, as in ADM"
        )
    if not bad:
        return paths
    first, reason = next(iter(bad.items()))
    if len(bad) == len(paths):
        raise UserError(
            f"none of the {len(bad)} images of {data_dir} can be used, the first: {paths[first]} {reason}; choose "
            "another folder"
        )
    if on_bad_image == "error":
        raise UserError(
            f"{len(bad)} images cannot be used, the first: {paths[first]} {reason}; repair or remove them, or skip "
            "them with --on_bad_image skip"
        )
    kept = np.delete(np.arange(len(paths)), list(bad))
    return paths.take(kept) if isinstance(paths, ImageSequence) else [paths[index] for index in kept]


# ---------------------------------------------------------------- the classes


def describe_classes(labels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Lines of text that show the number of images per class: one line per class, or a histogram of many classes.

    :param labels: (N,) integers. :param names: class names, in the order of their labels.
    """
    counts = np.bincount(labels, minlength=len(names)).tolist()
    if len(names) <= SHOWN_CLASSES:
        return [f"  {name:20} {counts[i]:8} {_bar(counts[i], max(counts))}" for i, name in enumerate(names)]
    low, high = min(counts), max(counts)
    width = max(1, -(-(high - low + 1) // SHOWN_CLASSES))
    bins = Counter((count - low) // width for count in counts)
    most = max(bins.values())
    edges = [(low + b * width, low + (b + 1) * width - 1) for b in range(max(bins) + 1)]
    return [
        f"  {first:6} to {last:6} images: {bins[b]:6} classes {_bar(bins[b], most)}"
        for b, (first, last) in enumerate(edges)
    ]


def _bar(count: int, largest: int) -> str:
    return "#" * round(BAR * count / largest)


def check_classes(data_dir: str, names: Sequence[str], num_classes: int) -> None:
    """Refuse class names that look like a mistake.

    :raises UserError: for a single class, and for more classes than the model has.
    """
    if len(names) == 1:
        raise UserError(
            f"all images of {data_dir} are of one class, {names[0]!r}: the class is the file name up to its first "
            "underscore; rename the files (datasets/class_folders.py does it for a folder per class), or train without "
            "labels (--class_cond False)"
        )
    if len(names) > num_classes:
        raise UserError(
            f"{data_dir} has {len(names)} classes ({', '.join(names[:5])}, ...), more than --num_classes "
            f"{num_classes}: raise it, or remove classes"
        )


# ---------------------------------------------------------------- the run


def memory_estimate(num_params: int, num_emas: int, optimizer: str, num_shards: int, shard: str) -> float:
    """Bytes per rank for weights, gradients, optimizer state and EMAs, all float32, without activations.

    :param num_shards: number of ranks over which one copy is spread: those of a node for `hsdp`, else all.
    """
    states = {"adan": 4, "adan-pytorch": 4, "adamw": 2}[optimizer]
    sharded = {"none": 0, "zero1": states, "fsdp": 2 + states + num_emas, "hsdp": 2 + states + num_emas}[shard]
    return 4 * num_params * (2 + states + num_emas - sharded + sharded / num_shards)


def state_bytes(config: RunConfig, num_params: int) -> float:
    """`memory_estimate` of a run. With `hsdp`, all ranks call it together.

    :param config: from `resume.resolve`, with the global batch filled in.
    """
    train = config.train
    num_shards = len(dist_util.node_group().ranks) if train.shard == "hsdp" else config.global_batch // train.batch_size
    num_emas = len(train.ema_rate.split(",")) + len(split_numbers(train.phema))
    return memory_estimate(num_params, num_emas, train.optimizer, num_shards, train.shard)


def report(
    config: RunConfig, model: nn.Module, first_stage: Any, *, num_images: int, labels: np.ndarray | None
) -> None:
    """Log a summary of the run before it starts.

    :param config: from `resume.resolve`, with class names and global batch filled in.
    :param labels: (num_images,) integers, or None without classes.
    """
    train, class_names = config.train, config.classes
    logger.log(f"{num_images} images" + (f" of {len(class_names)} classes" if class_names else ", no labels"))
    for line in describe_classes(labels, class_names) if class_names else ():
        logger.log(line)
    num_params = sum(p.numel() for p in model.parameters())
    logger.log(
        f"{config.model.model}: {num_params / 1e6:.3f} M parameters, {forward_flops(model) / 1e9:.2f} GFLOP per image "
        "and full forward pass"
    )
    logger.log(_describe_masking(model, config.model.model))
    logger.log(_describe_first_stage(model, first_stage, config.model.vae))
    logger.log(f"precision: {config.precision}, {'compiled blocks' if train.compile else 'not compiled'}")
    attention = model.attention_in_use(dist_util.dev(), PRECISIONS[config.precision])
    logger.log(f"attention: {attention} (--attention {train.attention}){', QK-norm' if model.qk_norm else ''}")
    logger.log(f"optimizer: {', '.join(_describe_optimizer(train))}")
    world_size = config.global_batch // train.batch_size
    micro = train.microbatch if 0 < train.microbatch < train.batch_size else train.batch_size
    logger.log(
        f"batch: {train.batch_size} images x {world_size} ranks = global batch {config.global_batch} per step, in "
        f"microbatches of {micro}; {num_images / config.global_batch:.1f} steps per epoch"
    )
    memory = state_bytes(config, num_params)
    logger.log(
        f"memory: about {memory / 2**30:.2f} GiB per rank for weights, gradients, optimizer state and EMA, plus "
        "activations"
    )


def _describe_masking(model: nn.Module, model_name: str) -> str:
    if model.mask_ratio is not None:
        most = model.mask_ratio + model.mask_ratio_spread
        shares = f"{model.mask_ratio:.0%}" + (f" to {most:.0%}" if model.mask_ratio_spread else "")
        return f"masking: {shares.replace('%', ' %')} of {model.num_patches} tokens dropped in the masked pass"
    if not hasattr(model, "draw_kept"):
        return f"no masked pass: {model_name} models are trained without masking"
    return (
        f"no masked pass: {model_name} trains without masking, since --mask_ratio is not set (the paper's runs have "
        f"{PAPER_MASK_RATIO})"
    )


def _describe_first_stage(model: nn.Module, first_stage: Any, vae: str) -> str:
    shape = f"{model.in_channels} x {model.input_size} x {model.input_size}"
    if first_stage.downsample == 1:
        return f"first stage: {vae}, diffusion in pixels of {shape}"
    return (
        f"first stage: {vae}, latents of {shape}, {first_stage.downsample} times smaller than the images; scale "
        f"{first_stage.scale:g}, shift {first_stage.shift:g}, computed in {first_stage.precision}"
    )


def _describe_optimizer(train: TrainConfig) -> Iterator[str]:
    annealed = f" annealed to 0 at step {train.lr_anneal_steps}" if train.lr_anneal_steps else ""
    yield f"{train.optimizer}, lr {train.lr:g}{annealed}"
    if train.weight_decay:
        yield f"weight decay {train.weight_decay:g}"
    yield f"gradients clipped to a norm of {train.grad_clip:g}" if train.grad_clip else "gradients not clipped"
