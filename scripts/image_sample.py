"""Draw images into samples_{N}x{H}x{W}x{C}.npz. Run the same command again to resume where it stopped."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from masked_diffusion import dist_util, logger, presets, script_util
from masked_diffusion.sample_config import CLASS_RULES, QUANTIZERS, SampleConfig
from masked_diffusion.sampling.build import describe, load_image_sampler
from masked_diffusion.sampling.class_names import find_label
from masked_diffusion.sampling.image_sampler import choose_labels
from masked_diffusion.sampling.shards import ShardStore, draw_samples
from masked_diffusion.utils.flag_values import check_steps, check_words
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.pictures import save_grid


@dataclass(frozen=True)
class ImagesConfig(Config):
    """images"""

    preset: str | None = option(
        None, "the settings of published numbers; flags given beside it override its values",
        choices=tuple(presets.SAMPLING), presets=presets.SAMPLING,
    )  # fmt: skip
    timestep_respacing: str | None = option(
        None, "ADM's name of --num_sampling_steps; empty: not given", read=lambda text: text or None,
        check=check_steps, excludes="num_sampling_steps",
    )  # fmt: skip
    num_samples: int = option(50000, "images to draw", at_least=1)
    batch_size: int = option(16, "images per rank at a time", at_least=1)
    class_rule: str | None = option(
        None, "random: a function of seed and index; balanced: image i is of class i mod n; list: --classes, over and "
        "over; None: list with --classes, else random", choices=CLASS_RULES,
    )  # fmt: skip
    classes: tuple[str, ...] = option((), "numbers or names, for --class_rule list", check=check_words)
    quantize: str = option(
        "truncate", "how pixels become whole numbers; truncate: down, as ADM and MDT do, so that FID compares with the "
        "published one; round: to the nearest", choices=QUANTIZERS,
    )  # fmt: skip
    log_dir: str | None = option(None, "folder for the npz; None: $OPENAI_LOGDIR, or output")


@dataclass(frozen=True)
class Flags(Config):
    sample: SampleConfig = field(default_factory=SampleConfig)
    images: ImagesConfig = ImagesConfig()


def main() -> None:
    flags = script_util.parse_flags(Flags, __doc__)
    if flags.images.timestep_respacing:
        flags = flags.replaced(num_sampling_steps=flags.images.timestep_respacing)
    images = flags.images
    dist_util.join_process_group()
    logger.configure(images.log_dir, quiet=not dist_util.is_main())
    if images.preset:
        logger.log(presets.describe(images.preset, flags.values()))
    image_sampler, weights = load_image_sampler(flags.sample, images.batch_size, images.quantize)
    num_classes, size = image_sampler.model.num_classes, image_sampler.size
    classes = [find_label(text, weights.class_names, num_classes) for text in images.classes]
    class_rule = images.class_rule or ("list" if classes else "random")
    choose = partial(
        choose_labels, class_rule=class_rule, num_classes=num_classes, seed=image_sampler.seed, classes=classes
    )
    choose([0])  # a rule that contradicts its classes ends the run before it begins
    path = Path(logger.get_dir(), f"samples_{images.num_samples}x{size}x{size}x3.npz")
    settings = describe(flags.sample, image_sampler, weights) | {"class_rule": class_rule, "classes": classes}
    with ShardStore(path, settings) as store:
        if store.finished():
            logger.log(f"{path} is there already: nothing to draw")
            return
        draw_samples(image_sampler, store, images.num_samples, images.batch_size, choose)
        if dist_util.is_main():
            save_grid(path.with_suffix(".png"), store.merge(images.num_samples))
            logger.log(f"wrote {path} and {path.with_suffix('.png')}")
        dist_util.host_barrier()


if __name__ == "__main__":
    script_util.run(main)
