"""Evaluate samples as ADM does: python evaluator.py REFERENCE.npz SAMPLES.npz [SAMPLES_OF_ANOTHER_SEED.npz ...]"""

if __spec__ is None:  # started as a script, which is part of no package
    from as_package import run_script

    raise SystemExit(run_script(__file__))

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from . import console, ranks, report
from .errors import UserError, check_packages
from .features import check_enough, collect
from .files import check_named_once, check_outputs, find_inception, inception_places, named_inception, write_json
from .metrics import interval
from .neighbours import HALF, SINGLE
from .npz_reader import NpzImages
from .suite import (
    DISTANCES,
    LABELS,
    METRICS,
    READY_MADE,
    check_counts,
    check_sizes,
    compare,
    read_reference,
    ready_statistics,
    reference_needs,
    sample_needs,
)

BACKENDS = ("auto", "tensorflow", "torch")
DEFAULT_METRICS = ("is", "fid", "sfid", "pr", "kid", "dc")
PUBLISHED_COUNTS = {"reference": 10_000, "samples": 50_000}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("ref_batch", help="npz of the reference: images, statistics, or both")
    parser.add_argument("sample_batch", nargs="+", help="npz of samples; several are seeds of one model")
    parser.add_argument(
        "--metrics",
        default=",".join(DEFAULT_METRICS),
        help="of these, separated by commas; fd_dinov2 comes by --dinov2",
    )
    add_network_flags(parser)
    parser.add_argument("--dinov2", help="also FD-DINOv2, with this file of weights, or hub")
    parser.add_argument(
        "--exact_distances",
        action="store_true",
        help="precision and recall in single precision, without the half precision of published numbers",
    )
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples for intervals over images; 0: none")
    parser.add_argument("--json", help="write metrics and everything that identifies the run to this file")
    parser.add_argument("--plot", help="draw metrics, neighbours and images into this picture")
    args = parser.parse_args()
    args.metrics = args.metrics.split(",") + (["fd_dinov2"] if args.dinov2 else [])
    for metric in args.metrics:
        if metric not in METRICS or (metric == "fd_dinov2" and not args.dinov2):
            raise UserError(f"--metrics names {metric!r}: choose of {', '.join(DEFAULT_METRICS)}")
    if args.bootstrap < 0 or args.bootstrap == 1:
        raise UserError(f"--bootstrap is {args.bootstrap}: a deviation needs at least 2 resamples, and 0 is none")
    if args.exact_distances and "pr" not in args.metrics:
        raise UserError("--exact_distances is of precision and recall: add pr to --metrics, or leave it away")
    if args.dinov2 not in (None, "hub") and not Path(args.dinov2).is_file():
        raise UserError(f"--dinov2 names {args.dinov2}, which is no file: name the weights' file, or hub")
    inputs = [args.ref_batch, *args.sample_batch, args.dinov2, *inception_places(args.inception)]
    check_outputs({"--json": args.json, "--plot": args.plot}, inputs)
    if args.plot and not args.plot.endswith(".png"):
        raise UserError(f"--plot is {args.plot}: name a .png")
    if args.plot:
        check_packages("matplotlib", reason="--plot")
    if len(args.sample_batch) > 1 or not {"fid", "sfid"}.isdisjoint(args.metrics):
        check_packages("scipy", reason="FID, and an interval over several files of samples")
    if args.dinov2:
        check_packages("timm", "safetensors", reason="--dinov2")
    return args


def add_network_flags(parser):
    """Flags of everything that passes images through a network; see `create_network`."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: TensorFlow where it is installed")
    parser.add_argument("--inception", help="the network; None: $INCEPTION_V3_PATH, the cache folder, a download")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time")
    parser.add_argument("--devices", type=int, default=1, help="processes, of one GPU each; torchrun works too")


def check_network_flags(args):
    for name in ("batch_size", "devices"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be positive")
    named_inception(args.inception)
    if args.backend == "tensorflow":
        check_packages("tensorflow", reason="the tensorflow backend")
    if args.backend == "torch" or find_spec("tensorflow") is None:
        check_packages("torch-fidelity", reason="the torch backend")


def processes(args):
    """How many processes share, or will share, the images."""
    return ranks.world_size() if "WORLD_SIZE" in os.environ else args.devices


def create_network(args):
    """The Inception network that flags describe, and the path of its weights; `auto` prefers the published graph."""
    path, backend = ranks.on_first(lambda: find_inception(args.inception)), args.backend
    if backend == "auto":
        is_graph = not str(path).endswith((".pth", ".pt"))
        backend = "tensorflow" if is_graph and find_spec("tensorflow") is not None else "torch"
    if backend == "tensorflow":
        from .inception_tensorflow import TensorFlowInception

        return TensorFlowInception(path, gpu=ranks.local_rank()), path
    from .inception_torch import TorchInception

    return TorchInception(path, ranks.device()), path


def with_dinov2(inception, weights):
    """A network that gives DINOv2's features beside Inception's."""
    from .dinov2 import DinoV2

    network = DinoV2(weights, ranks.device())
    return lambda images: inception(images) | network(images)


def choose_rule(args, backend):
    """How precision and recall see distances: as the backend's network sees images, or exactly."""
    if args.exact_distances:
        return SINGLE
    if backend == "tensorflow":
        from .distances_tensorflow import adm_rule

        return adm_rule(ranks.local_rank())
    return HALF


