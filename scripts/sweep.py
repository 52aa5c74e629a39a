"""Sweep EMA, guidance and solver on the same noises: a table, heat maps, and which setting is the best.

Every combination draws the same images (noise and class of image i are functions of the seed and i) and is graded. The
report is written after each; the same command goes on where the last one stopped, and with more values it draws only
what is new. torchrun shares the images of each setting among several GPUs.
"""

import argparse
import hashlib
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sweep_grading import GradingConfig, create_grader
from sweep_report import add_best, read_report, write_pictures
from typing_extensions import Self

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.config import LARGEST_SEED
from masked_diffusion.sample_config import (
    CFG_SCALE,
    SCALE_POW,
    SOLVERS,
    GuidanceConfig,
    SampleConfig,
    SolverConfig,
    WeightsConfig,
)
from masked_diffusion.sampling.build import LoadedWeights, load_weights, make_image_sampler, weights_hash
from masked_diffusion.sampling.image_sampler import choose_labels
from masked_diffusion.sampling.shards import ShardStore, draw_samples
from masked_diffusion.training.ema import Recipe, mix_snapshots, plan_reconstruction
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.flag_values import MAX_SIGMA_REL, check_steps
from masked_diffusion.utils.locks import FileLock
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.pictures import save_grid
from masked_diffusion.utils.precision import choose_precision
from masked_diffusion.weights.pretrained import check_fit, find_weights, read_weights

SECONDS_PER_PICTURE = 60.0
SHOWN = 20  # images in the grid that each setting leaves
ON_DIGITS = {"model_path": "output_demo/train", "digits": "output_demo/data", "num_samples": 1000, "batch_size": 250}
PRESETS = {
    "digits": ON_DIGITS
    | {
        "out": "output_demo/sweep",
        "sigma_rels": (0.05, 0.10, 0.15),
        "cfg_scales": (1.0, 1.5, 2.0, 3.0),
        "scale_pows": (1.0,),
        "solvers": ("ddim:10", "sde-dpm++:10"),
    },
    "solvers": ON_DIGITS
    | {
        "out": "output_demo/solvers",
        "cfg_scales": (1.0, 1.5),
        "scale_pows": (1.0,),
        "solvers": ("ddpm:250", "ddim:50", "dpm++:20", "sde-dpm++:20", "unipc:10"),
    },
}


def check_solvers(words: tuple[str, ...]) -> str | None:
    """For `--solvers`."""
    named = [word.partition(":") for word in words]
    fits = words and all(name in SOLVERS and check_steps(steps) is None for name, _, steps in named)
    return None if fits else f"SOLVER:STEPS such as ddim:50, with a solver of {', '.join(SOLVERS)}"


def check_intervals(words: tuple[str, ...]) -> str | None:
    """For `--guidance_intervals`."""
    pairs = [word.split(",") for word in words]
    fits = all(len(pair) == 2 and all(map(str.isdecimal, pair)) and int(pair[0]) <= int(pair[1]) for pair in pairs)
    return None if fits else "FIRST,LAST such as 200,800: two timesteps, the smaller one first"


@dataclass(frozen=True)
class AxesConfig(Config):
    """what is swept"""

    emas: tuple[str, ...] = option(
        (), "EMAs by the names of their files in the folder --model_path, such as ema_0.9999_400000.pt; with neither "
        "these nor --sigma_rels: the weights that --model_path names",
    )  # fmt: skip
    sigma_rels: tuple[float, ...] = option(
        (), "widths of post-hoc EMAs, made of the snapshots in the folder --model_path", above=0, below=MAX_SIGMA_REL
    )
    cfg_scales: tuple[float, ...] = option((CFG_SCALE,), "guidance scales; 1: no guidance", at_least=0)
    scale_pows: tuple[float, ...] = option((), "powers of the power-cosine rule", at_least=0)
    guidance_intervals: tuple[str, ...] = option(
        (), "timesteps FIRST,LAST between which the interval rule guides; with neither these nor --scale_pows: the "
        "rule of the model's family", check=check_intervals,
    )  # fmt: skip
    solvers: tuple[str, ...] = option(("ddpm:250",), "solvers with their steps, as SOLVER:STEPS", check=check_solvers)


