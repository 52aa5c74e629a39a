"""Draw pictures of some classes, fill a hole of an image, or vary one. By default what the published script draws."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm.auto import tqdm
from typing_extensions import Self

from masked_diffusion import logger, script_util
from masked_diffusion.image_datasets import center_crop_arr, read_image
from masked_diffusion.sample_config import SampleConfig
from masked_diffusion.sampling import editing
from masked_diffusion.sampling.build import load_image_sampler
from masked_diffusion.sampling.class_names import IMAGENET_CLASSES, find_label
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.flag_values import check_file, check_words
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.pictures import check_picture_name, save_animation, save_grid

CLASSES = ("19", "23", "106", "108", "278", "282")  # of ImageNet, as published
TRAJECTORY_FRAMES, ANIMATION_FRAMES = 10, 50
SMALLEST_PICTURE = 64  # pixels; smaller ones are enlarged without smoothing


@dataclass(frozen=True)
class PicturesConfig(Config):
    """pictures"""

    classes: tuple[str, ...] = option(
        (), 'numbers or names: 279 "golden retriever"; left out: the published six of ImageNet, else the first ones',
        check=check_words,
    )  # fmt: skip
    out: str = option("sample.jpg", "the grid of pictures", check=check_file)
    columns: int = option(3, "pictures per row", at_least=1)
    trajectory: str | None = option(None, "file for a strip of the predicted images along the way")
    animate: str | None = option(None, "animation of the predicted images along the way: .gif, .png or .webp")

    def check(self) -> Self:
        super().check()
        for name in ("out", "trajectory", "animate"):
            try:
                if path := getattr(self, name):
                    check_picture_name(path, animated=name == "animate")
            except UserError as error:
                raise UserError(f"--{name}: {error}") from error
        return self


@dataclass(frozen=True)
class EditConfig(Config):
    """from an image"""

    inpaint: str | None = option(None, "image to fill a hole of")
    mask: str | None = option(None, "picture of the image's size, white where it is to be filled")
    method: str = option(
        "repaint", "how the hole is filled; side-interpolater: the encoder of an MDT or MDTv2 that was trained with "
        "--mask_ratio sees only what is known, in steps that are otherwise those of repaint", choices=editing.METHODS,
    )  # fmt: skip
    jump_length: int = option(10, "steps that inpainting goes back at a time", at_least=1)
    resamplings: int = option(10, "how often inpainting walks every stretch", at_least=1)
    variations: str | None = option(None, "image to vary")
    strength: float = option(0.6, "share of the steps that a variation runs", above=0, at_most=1)

    def check(self) -> Self:
        super().check()
        if bool(self.inpaint) != bool(self.mask):
            raise UserError("--inpaint and --mask go together: give the image and the picture of what to fill")
        if self.method != "repaint" and not self.inpaint:
            raise UserError(f"--method {self.method} says how a hole is filled: give the image with --inpaint")
        if self.inpaint and self.variations:
            raise UserError("--inpaint and --variations exclude each other: choose one")
        return self


@dataclass(frozen=True)
class Flags(Config):
    sample: SampleConfig = field(default_factory=SampleConfig)
    pictures: PicturesConfig = PicturesConfig()
    edit: EditConfig = EditConfig()


def parse_flags() -> Flags:
    """The command line, with the published script's defaults."""
    published = {"model_path": "shgao/MDT-XL2", "cfg_cond": True, "cfg_scale": 4.0, "scale_pow": 0.01, "seed": 1}
    return script_util.parse_flags(Flags, __doc__, **published)


def choose_classes(asked: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """The classes to draw: those that are asked for, or the published six, or the first of the model."""
    if asked:
        return asked
    if num_classes == IMAGENET_CLASSES:
        return CLASSES
    first = tuple(map(str, range(min(len(CLASSES), max(num_classes, 1)))))
    logger.log(f"drawing the first {len(first)} of the model's {num_classes} classes: choose others with --classes")
    return first


def draw(edit: EditConfig, image_sampler: ImageSampler, labels: torch.Tensor) -> tuple[Iterable, int | None, Callable]:
    """Start drawing.

    :return: the steps; how many there are; and a function from latents to images.
    """
    indices = range(len(labels))
    if edit.inpaint:
        image, hole = editing.read_image_and_hole(edit.inpaint, edit.mask, image_sampler.size)
        jumps = {"jump_length": edit.jump_length, "resamplings": edit.resamplings}
        steps = editing.inpaint_progressive(image_sampler, indices, labels, image, hole, method=edit.method, **jumps)
        total = editing.count_evaluations(image_sampler.solver.num_steps, **jumps)
        return steps, total, lambda latents: editing.paste(image, hole, image_sampler.decode(latents))
    if edit.variations:
        image = center_crop_arr(read_image(edit.variations), image_sampler.size)
        steps = editing.vary_progressive(image_sampler, indices, labels, image, edit.strength)
        return steps, None, image_sampler.decode
    return image_sampler.progressive(indices, labels), image_sampler.solver.num_outputs, image_sampler.decode


def main() -> None:
    flags = parse_flags()
    pictures = flags.pictures
    image_sampler, weights = load_image_sampler(flags.sample)
    num_classes = image_sampler.model.num_classes
    classes = choose_classes(pictures.classes, num_classes)
    labels = torch.tensor([find_label(text, weights.class_names, num_classes) for text in classes])
    steps, total, finish = draw(flags.edit, image_sampler, labels)
    predictions = []
    for out in tqdm(steps, total=total, unit="step"):
        sample = out["sample"]
        if pictures.trajectory or pictures.animate:
            predictions.append(out["pred_xstart"].cpu())
    images = finish(sample)
    scale = max(1, SMALLEST_PICTURE // images.shape[1])
    save_grid(pictures.out, images, pictures.columns, scale)
    if pictures.trajectory:
        frames = along_the_way(predictions, TRAJECTORY_FRAMES, finish)
        strip = frames.swapaxes(0, 1).reshape(-1, *images.shape[1:])
        save_grid(pictures.trajectory, strip, len(frames), scale)
    if pictures.animate:
        frames = along_the_way(predictions, ANIMATION_FRAMES, finish)
        save_animation(pictures.animate, frames, pictures.columns, scale)
    logger.log(f"wrote {', '.join(filter(None, (pictures.out, pictures.trajectory, pictures.animate)))}")


def along_the_way(predictions: list[torch.Tensor], num_frames: int, finish: Callable) -> np.ndarray:
    """(F, n, H, W, 3) uint8 of predictions at F <= num_frames evenly spaced steps, the last one among them."""
    places = np.unique(np.linspace(0, len(predictions) - 1, num_frames).round().astype(int))
    return np.stack([finish(predictions[place]) for place in places])


if __name__ == "__main__":
    script_util.run(main)
