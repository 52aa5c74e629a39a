"""What a person wants to know before weeks of training, on one screen."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import blobfile as bf
from PIL import Image

from .. import logger
from ..utils.errors import UserError

SHOWN_CLASSES, SHOWN_BAD_IMAGES, BAR = 10, 20, 40


def find_bad_images(paths, image_size, num_threads=16):
    """Files whose header cannot be read, or whose short side is less than half of `image_size`.

    :return: list of (path, reason).
    """

    def check(path):
        try:
            with bf.BlobFile(path, "rb") as file, Image.open(file) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError) as error:
            return path, f"cannot be read: {error}"
        if 2 * min(width, height) < image_size:
            return path, f"is {width} x {height}, tiny for an image_size of {image_size}"
        return None

    with ThreadPoolExecutor(num_threads) as pool:
        return [bad for bad in pool.map(check, paths, chunksize=64) if bad]


def check_images(paths, image_size, on_bad_image):
    """The paths to train on.

    :param on_bad_image: `error`, or `skip` to leave bad images out; each is listed either way.
    :raises UserError: with `error` and a bad image.
    """
    bad = find_bad_images(paths, image_size)
    for path, reason in bad[:SHOWN_BAD_IMAGES]:
        logger.log(f"{path} {reason}")
    if len(bad) > SHOWN_BAD_IMAGES:
        logger.log(f"... and {len(bad) - SHOWN_BAD_IMAGES} more")
    if bad and on_bad_image == "error":
        path, reason = bad[0]
        raise UserError(f"{len(bad)} bad images, the first: {path} {reason}; mend them, or use --on_bad_image skip")
    skipped = {path for path, _ in bad}
    return [path for path in paths if path not in skipped]


def describe_classes(labels, names):
    """Lines that show how many images each class has: every class, or a histogram when there are many."""
    counts = Counter(labels.tolist())
    if len(names) <= SHOWN_CLASSES:
        return [f"  {name:20} {counts[i]:8} {_bar(counts[i], max(counts.values()))}" for i, name in enumerate(names)]
    low, high = min(counts.values()), max(counts.values())
    width = max(1, -(-(high - low + 1) // SHOWN_CLASSES))
    bins = Counter((count - low) // width for count in counts.values())
    most = max(bins.values())
    edges = [(low + b * width, low + (b + 1) * width - 1) for b in range(max(bins) + 1)]
    return [
        f"  {first:6} to {last:6} images: {bins[b]:6} classes {_bar(bins[b], most)}"
        for b, (first, last) in enumerate(edges)
    ]


def _bar(count, largest):
    return "#" * round(BAR * count / largest)


def check_classes(data_dir, names, num_classes):
    """Refuse names that cannot be meant.

    :raises UserError: for one class only, or more than the model has.
    """
    if len(names) == 1:
        raise UserError(
            f"all images of {data_dir} are of one class, {names[0]!r}: the class is the file name up to its first "
            "underscore; rename the files, or train without labels (--class_cond False)"
        )
    if len(names) > num_classes:
        raise UserError(
            f"{data_dir} has {len(names)} classes ({', '.join(names[:5])}, ...), more than --num_classes {num_classes}"
        )


def memory_estimate(num_params, num_emas, optimizer, world_size, shard):
    """Bytes per rank for weights, gradients, optimizer state and EMAs, all float32; activations come on top."""
    states = {"adan": 4, "adan-pytorch": 4, "adamw": 2}[optimizer]
    sharded = {"none": 0, "zero1": states, "fsdp": 2 + states + num_emas}[shard]
    return 4 * num_params * (2 + states + num_emas - sharded + sharded / world_size)


def report(*, labels, names, num_images, model_name, num_params, gflop, global_batch, memory):
    """Log the screen."""
    logger.log(f"{num_images} images" + (f" of {len(names)} classes" if names else ", no labels"))
    for line in describe_classes(labels, names) if names else ():
        logger.log(line)
    logger.log(f"{model_name}: {num_params / 1e6:.3f} M parameters, {gflop:.2f} GFLOP per image and full forward pass")
    logger.log(f"global batch {global_batch}: {num_images / global_batch:.1f} steps per epoch")
    logger.log(f"about {memory / 2**30:.2f} GiB per rank for weights, gradients, optimizer and EMA, before activations")
