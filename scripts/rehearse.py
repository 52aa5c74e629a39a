"""Rehearse a row of the published table: every step at full size, with random weights and few images.

Writes a checkpoint in the published layout, draws guided and unguided images with run_sample.sh, makes a reference of
real photos, evaluates both rounds and prints the table of compare.py: with the seconds and the peak memory of each
step. A GPU is not needed. What `--model_path`, `--vae` and `--inception` do not name is made of random numbers here, so
that the metrics mean nothing; that all of it runs, and in how much memory, is what this shows.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmark import device_name
from rehearsal_estimate import Rates, as_markdown, estimate, read_rates
from rehearsal_memory import MemoryWatch
from rehearsal_weights import write_checkpoint, write_inception, write_vae
from sweep_grading import as_user_errors
from typing_extensions import Self

from masked_diffusion import script_util
from masked_diffusion.latents.autoencoder import SD_VAES, check_first_stage, create_first_stage
from masked_diffusion.models import find_model
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.evaluations import load_evaluations
from masked_diffusion.utils.files import atomic_write, write_json
from masked_diffusion.utils.options import Config, option

REPO = Path(__file__).resolve().parents[1]
ROUNDS = ("guided", "unguided")
FIRST_STAGE = {"channels": 4, "downsample": 8}  # of Stable Diffusion, as the checkpoints of random numbers have it


def fewest_photos() -> int:
    """Photos that have the neighbours which the evaluator's metrics look at."""
    neighbours = load_evaluations("neighbours")
    return max(neighbours.MANIFOLD_K, neighbours.DENSITY_K) + 1


