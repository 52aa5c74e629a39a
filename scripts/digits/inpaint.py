"""Fill holes of real digits with the model that `make demo` learned, by either method: accuracy, time and a picture."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_run import GUIDANCE, grade_digits, open_demo
from PIL import Image

from masked_diffusion import script_util
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.sample_config import SOLVERS_OF
from masked_diffusion.sampling.editing import METHODS, inpaint
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.pictures import save_grid

SIZE = 8
HOLES = {"lower half": np.s_[4:, :], "right half": np.s_[:, 4:], "all but a frame": np.s_[1:7, 1:7]}
SHOWN, SCALE = 20, 6  # digits of each row of the picture, and screen pixels of each of theirs


@dataclass(frozen=True)
class InpaintConfig(Config):
    """inpainting of digits"""

    demo: str = option("output_demo", "what `make demo` left")
    out: str = option("docs/inpainting", "path of the picture and the figures, without ending")
    num_sampling_steps: str = option("50", "steps of the default solver of the model's objective")
    resamplings: int = option(
        5, "how often every stretch is walked; each method also runs without, which is 1", at_least=1
    )
    num_digits: int = option(360, "test digits to complete", at_least=1)


def read_digits(folder: Path, num: int) -> tuple[np.ndarray, torch.Tensor]:
    """(num, 8, 8, 3) uint8 images and (num,) labels of real digits."""
    paths = sorted(folder.glob("*_*.png"), key=lambda path: path.name.split("_")[1])[:num]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return images, torch.tensor([int(path.name.split("_")[0]) for path in paths])


def accuracy(data: Path, images: np.ndarray, labels: torch.Tensor) -> float:
    return grade_digits.grade(data, images, labels.numpy())["class_accuracy"]


def main() -> None:
    config = script_util.parse_flags(InpaintConfig, __doc__)
    demo = open_demo(config.demo)
    images, labels = read_digits(demo.data / "test", config.num_digits)
    solver = create_solver(SOLVERS_OF[demo.diffusion["objective"]][0], config.num_sampling_steps, demo.diffusion)
    image_sampler = ImageSampler(demo.model, solver, IdentityFirstStage(), guidance=GUIDANCE)
    runs = [(method, walks) for walks in sorted({config.resamplings, 1}, reverse=True) for method in METHODS]
    rows, sheets = {"untouched": accuracy(demo.data, images, labels)}, [images[:SHOWN]]
    seconds = {f"{method}, resamplings {walks}": 0.0 for method, walks in runs}
    for name, place in HOLES.items():
        hole = np.zeros((SIZE, SIZE), dtype=bool)
        hole[place] = True
        emptied = np.where(hole[:, :, None], np.uint8(255), images)
        rows[f"{name} emptied"] = accuracy(demo.data, emptied, labels)
        sheets.append(emptied[:SHOWN])
        for (method, walks), run in zip(runs, seconds, strict=True):
            start = time.process_time()
            options = {"resamplings": walks, "method": method}
            filled = inpaint(image_sampler, range(len(images)), labels, images, hole, **options)
            seconds[run] += time.process_time() - start
            rows[f"{name}, {run}"] = accuracy(demo.data, filled, labels)
            kept = np.array_equal(filled[:, ~hole], images[:, ~hole])
            print(f"{name}, {run}: accuracy {rows[f'{name}, {run}']:.3f}, known pixels kept: {kept}", flush=True)
            sheets.append(filled[:SHOWN])
    report = {"class_accuracy": rows, "cpu_seconds": seconds, "num_digits": len(images)}
    report |= {"solver": solver.name, "num_sampling_steps": solver.num_steps}
    write_json(f"{config.out}.json", report)
    framed = np.pad(np.concatenate(sheets), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=128)
    save_grid(f"{config.out}.png", framed, min(SHOWN, len(images)), SCALE)


if __name__ == "__main__":
    script_util.run(main)
