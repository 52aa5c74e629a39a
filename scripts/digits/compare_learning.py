"""How fast MDTv2, MDT and DiT learn: variants x optimizers x Min-SNR x seeds, and their quality against the cost.

Without --data_dir the images are scikit-learn's digits. Every finished run is a row of OUT.json; the same command goes
on with the runs that are not there yet, also on another machine. --report makes the tables and pictures alone.
"""

import hashlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import learning_report
import numpy as np
import torch
from demo import run_script
from demo_run import grade_digits
from image_classifier import classifier_judge, folder_hash
from learning_factors import cell_of
from learning_runs import VARIANTS, Cell, Judge, Run, evenly, published_cell, train
from learning_tuning import best_lr, next_lr, tried, tuning_cell

from masked_diffusion import script_util
from masked_diffusion.models import create_model
from masked_diffusion.sample_config import SOLVERS
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.locks import FileLock
from masked_diffusion.utils.options import Config, option

TUNING_SEED = 0
DIGITS_SIZE = 8  # pixels of a side
OPTIMIZERS, MIN_SNR = ("adan", "adamw"), (True, False)
LEAST_EVALUATIONS = 8
# Flags with which the rows of one JSON may differ, and still compare.
MAY_CHANGE = ("out", "doc", "work", "seeds", "report", "cells", "data_dir", "test_dir")


@dataclass(frozen=True)
class StudyConfig(Config):
    """the study of learning speed"""

    out: str = option("docs/learning", "path of the JSON and the pictures, without ending")
    doc: str = option("", "Markdown file that gets the tables, between its marks if it has them; '': OUT.md")
    work: str = option("output_learning", "folder for what is not kept: the digits, unfinished runs, samples")
    report: bool = option(False, "train nothing: make tables and pictures of what the JSON has")
    data_dir: str = option("", "training images named CLASS_ANYTHING.jpg, as for image_train.py; '': the digits")
    test_dir: str = option("", "other real images of the same classes, which samples are compared with")
    cells: str = option(
        "all", "all: every variant with every optimizer, with and without Min-SNR; published: each as in its paper",
        choices=("all", "published"),
    )  # fmt: skip
    seeds: int = option(5, "training runs of each cell", at_least=1)
    size: str = option("Nano_2", "size and patch size, of MDTv2_Nano_2 for example")
    hidden_size: int = option(48, "width of the models", at_least=1)
    num_heads: int = option(3, "attention heads of the models", at_least=1)
    image_size: int = option(8, "height and width of the images in pixels", at_least=1)
    random_flip: bool = option(False, "mirror half of the training images")
    mask_ratio: float = option(0.3, "fraction of tokens that the masked pass drops", at_least=0, below=1)
    batch_size: int = option(32, "images of a step", at_least=1)
    ema_rate: float = option(0.99, "EMA rate", at_least=0, below=1)
    steps: int = option(3000, "training steps of a run", at_least=1)
    eval_interval: int = option(250, "steps between evaluations of the EMA", at_least=1)
    tuning_lr: float = option(4e-3, "the learning rate that tuning starts from", above=0)
    tuning_factor: float = option(2.0, "ratio of neighbouring learning rates", above=1)
    num_samples: int = option(500, "images to draw in each evaluation", at_least=2)
    solver: str = option("dpm++", "sampling algorithm of the evaluations", choices=SOLVERS)
    num_sampling_steps: int = option(10, "its steps", at_least=1)

    def check(self) -> "StudyConfig":
        super().check()
        if self.steps % self.eval_interval or self.steps // self.eval_interval < LEAST_EVALUATIONS:
            raise UserError(
                f"--steps is {self.steps} and --eval_interval {self.eval_interval}: steps must be a multiple, of at "
                f"least {LEAST_EVALUATIONS} evaluations"
            )
        if bool(self.data_dir) != bool(self.test_dir):
            raise UserError("--data_dir and --test_dir go together: name a folder of training images and one of others")
        if not self.data_dir and self.image_size != DIGITS_SIZE:
            raise UserError(f"--image_size is {self.image_size}, but the digits have {DIGITS_SIZE}: leave it out")
        if not self.doc_path.parent.is_dir():
            raise UserError(f"the tables go to {self.doc_path}, but there is no folder {self.doc_path.parent}: make it")
        return self

    @property
    def doc_path(self) -> Path:
        return Path(self.doc or f"{self.out}.md")


