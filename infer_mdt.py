"""Draw pictures of some classes, fill a hole of an image, or vary one. By default what the published script draws."""

import numpy as np
import torch
from tqdm.auto import tqdm

from masked_diffusion import logger, script_util
from masked_diffusion.image_datasets import center_crop_arr, read_image
from masked_diffusion.sampling import build as sample_util
from masked_diffusion.sampling import editing
from masked_diffusion.sampling.class_names import find_label
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.pictures import check_picture_name, save_animation, save_grid

CLASSES = ("19", "23", "106", "108", "278", "282")
TRAJECTORY_FRAMES, ANIMATION_FRAMES = 10, 50
SMALLEST_PICTURE = 64  # pixels; smaller ones are enlarged without smoothing


def parse_args():
    parser = script_util.make_parser(__doc__)
    sample_util.add_weights_flags(parser, default="shgao/MDT-XL2")
    sample_util.add_solver_flags(parser)
    sample_util.add_guidance_flags(parser)
    parser.set_defaults(cfg_cond=True, cfg_scale=4.0, scale_pow=0.01, seed=1)
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--classes", nargs="+", default=CLASSES, help='numbers or names: 279 "golden retriever"')
    pictures.add_argument("--out", default="sample.jpg", help="the grid of pictures")
    pictures.add_argument("--columns", type=int, default=3, help="pictures per row")
    pictures.add_argument("--trajectory", help="file for a strip of the predicted images along the way")
    pictures.add_argument("--animate", help="GIF of the predicted images along the way")
    edit = parser.add_argument_group("from an image")
    edit.add_argument("--inpaint", metavar="IMAGE", help="image to fill a hole of")
    edit.add_argument("--mask", help="picture of the image's size, white where it is to be filled")
    edit.add_argument("--jump_length", type=int, default=10, help="steps that inpainting goes back at a time")
    edit.add_argument("--resamplings", type=int, default=10, help="how often inpainting walks every stretch")
    edit.add_argument("--variations", metavar="IMAGE", help="image to vary")
    edit.add_argument("--strength", type=float, default=0.6, help="share of the steps that a variation runs, in (0, 1]")
    return parser.parse_args()


def check_args(args):
    """Refuse flags that contradict each other, before weights are loaded."""
    script_util.check_positive(args, "columns", "jump_length", "resamplings")
    if bool(args.inpaint) != bool(args.mask):
        raise UserError("--inpaint and --mask go together: give the image and the picture of what to fill")
    if args.inpaint and args.variations:
        raise UserError("--inpaint and --variations exclude each other: choose one")
    for path in filter(None, (args.out, args.trajectory, args.animate)):
        check_picture_name(path)


def draw(args, sampler, labels):
    """Start drawing.

    :return: the steps; how many there are; and a function from latents to images.
    """
    indices = range(len(labels))
    size = sampler.model.input_size * sampler.first_stage.downsample
    if args.inpaint:
        image, hole = editing.read_image_and_hole(args.inpaint, args.mask, size)
        jumps = {"jump_length": args.jump_length, "resamplings": args.resamplings}
        steps = editing.inpaint_progressive(sampler, indices, labels, image, hole, **jumps)
        total = editing.count_evaluations(sampler.solver.num_evaluations, **jumps)
        return steps, total, lambda latents: editing.paste(image, hole, sampler.decode(latents))
    if args.variations:
        image = center_crop_arr(read_image(args.variations), size)
        steps = editing.vary_progressive(sampler, indices, labels, image, args.strength)
        return steps, None, sampler.decode
    return sampler.progressive(indices, labels), sampler.solver.num_evaluations, sampler.decode


def main():
    args = parse_args()
    check_args(args)
    sampler, names, *_ = sample_util.load_sampler(args)
    labels = torch.tensor([find_label(text, names, sampler.model.num_classes) for text in args.classes])
    steps, total, finish = draw(args, sampler, labels)
    predictions = []
    for out in tqdm(steps, total=total, unit="step"):
        sample = out["sample"]
        if args.trajectory or args.animate:
            predictions.append(out["pred_xstart"].cpu())
    images = finish(sample)
    scale = max(1, SMALLEST_PICTURE // images.shape[1])
    save_grid(args.out, images, args.columns, scale)
    if args.trajectory:
        frames = along_the_way(predictions, TRAJECTORY_FRAMES, finish)
        save_grid(args.trajectory, frames.swapaxes(0, 1).reshape(-1, *images.shape[1:]), len(frames), scale)
    if args.animate:
        save_animation(args.animate, along_the_way(predictions, ANIMATION_FRAMES, finish), args.columns, scale)
    logger.log(f"wrote {', '.join(filter(None, (args.out, args.trajectory, args.animate)))}")


def along_the_way(predictions, num_frames, finish):
    """(F, n, H, W, 3) uint8 of predictions at F <= num_frames evenly spaced steps, the last one among them."""
    places = np.unique(np.linspace(0, len(predictions) - 1, num_frames).round().astype(int))
    return np.stack([finish(predictions[place]) for place in places])


if __name__ == "__main__":
    script_util.run(main)