@dataclass(frozen=True)
class ImagesConfig(Config):
    """images and report"""

    preset: str | None = option(
        None, "other defaults, for what `make demo` left: digits sweeps EMA, guidance and solver; solvers, solvers",
    )  # fmt: skip
    num_samples: int = option(5000, "images of each setting, of balanced classes", at_least=2)
    batch_size: int = option(50, "images per rank at a time", at_least=1)
    seed: int = option(0, "random seed; image i depends only on it and i", at_least=0, at_most=LARGEST_SEED)
    clip_denoised: bool = option(False, "clip the predicted x_start to [-1, 1]")
    out: str = option("output_sweep", "path of the report's .json, .md and .png, without their endings")
    samples_dir: str | None = option(
        None, "folder for the images while they are drawn, and a grid of the first of each setting; None: OUT_samples"
    )


@dataclass(frozen=True)
class SweepConfig(Config):
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    axes: AxesConfig = AxesConfig()
    grading: GradingConfig = field(default_factory=GradingConfig)
    images: ImagesConfig = ImagesConfig()

    def check(self) -> Self:
        super().check()
        for name, values in self.axes.values().items():
            if len(set(values)) < len(values):
                raise UserError(f"--{name} names a value twice: {' '.join(map(str, values))}")
        return self


class Cell(NamedTuple):
    """One setting.

    :param shape: how guidance depends on the timestep: `power 4`, `interval 200,800`, or the name of a rule.
    """

    ema: str
    cfg_scale: float
    shape: str
    solver: str

    def key(self) -> str:
        """The name of the setting, of its files and of its row."""
        guidance = "unguided" if self.cfg_scale == 1 else f"scale {self.cfg_scale:g}, {self.shape}"
        return f"{self.ema}, {self.solver}, {guidance}"


# ---------------------------------------------------------------- EMAs


def find_emas(config: SweepConfig) -> dict[str, Path | Recipe]:
    """The file or the recipe of each EMA, by the name that the report has for it.

    :raises UserError: for one that is not there, or cannot be made.
    """
    folder, axes = Path(config.weights.model_path), config.axes
    if not (axes.emas or axes.sigma_rels):
        return {"weights": find_weights(config.weights.model_path)}
    if not folder.is_dir():
        raise UserError(f"--model_path is {folder}: with --emas or --sigma_rels it must be a training folder")
    found = {}
    for name in axes.emas:
        if not (folder / name).exists():
            raise UserError(f"--emas names {name}, but {folder} does not hold it")
        found[name.removesuffix(".pt")] = find_weights(folder / name)
    for sigma_rel in axes.sigma_rels:
        recipe = plan_reconstruction(folder, sigma_rel)
        logger.log(f"sigma_rel {sigma_rel:g}: relative residual of the profile {recipe.residual:.1e}")
        found[f"sigma_rel {sigma_rel:g}"] = recipe
    return found