def cells_of(config: StudyConfig) -> list[Cell]:
    """The cells of the study, those of the papers first."""
    published = [published_cell(variant) for variant in VARIANTS]
    others = [Cell(*each) for each in product(VARIANTS, OPTIMIZERS, MIN_SNR)] if config.cells == "all" else []
    return list(dict.fromkeys([*published, *others]))


# ---------------------------------------------------------------- the JSON


def read_study(path: Path) -> dict[str, Any]:
    """The content of a study's JSON.

    :raises UserError: when it is none.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it, or name another file") from error
    if not isinstance(content, dict) or not {"settings", "judge", "tuning", "runs"} <= content.keys():
        raise UserError(f"{path} is not the JSON of a study of learning speed: name another file")
    return content


def runs_folder(config: StudyConfig, settings: dict[str, Any]) -> Path:
    """Where unfinished runs and samples lie: no study of other settings has the same folder."""
    text = json.dumps(settings, sort_keys=True)
    return Path(config.work) / f"{Path(config.out).name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Results:
    """The study's JSON: its settings, what judges it, and one row for every finished run.

    :raises UserError: when the file there is of other settings.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.path = Path(f"{config.out}.json")
        settings = {key: value for key, value in config.values().items() if key not in MAY_CHANGE}
        folders = (config.data_dir, config.test_dir)
        settings["data"] = list(map(folder_hash, folders)) if config.data_dir else "digits"
        self.content: dict[str, Any] = {"settings": settings, "judge": {}, "tuning": [], "runs": []}
        if self.path.exists():
            self.content = read_study(self.path)
            found = self.content["settings"]
            for key, value in settings.items():
                if found.get(key) != value:
                    raise UserError(
                        f"{self.path} was made with {key} {found.get(key)}, not {value}: give the same flags, or "
                        "another --out"
                    )

    def take_judge(self, about: dict[str, Any]) -> None:
        """Enter who judges.

        :raises UserError: when another classifier has judged the runs that are there.
        """
        hashes = [judge.get("classifier_sha256") for judge in (self.content["judge"], about)]
        if self.content["runs"] and hashes[0] != hashes[1]:
            raise UserError(
                f"{self.path} holds runs that another classifier has judged: put its weights back beside that file, or "
                "choose another --out"
            )
        self.content["judge"] = about

    def find(self, kind: str, run: Run) -> dict | None:
        """The row of a run in `tuning` or `runs`, or None."""
        wanted = {**run.cell._asdict(), "lr": run.lr, "seed": run.seed}
        return next((row for row in self.content[kind] if wanted.items() <= row.items()), None)

    def add(self, kind: str, row: dict) -> None:
        self.content[kind].append(row)
        write_json(self.path, self.content)


# ---------------------------------------------------------------- the queue


def queue(config: StudyConfig, results: Results) -> Iterator[tuple[str, Run]]:
    """The runs that are not in the JSON, in an order that keeps it balanced: tuning first, then seed by seed.

    What comes next depends on what is found: a run must be in the JSON when the next is asked for.
    """
    cells, rows = cells_of(config), results.content["tuning"]
    for cell in dict.fromkeys(map(tuning_cell, cells)):
        while (lr := next_lr(tried(rows, cell), config.tuning_lr, config.tuning_factor)) is not None:
            yield "tuning", Run(cell, lr, TUNING_SEED, config.steps, config.steps)
    for run in asked_runs(config, results):
        if results.find("runs", run) is None:
            yield "runs", run


def asked_runs(config: StudyConfig, results: Results) -> list[Run]:
    """The runs that are not for tuning, seed by seed."""
    cells, rows = cells_of(config), results.content["tuning"]
    return [
        Run(cell, best_lr(tried(rows, cell)), seed, config.steps, config.eval_interval)
        for seed, cell in product(range(TUNING_SEED + 1, TUNING_SEED + 1 + config.seeds), cells)
    ]


# ---------------------------------------------------------------- data, and who judges


def digits_judge(digits: Path, num_samples: int) -> tuple[Judge, dict[str, Any]]:
    grader = grade_digits.Grader(digits)

    def judge(images: Any, labels: Any) -> dict[str, float]:
        grades = grader(images, labels)
        return {"class_accuracy": grades["class_accuracy"], "frechet": grades["frechet_pixels"]}

    pixels, labels = grade_digits.read_folder(digits / "train")
    some = evenly(len(pixels), num_samples)  # as many as an evaluation draws: fewer images are further away
    images = (pixels[some] * 255).round().astype(np.uint8).reshape(-1, DIGITS_SIZE, DIGITS_SIZE, 1).repeat(3, axis=3)
    real = judge(images, labels[some]) | {"class_accuracy": grader.real["real_accuracy"]}
    return judge, {"features": "pixels", "real": real}


