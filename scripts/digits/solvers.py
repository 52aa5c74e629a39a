"""Solvers side by side on the digits that `make demo` learned: accuracy, distance and seconds, as table and picture."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from demo_run import GUIDANCE, DemoRun, grade_digits, open_demo

from masked_diffusion import script_util
from masked_diffusion.guidance import Guidance
from masked_diffusion.latents.autoencoder import IdentityFirstStage
from masked_diffusion.sampling.image_sampler import ImageSampler, choose_labels
from masked_diffusion.sampling.solvers import create_solver
from masked_diffusion.utils.files import atomic_write, write_json
from masked_diffusion.utils.options import Config, option

SOLVERS = (("ddpm", "250"), ("ddim", "50"), ("dpm++", "20"), ("sde-dpm++", "20"), ("unipc", "10"))
GUIDANCES = {"none": Guidance(), f"scale {GUIDANCE.cfg_scale}": GUIDANCE}
COLUMNS = ("solver", "steps", "guidance", "class_accuracy", "frechet_pixels", "seconds")
SHOWN = 20  # digits of each row of the picture


@dataclass(frozen=True)
class SolversConfig(Config):
    """solvers side by side"""

    demo: str = option("output_demo", "what `make demo` left")
    out: str = option("docs/solvers", "path of the three files, without their endings")
    num_samples: int = option(1000, "images of each run", at_least=2)
    batch_size: int = option(250, "images at a time", at_least=1)


def draw(image_sampler: ImageSampler, labels: torch.Tensor, batch_size: int) -> tuple[np.ndarray, float]:
    """(N, H, W, 3) uint8 images, and the seconds that they took."""
    image_sampler(range(len(labels[:8])), labels[:8])  # what is made on first use is made
    start = time.perf_counter()
    parts = torch.arange(len(labels)).split(batch_size)
    images = np.concatenate([image_sampler(part.numpy(), labels[part]) for part in parts])
    return images, time.perf_counter() - start


def measure(demo: DemoRun, config: SolversConfig) -> tuple[list[dict], np.ndarray]:
    """Draw and grade digits with every solver, with and without guidance.

    :return: rows of the table, and (rows, SHOWN, H, W, 3) uint8 of their first digits.
    """
    labels = choose_labels(range(config.num_samples), "balanced", demo.model.num_classes, seed=0)
    rows, shown = [], []
    for solver, steps in SOLVERS:
        for name, guidance in GUIDANCES.items():
            made = create_solver(solver, steps, demo.diffusion)
            image_sampler = ImageSampler(demo.model, made, IdentityFirstStage(), guidance=guidance)
            images, seconds = draw(image_sampler, labels, config.batch_size)
            grades = grade_digits.grade(demo.data, images, labels.numpy())
            row = {"solver": solver, "steps": int(steps), "guidance": name, "seconds": seconds} | grades
            rows.append({key: row[key] for key in COLUMNS})
            shown.append(images[:SHOWN])
            print(format_row(rows[-1]), flush=True)
    return rows, np.stack(shown)


def format_row(row: dict) -> str:
    cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in (row[key] for key in COLUMNS))
    return f"| {' | '.join(cells)} |"


def write_picture(path: str, rows: list[dict], shown: np.ndarray) -> None:
    """Bars of accuracy, distance and seconds, and the first digits, of every row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{row['solver']}-{row['steps']}, {row['guidance']}" for row in rows]
    figure, panels = plt.subplots(1, 4, figsize=(15, 4.5), layout="constrained", width_ratios=[1, 1, 1, 2.2])
    titles = {"class_accuracy": "class accuracy", "frechet_pixels": "pixel Frechet distance", "seconds": "seconds"}
    colours = ["tab:gray" if row["guidance"] == "none" else "tab:blue" for row in rows]
    for panel, (key, title) in zip(panels, titles.items(), strict=False):
        bars = panel.barh(names, [row[key] for row in rows], color=colours)
        panel.bar_label(bars, fmt="%.3f" if key != "seconds" else "%.1f", padding=2)
        panel.set(title=title, xscale="log" if key == "seconds" else "linear")
        panel.margins(x=0.25)
        panel.invert_yaxis()
        panel.set_yticks(range(len(names)), names if key == "class_accuracy" else [""] * len(names))
    sheet = np.pad(shown, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    count, columns, height, width, _ = sheet.shape
    panels[3].imshow(sheet.transpose(0, 2, 1, 3, 4).reshape(count * height, columns * width, 3), aspect="auto")
    panels[3].set(title="the first digits of each")
    panels[3].axis("off")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def main() -> None:
    config = script_util.parse_flags(SolversConfig, __doc__)
    rows, shown = measure(open_demo(config.demo), config)
    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(format_row, rows)]
    with atomic_write(f"{config.out}.md") as file:
        file.write(("\n".join(table) + "\n").encode())
    write_json(f"{config.out}.json", rows)
    write_picture(f"{config.out}.png", rows, shown)


if __name__ == "__main__":
    script_util.run(main)