def hash_emas(emas: dict[str, Path | Recipe]) -> dict[str, str]:
    """What identifies each EMA: the hash of its file, or of the snapshots and weights of its recipe."""
    known = {}

    def of_file(path: Path) -> str:
        known[path] = known.get(path) or weights_hash(path)
        return known[path]

    def of_recipe(recipe: Recipe) -> str:
        parts = [f"{of_file(path)} {weight!r}" for path, weight in zip(recipe.paths, recipe.weights, strict=True)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    return {name: of_recipe(ema) if isinstance(ema, Recipe) else of_file(ema) for name, ema in emas.items()}


def load_ema(weights: LoadedWeights, ema: Path | Recipe) -> None:
    """Give the loaded model the weights of an EMA.

    :raises UserError: for a file that holds none, and for those of another model.
    """
    path, state = (ema.paths[-1], mix_snapshots(ema)) if isinstance(ema, Recipe) else (ema, read_weights(ema))
    check_fit(path, weights.model.state_dict(), state, f"the model of {weights.files['weights']}")
    weights.model.load_state_dict(state)


# ---------------------------------------------------------------- settings


def all_cells(axes: AxesConfig, emas: list[str], model_rule: str) -> list[Cell]:
    """All settings, those of an EMA together. Without guidance its shape makes no difference: keys are the same."""
    shapes = [f"power {value:g}" for value in axes.scale_pows]
    shapes += [f"interval {word}" for word in axes.guidance_intervals]
    if not shapes:
        shapes = [f"power {SCALE_POW:g}" if model_rule == "power-cosine" else model_rule]
    return [Cell(*values) for values in product(emas, axes.cfg_scales, shapes, axes.solvers)]


def sample_config(config: SweepConfig, cell: Cell) -> SampleConfig:
    """The flags of `image_sample.py` that draw the images of a setting."""
    name, _, steps = cell.solver.partition(":")
    solver = SolverConfig(
        solver=name, num_sampling_steps=steps, clip_denoised=config.images.clip_denoised, seed=config.images.seed
    )
    kind, _, value = cell.shape.partition(" ")
    if cell.cfg_scale == 1:
        guidance = GuidanceConfig(guidance="none")
    elif kind == "power":
        guidance = GuidanceConfig(guidance="power-cosine", cfg_scale=cell.cfg_scale, scale_pow=float(value))
    elif kind == "interval":
        interval = tuple(map(float, value.split(",")))
        guidance = GuidanceConfig(guidance="interval", cfg_scale=cell.cfg_scale, guidance_interval=interval)
    else:
        guidance = GuidanceConfig(guidance=kind, cfg_scale=cell.cfg_scale)
    return SampleConfig(config.weights, solver, guidance)


# ---------------------------------------------------------------- drawing and grading


def npz_of(config: SweepConfig, key: str) -> Path:
    """Where the images of a setting lie until they are graded."""
    folder = Path(config.images.samples_dir or f"{config.images.out}_samples")
    return folder / f"{key.replace(':', '-').replace(', ', '_').replace(' ', '')}.npz"


def draw(
    config: SweepConfig, cell: Cell, weights: LoadedWeights, identity: dict[str, Any]
) -> tuple[Path, float | None]:
    """Draw the images of a setting, as far as they are not there.

    :return: the npz, and images per second; None where an earlier call drew them.
    """
    images, path = config.images, npz_of(config, cell.key())
    image_sampler = make_image_sampler(sample_config(config, cell), weights, images.batch_size, "truncate")
    choose = partial(
        choose_labels, class_rule="balanced", num_classes=weights.model.num_classes, seed=config.images.seed
    )
    dist_util.run_on_main(partial(path.parent.mkdir, parents=True, exist_ok=True))
    with ShardStore(path, identity) as store:
        if store.finished():
            return path, None
        image_sampler([0], choose([0]))  # what is made on first use is made
        missing, start = len(store.missing(images.num_samples)), time.perf_counter()
        draw_samples(image_sampler, store, images.num_samples, images.batch_size, choose)
        speed = missing / (time.perf_counter() - start)
        if dist_util.is_main():
            save_grid(path.with_suffix(".png"), store.merge(images.num_samples)[:SHOWN], columns=SHOWN)
        dist_util.host_barrier()
    return path, speed


def image_settings(config: SweepConfig, weights: LoadedWeights) -> dict[str, Any]:
    """What all rows of a report have in common, but for the grader's part of it."""
    settings = {name: getattr(config.images, name) for name in ("num_samples", "seed", "clip_denoised")}
    precision = choose_precision(SampleConfig(config.weights).precision, dist_util.dev())
    settings |= {"vae": weights.vae, "vae_precision": weights.first_stage.precision, "precision": precision}
    return settings | {"metrics": list(config.grading.keys), "bootstrap": config.grading.bootstrap}


def start_report(
    config: SweepConfig, cells: list[Cell], emas: dict[str, Path | Recipe], weights: LoadedWeights, grader: Any
) -> dict[str, Any]:
    """The report so far, after all that can be refused; what is quick to find out comes first.

    :raises UserError: for a report of other settings, EMAs that cannot be loaded, and as `grader.prepare`.
    """
    path, settings = Path(f"{config.images.out}.json"), image_settings(config, weights)
    hashes = dist_util.run_on_main(hash_emas, emas)
    report = dist_util.run_on_main(read_report, path, settings | grader.identity, hashes)
    for name in dict.fromkeys(cell.ema for cell in cells if cell.key() not in report["rows"]):
        load_ema(weights, emas[name])
    grader.prepare()
    return dist_util.run_on_main(read_report, path, settings | grader.identity, hashes)


def sweep(
    config: SweepConfig, cells: list[Cell], emas: dict[str, Path | Recipe], weights: LoadedWeights, grader: Any
) -> Iterator[dict]:
    """Draw and grade what the report lacks. Yields the report after each setting, on all ranks."""
    report = start_report(config, cells, emas, weights, grader)
    if dist_util.is_main():  # of a sweep that was killed after it wrote a row
        for key in report["rows"]:
            npz_of(config, key).unlink(missing_ok=True)
    waiting = {cell.key(): cell for cell in cells if cell.key() not in report["rows"]}
    logger.log(f"{len({cell.key() for cell in cells})} settings, of which {len(waiting)} are to be drawn")
    loaded, start = None, time.monotonic()
    for count, (key, cell) in enumerate(waiting.items()):
        if cell.ema != loaded:
            load_ema(weights, emas[cell.ema])
            loaded = cell.ema
        path, speed = draw(
            config, cell, weights, report["settings"] | {"cell": key, "ema_sha256": report["emas"][cell.ema]}
        )
        grades = dist_util.broadcast_object(grader(path))
        grades_of_row = {"metrics": grades.values, "deviations": grades.deviations, "replicates": grades.replicates}
        report["rows"][key] = {**cell._asdict(), **grades_of_row, "images_per_second": speed}
        left = (time.monotonic() - start) / (count + 1) * (len(waiting) - count - 1)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in grades.values.items())
        logger.log(f"setting {count + 1} of {len(waiting)}: {key}: {shown}  ETA {left / 60:.0f} min")
        yield report
        if dist_util.is_main():  # its row is written
            path.unlink()
        dist_util.host_barrier()
    if not waiting:
        yield report