def open_data(config: StudyConfig, work: Path) -> tuple[Path, Judge, dict[str, Any]]:
    """Folder of training images, the judge of samples, and what it says of real images."""
    if config.data_dir:
        weights = Path(f"{config.out}_classifier.pt")
        options = (config.data_dir, config.test_dir, config.image_size, config.num_samples, weights)
        return Path(config.data_dir), *classifier_judge(*options)
    run_script("datasets/digits.py", work / "digits")
    return work / "digits/train", *digits_judge(work / "digits", config.num_samples)


def check_models(config: StudyConfig) -> None:
    """Refuse sizes that a model cannot have.

    :raises UserError: as its class.
    """
    for family in sorted({cell.family for cell in cells_of(config)}):
        with torch.device("meta"):
            create_model(
                f"{family}_{config.size}", input_size=config.image_size, hidden_size=config.hidden_size,
                num_heads=config.num_heads, mask_ratio=None if family == "DiT" else config.mask_ratio,
            )  # fmt: skip


def run_flags(config: StudyConfig, data: Path, folder: Path) -> dict[str, Any]:
    """The flags of image_train.py that all runs share."""
    same = ("image_size", "mask_ratio", "random_flip", "batch_size")
    return {name: getattr(config, name) for name in same} | {
        "model": config.size,
        "ema_rate": str(config.ema_rate),
        "data_dir": str(data),
        "index": str(folder / "data_index"),
        "vae": "identity",
        "num_workers": 0,
    }


def study(config: StudyConfig, say: Callable[[str], None]) -> None:
    """Train what the JSON lacks."""
    check_models(config)
    results, work = Results(config), Path(config.work)
    folder = runs_folder(config, results.content["settings"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--work {work} is a file: name a folder") from error
    for row in results.content["tuning"] + results.content["runs"]:  # what a kill after their entry has left
        shutil.rmtree(folder / Run(cell_of(row), row["lr"], row["seed"], row["steps"], 0).name, ignore_errors=True)
    data, judge, about = open_data(config, work)
    results.take_judge(about)
    size = {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
    solver = (config.solver, str(config.num_sampling_steps))
    curve_options = {"judge": judge, "solver": solver, "num_samples": config.num_samples}
    command = shlex.join(["python", "scripts/digits/compare_learning.py", *sys.argv[1:]])
    began, done = time.time(), 0
    for kind, run in queue(config, results):
        if kind == "runs" and not done:
            began = time.time()  # runs that tune have one evaluation
        row = train(run, run_flags(config, data, folder), size, curve_options, folder)
        if not row["complete"] and row["fault"] is None:
            raise KeyboardInterrupt  # the training loop took the signal, and has saved a checkpoint
        results.add(kind, row | {"command": command})
        shutil.rmtree(folder / run.name)
        last = row["curve"][-1] if row["curve"] else {}
        text = "  ".join(f"{key} {last[key]:.4g}" for key in ("class_accuracy", "frechet") if key in last)
        eta = ""
        if kind == "runs":
            done += 1
            left = sum(results.find("runs", each) is None for each in asked_runs(config, results))
            eta = f"  {left} runs left, ETA {timedelta(seconds=round(left * (time.time() - began) / done))}"
        say(f"{kind} {run.name}  {text or row['fault']}  {row['process_cpu_seconds']:.1f} s of CPU{eta}")


def main() -> None:
    config = script_util.parse_flags(StudyConfig, __doc__)
    torch.set_num_threads(1)  # CPU seconds compare only when no thread waits for another
    if not config.report:
        advice = "wait for it, stop it, or choose another --out"
        lock = FileLock(f"{config.out}.json.lock", f"{config.out}.json is being added to", advice)
        try:
            study(config, lambda line: print(line, flush=True))
        finally:
            lock.release()
    path = Path(f"{config.out}.json")
    if not path.is_file():
        raise UserError(f"{path} is no file: leave --report out, to train what it is to hold")
    content = read_study(path)
    learning_report.write(config.out, config.doc_path, content, runs_folder(config, content["settings"]))


if __name__ == "__main__":
    script_util.run(main)