@dataclass(frozen=True)
class RehearsalConfig(Config):
    """rehearsal"""

    photos: str = option(
        "", "folder of real photos with its subfolders, or a tar of them, for the reference",
        check=lambda text: None if text else "a folder of photos, or a tar of them",
    )  # fmt: skip
    out: str = option("output_rehearsal", "new folder for everything that is made")
    model: str = option("MDTv2_XL_2", "family, size and patch size of the checkpoint that is made")
    image_size: int = option(256, "height and width of the images in pixels", at_least=16)
    num_samples: int = option(8, "images of each round", at_least=4)
    num_photos: int = option(0, "photos of the reference, drawn at random, at least 6; 0: all", at_least=0)
    num_sampling_steps: int = option(4, "sampling steps; the published rows have 250", at_least=1, at_most=1000)
    batch_size: int = option(4, "images at a time", at_least=1)
    model_path: str | None = option(None, "checkpoint; None: one of random numbers is written")
    vae: str | None = option(None, "autoencoder, as --vae_decoder; None: Stable Diffusion's size, random numbers")
    inception: str | None = option(None, "network of the evaluation; None: Inception-v3 of random numbers")
    images_per_second: float | None = option(
        None, "images that one GPU draws per second, guided and with all steps of the published row, for the estimate",
        above=0,
    )  # fmt: skip
    benchmarks: str | None = option(None, "report of `make gpu` (.json), which holds that figure, for the estimate")

    def check(self) -> Self:
        super().check()
        out = Path(self.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out is {out}, which holds something: name a new folder, or remove that one")
        if not out.absolute().parent.is_dir():
            raise UserError(f"--out is {out}: {out.absolute().parent} is no folder; make it, or name another --out")
        if not Path(self.photos).exists():
            raise UserError(f"--photos names {self.photos}, which does not exist: name a folder or a tar of photos")
        for name in ("model_path", "inception"):
            value = getattr(self, name)
            if value and not Path(value).exists():
                raise UserError(f"--{name} names {value}, which does not exist: leave the flag out for random numbers")
        if 0 < self.num_photos < fewest_photos():
            raise UserError(f"--num_photos is {self.num_photos}: it must be 0 (all), or at least {fewest_photos()}")
        if self.vae and self.vae not in ("identity", *SD_VAES) and "/" not in self.vae and not Path(self.vae).exists():
            raise UserError(f"--vae names {self.vae}, which does not exist: leave the flag out for random numbers")
        patch = find_model(self.model).keywords["patch_size"]
        if self.model_path is None and self.image_size % (FIRST_STAGE["downsample"] * patch):
            raise UserError(
                f"--image_size is {self.image_size}: it must be a multiple of {FIRST_STAGE['downsample'] * patch}, the "
                f"{FIRST_STAGE['downsample']} pixels of a latent times the patch size {patch} of --model {self.model}"
            )
        if self.images_per_second and self.benchmarks:
            raise UserError("--images_per_second and --benchmarks state the same figure: leave one of them out")
        return self


def check_needs(config: RehearsalConfig) -> None:
    """Refuse what a stage would refuse after those before it.

    :raises UserError: for a missing package, too few photos, and an autoencoder that cannot be had or does not fit.
    """
    make_reference = load_evaluations("make_reference")
    with as_user_errors():
        check_packages = load_evaluations("errors").check_packages
        check_packages("diffusers", "scipy", "matplotlib", reason="a rehearsal")
        graph = config.inception and not config.inception.endswith((".pth", ".pt"))
        if not graph or find_spec("tensorflow") is None:
            check_packages("torch-fidelity", reason="the network of the evaluation")
        source = make_reference.open_source(config.photos)
        make_reference.choose(source, config.photos, "", max(config.num_photos, fewest_photos()), 0)
    if config.vae:
        first_stage = create_first_stage(config.vae)
        check_first_stage(first_stage, FIRST_STAGE["channels"], {} if config.model_path else FIRST_STAGE, "--vae")


class Stages:
    """The steps, with seconds and peak memory."""

    def __init__(self, watch: MemoryWatch):
        self.watch, self.rows = watch, []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens within the block."""
        print(f"== {name}", flush=True)
        self.watch.start_stage()
        yield
        self.end(name)

    def end(self, name: str) -> None:
        """Note the stage that ends here, and begin another."""
        seconds, peak = self.watch.end_stage()
        self.rows.append({"stage": name, "seconds": seconds, "peak_memory_gib": peak})
        print(f"== {name}: {seconds:.1f} s, peak {peak:.2f} GiB of all processes together", flush=True)
        self.watch.start_stage()


def run(words: list[Any], env: dict[str, str] | None = None) -> Iterator[str]:
    """Run a command, and yield its lines, which are printed too.

    :raises UserError: when it fails; what it said is on the screen.
    """
    words = [str(word) for word in words]
    command = shlex.join(words)
    print(command, flush=True)
    process = subprocess.Popen(
        words, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        raise UserError(f"{command} ended with status {code}: mend what it says above")


def sample_and_evaluate(stages: Stages, config: RehearsalConfig, made: dict[str, str], reference: Path) -> None:
    """run_sample.sh, whose commands begin the stages: it prints each before it runs it."""
    env = {
        "REFERENCE": reference, "MODEL_PATH": made["model_path"], "OUT": config.out, "NUM_GPUS": 1,
        "NUM_SAMPLES": config.num_samples, "NUM_SAMPLING_STEPS": config.num_sampling_steps,
        "BATCH_SIZE": config.batch_size, "INCEPTION_V3_PATH": made["inception"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    names = iter([f"{step}, {round_}" for round_ in ROUNDS for step in ("sampling", "evaluation")])
    current = None
    stages.watch.start_stage()
    for line in run([REPO / "run_sample.sh", "--vae_decoder", made["vae"]], {k: str(v) for k, v in env.items()}):
        if line.startswith(("torchrun ", "python ")):
            if current:
                stages.end(current)
            current = next(names)
    stages.end(current)


def rehearse(config: RehearsalConfig, rates: Rates | None) -> dict[str, Any]:
    """Run all steps. Returns the report."""
    out = Path(config.out)
    out.mkdir(exist_ok=True)
    made = {"model_path": config.model_path, "vae": config.vae, "inception": config.inception}
    random = [name for name, value in made.items() if value is None]
    reference, latents = out / "reference.npz", config.image_size // FIRST_STAGE["downsample"]
    with MemoryWatch() as watch:
        stages = Stages(watch)
        if config.model_path is None:
            with stages.stage("checkpoint of random numbers"):
                made["model_path"] = str(write_checkpoint(out / "checkpoint.pt", config.model, latents))
        if config.vae is None or config.inception is None:
            with stages.stage("autoencoder and Inception of random numbers"):
                made["vae"] = config.vae or str(write_vae(out / "vae"))
                made["inception"] = config.inception or str(write_inception(out / "inception.pth"))
        with stages.stage("reference"):
            words = [sys.executable, REPO / "evaluations" / "make_reference.py", config.photos, reference]
            words += ["--image_size", config.image_size, "--num_images", config.num_photos]
            for _ in run([*words, "--inception", made["inception"]]):
                pass
        sample_and_evaluate(stages, config, made, reference)
        with stages.stage("table"):
            metrics = [out / round_ / "metrics.json" for round_ in ROUNDS]
            compare = [sys.executable, REPO / "evaluations" / "compare.py", *metrics, "--plot", out / "table.png"]
            table = [line for line in run(compare) if line.startswith(("|", "(!)"))]
    report = {
        "settings": config.values(),
        "random": random,
        "device": device_name("cpu"),
        "stages": stages.rows,
        "peak_memory_gib": max(row["peak_memory_gib"] for row in stages.rows),
        "seconds": sum(row["seconds"] for row in stages.rows),
        "metrics": {
            round_: json.loads(path.read_text())["metrics"] for round_, path in zip(ROUNDS, metrics, strict=True)
        },
        "table": "".join(table),
    }
    return report | {"estimate": estimate(rates) if rates else None}


def main() -> None:
    config = script_util.parse_flags(RehearsalConfig, __doc__)
    rates = read_rates(config.images_per_second, config.benchmarks, config.model)
    check_needs(config)
    report = rehearse(config, rates)
    write_json(Path(config.out, "rehearsal.json"), report)
    with atomic_write(Path(config.out, "rehearsal.md")) as file:
        file.write(as_markdown(report).encode())
    print(as_markdown(report))


if __name__ == "__main__":
    script_util.run(main)