def read_flags(argv: list[str]) -> SweepConfig:
    """The flags, whose defaults are those of `--preset` where it is given."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    preset = early.parse_known_args(argv)[0].preset
    if preset not in (None, *PRESETS):
        raise UserError(f"--preset is {preset}: it must be one of {', '.join(PRESETS)}")
    return script_util.parse_flags(SweepConfig, __doc__, argv, **PRESETS.get(preset, {}))


@contextmanager
def own_report(out: Path) -> Iterator[None]:
    """Keep other sweeps off the report during the block. All ranks enter it together.

    :raises UserError: while another one writes it.
    """
    locks, advice = [], "wait for it, end it, or choose another --out"
    path = out.with_name(f".{out.name}.lock")
    dist_util.run_on_main(lambda: locks.append(FileLock(path, f"{out}.json is being made", advice)))
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


def device_name() -> str:
    """What the images are drawn on."""
    device = dist_util.dev()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else load_evaluations("ranks").processor()


def run(config: SweepConfig, out: Path) -> None:
    """Find and load everything, then draw and grade; the report grows with each setting."""
    emas = dist_util.run_on_main(find_emas, config)
    grader = create_grader(config.grading, config.images.num_samples)
    first = next(iter(emas.values()))
    source = config.weights.model_path if isinstance(first, Recipe) else str(first)
    weights = load_weights(SampleConfig(config.weights).replaced(model_path=source))
    grader.check_size(weights.model.input_size * weights.first_stage.downsample)
    cells = all_cells(config.axes, list(emas), weights.model.guidance_rule)
    for cell in cells:  # steps and guidance that the model cannot have are refused before the first is drawn
        make_image_sampler(sample_config(config, cell), weights)
    facts = {"command": shlex.join(["python", "scripts/sweep.py", *sys.argv[1:]]), "device": device_name()}
    drawn = time.monotonic()
    for report in sweep(config, cells, emas, weights, grader):
        report = facts | add_best(report, cells, config.grading) | facts
        finished = all(cell.key() in report["rows"] for cell in cells)
        if dist_util.is_main():
            write_json(f"{out}.json", report)
            if finished or time.monotonic() - drawn > SECONDS_PER_PICTURE:
                write_pictures(out, report, cells, config.grading.keys)
                drawn = time.monotonic()
    logger.log(f"{report['best']['sentence']}\nwrote {out}.json, {out}.md and {out}.png")


def main() -> None:
    config = read_flags(sys.argv[1:])
    out = Path(config.images.out)
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: {out.parent} is no folder; make it, or name another --out")
    dist_util.join_process_group()
    logger.configure(config.images.samples_dir or f"{out}_samples", quiet=not dist_util.is_main())
    with own_report(out):
        run(config, out)


if __name__ == "__main__":
    script_util.run(main)
