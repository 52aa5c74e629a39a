"""Fill holes of real digits with the model that `make demo` learned: accuracy of what comes out, and a picture."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from masked_diffusion import load_model, script_util
from masked_diffusion.guidance import Guidance
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.sampling.editing import inpaint
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.pictures import save_grid
from masked_diffusion.weights.checkpoint import read_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "evaluations"))

import grade_digits

from masked_diffusion.utils.errors import UserError

SIZE = 8
HOLES = {"lower half": np.s_[4:, :], "right half": np.s_[:, 4:], "all but a frame": np.s_[1:7, 1:7]}
SHOWN, SCALE = 20, 6


def parse_args():
    parser = script_util.make_parser(__doc__)
    parser.add_argument("--demo", default="output_demo", help="what `make demo` left")
    parser.add_argument("--out", default="docs/inpainting", help="path of the picture and the figures, without ending")
    parser.add_argument("--num_sampling_steps", default="50", help="steps of ancestral sampling")
    parser.add_argument("--resamplings", type=int, default=5, help="how often RePaint walks every stretch")
    parser.add_argument("--num_digits", type=int, default=360, help="test digits to complete")
    return parser.parse_args()


def read_digits(folder, num):
    """(num, 8, 8, 3) uint8 images and (num,) labels of real digits."""
    paths = sorted(folder.glob("*_*.png"), key=lambda path: path.name.split("_")[1])[:num]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, torch.tensor([int(path.name.split("_")[0]) for path in paths])


def accuracy(data, images, labels):
    return grade_digits.grade(data, images, labels.numpy())["class_accuracy"]


def main():
    args = parse_args()
    script_util.check_positive(args, "resamplings", "num_digits")
    train, data = Path(args.demo, "train"), Path(args.demo, "data")
    if not train.is_dir():
        raise UserError(f"{train} is not there: run `make demo` first, or name its folder with --demo")
    images, labels = read_digits(data / "test", args.num_digits)
    solver = create_solver("ddpm", args.num_sampling_steps, read_config(train)["diffusion"])
    guidance = Guidance("power-cosine", 1.5, scale_pow=1.0)
    sampler = ImageSampler(load_model(train), solver, IdentityFirstStage(), guidance=guidance)
    rows, sheets = {"untouched": accuracy(data, images, labels)}, [images[:SHOWN]]
    for name, place in HOLES.items():
        hole = np.zeros((SIZE, SIZE), dtype=bool)
        hole[place] = True
        filled = inpaint(sampler, range(len(images)), labels, images, hole, resamplings=args.resamplings)
        emptied = np.where(hole[:, :, None], np.uint8(255), images)
        rows[f"{name} emptied"] = accuracy(data, emptied, labels)
        rows[f"{name} filled"] = accuracy(data, filled, labels)
        kept = np.array_equal(filled[:, ~hole], images[:, ~hole])
        print(f"{name}: accuracy {rows[f'{name} filled']:.3f}, known pixels kept: {kept}", flush=True)
        sheets += [emptied[:SHOWN], filled[:SHOWN]]
    write_json(f"{args.out}.json", {"class_accuracy": rows, "num_digits": len(images)})
    framed = np.pad(np.concatenate(sheets), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    save_grid(f"{args.out}.png", framed, SHOWN, SCALE)


if __name__ == "__main__":
    script_util.run(main)