def open_batches(args):
    """The reference and the samples, after all checks of them that need no network.

    :raises UserError: when they cannot be compared, or are not worth it.
    """
    check_named_once(args.sample_batch, "each file of samples is another seed")
    reference, samples = NpzImages(args.ref_batch), [NpzImages(path) for path in args.sample_batch]
    if reference_needs(args.metrics, reference):
        check_enough(reference, processes(args))
    ready_statistics(args.metrics, reference)
    if len(reference):
        reference.check_content()
    for images in samples:
        if not len(images):
            raise UserError(f"{images.path} holds statistics alone: samples must be images (arr_0)")
        if reference.size not in (None, images.size):
            raise UserError(
                f"{reference.path} has images of {reference.size}, {images.path} of {images.size}: "
                "make a reference of the samples' size"
            )
        ready_statistics(args.metrics, images)
        check_enough(images, processes(args))
        check_counts(args.metrics, reference, images)
        images.check_content()
    return reference, samples


def doubts(images, role):
    """What makes the numbers of a file incomparable with published ones, as sentences."""
    found, expected = len(images), PUBLISHED_COUNTS[role]
    if found in (0, expected):
        return []
    return [f"{images.path} holds {found} images: published numbers have {expected} of the {role}; FID depends on it"]


def say(text):
    if ranks.rank() == 0:
        print(text, flush=True)


def print_result(images, result, several):
    if several:
        print(f"{images.path}:")
    for key, value in result.values.items():
        print(f"{LABELS[key]}: {value}")
    for key, deviation in result.deviations.items():
        low, high = interval(result.values[key], deviation)
        print(f"{LABELS[key]} interval (95 %): {low} to {high}", flush=True)


def evaluate(args, reference_images, sample_images):
    """Print the metrics of each batch of samples, and leave what --json and --plot ask for."""
    inception, path = create_network(args)
    for images in (reference_images, *sample_images):
        check_sizes(args.metrics, images, inception.sizes)
    rule = choose_rule(args, inception.name) if "pr" in args.metrics and ranks.rank() == 0 else None
    network = with_dinov2(inception, args.dinov2) if args.dinov2 else inception
    say(f"computing reference batch activations... ({inception.name} backend)")
    reference = read_reference(reference_images, network, args.metrics, args.batch_size)
    warnings, results = doubts(reference_images, "reference"), []
    warnings += flat_images(reference_images, reference)
    for images in sample_images:
        say("computing sample batch activations...")
        ready = ready_statistics(args.metrics, images)
        samples = collect(images, network, sample_needs(args.metrics, args.bootstrap, images), args.batch_size)
        if ranks.rank() > 0:
            continue
        say("Computing evaluations...")
        weights, device = inception.logit_weights, ranks.device()
        result = compare(reference, samples, args.metrics, weights, args.bootstrap, device, rule, ready)
        print_result(images, result, len(sample_images) > 1)
        warnings += doubts(images, "samples") + flat_images(images, samples) + not_of_the_images(images, ready)
        results.append(result)
    if ranks.rank() == 0:
        where = report.environment(inception, rule)
        print_summary(results, warnings)
        print(report.sentence(where), flush=True)
        if args.json:
            row = report.describe(args, where, path, reference_images, sample_images, results, warnings)
            write_json(args.json, row)
        if args.plot:
            report.draw(args.plot, reference_images, sample_images[0], results)


def flat_images(images, collected):
    if collected is None or not collected.flat:
        return []
    return [f"{images.path} holds {collected.flat} images of one colour"]


def not_of_the_images(images, ready):
    """What distances take from a file of samples without its images."""
    used = ", ".join(
        f"{' and '.join(READY_MADE[name])} for {metric}" for metric, name in DISTANCES.items() if name in ready
    )
    return [f"{images.path} holds statistics, which are used as ADM's evaluator does: {used}"] if ready else []


def print_summary(results, warnings):
    for key, value in report.over_seeds(results).items():
        print(f"{LABELS[key]} over {len(results)} seeds: {value['mean']} +- {value['half_width']} (95 %)")
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)


def main():
    args = parse_args()
    check_network_flags(args)
    reference, samples = open_batches(args)
    if args.devices > 1 and "WORLD_SIZE" not in os.environ:
        return ranks.launch(args.devices)
    return evaluate(args, reference, samples)


if __name__ == "__main__":
    console.run(main)
