"""From nothing to handwritten digits on request: write the data, train a small masked MDTv2, sample, grade.

`make demo` runs it. A step whose result is there is not done again, and an interrupted training resumes.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_run
from demo_run import grade_digits

from masked_diffusion import dist_util, script_util
from masked_diffusion.sample_config import SOLVERS_OF
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.precision import PRECISIONS_OR_AUTO, choose_precision

REPO = Path(__file__).resolve().parents[2]
TRAIN_FLAGS = {
    "model": "MDTv2_Nano_2",
    "image_size": 8,
    "vae": "identity",
    "mask_ratio": 0.3,
    "random_flip": False,
    "batch_size": 32,
    "lr": 5e-3,
    "ema_rate": 0.995,
    "phema": "0.05,0.10",  # of which the study of sweep.py makes other EMAs
    "save_interval": 300,
    "log_interval": 50,
    "num_workers": 0,
}
SAMPLE_FLAGS = {
    "num_sampling_steps": 50,
    "cfg_cond": True,
    "cfg_scale": demo_run.GUIDANCE.cfg_scale,
    "scale_pow": demo_run.GUIDANCE.scale_pow,
    "class_rule": "balanced",
    "batch_size": 250,
}


@dataclass(frozen=True)
class DemoConfig(Config):
    """the demo"""

    out: str = option("output_demo", "folder for everything that is made")
    objective: str = option("diffusion", "what the model learns: diffusion or flow matching", choices=tuple(SOLVERS_OF))
    train_steps: int = option(3000, "training steps", at_least=1)
    num_samples: int = option(1000, "images to draw and grade", at_least=2)
    precision: str = option(
        "auto", "number format of the network, in training and sampling; auto: bf16 where this machine computes it "
        "faster, else fp32", choices=PRECISIONS_OR_AUTO,
    )  # fmt: skip


def run_script(script: str, *words: Any) -> None:
    """Run a script of this repository; where it fails, having said why, end with its exit code."""
    command = [sys.executable, str(REPO / script), *map(str, words)]
    print(" ".join(command), flush=True)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the script was interrupted too: training saves a checkpoint first
        raise
    if code:
        sys.exit(code)


def run_timed(name: str, script: str, flags: dict, out: Path) -> None:
    """Run a script, and add its seconds to those of its earlier runs in `seconds.json`."""
    record, start = out / "seconds.json", time.perf_counter()
    try:
        run_script(script, *(f"--{key}={value}" for key, value in flags.items()))
    finally:
        seconds = json.loads(record.read_text()) if record.exists() else {}
        write_json(record, seconds | {name: seconds.get(name, 0.0) + time.perf_counter() - start})


def write_report(out: Path, samples: Path, train_steps: int) -> None:
    """Grade the samples: `report.json`, and the pictures `samples.png` and `loss.png`."""
    images, labels = grade_digits.read_samples(samples)
    seconds = json.loads((out / "seconds.json").read_text())
    report = grade_digits.grade(out / "data", images, labels) | {
        "train_seconds": seconds["train"],
        "sample_seconds": seconds["sample"],
        "images_per_second": train_steps * TRAIN_FLAGS["batch_size"] / seconds["train"],
        "sampled_images_per_second": len(images) / seconds["sample"],
    }
    grade_digits.draw_samples(out / "samples.png", images, labels)
    grade_digits.draw_loss(out / "loss.png", out / "train" / "progress.jsonl")
    write_json(out / "report.json", report)


def main() -> None:
    config = script_util.parse_flags(DemoConfig, __doc__)
    out = Path(config.out)
    train, data = out / "train", out / "data"
    samples = out / "samples" / f"samples_{config.num_samples}x8x8x3.npz"
    precision = choose_precision(config.precision, dist_util.dev())
    print(f"precision: {precision} (--precision {config.precision})", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    if not (data / "test").exists():
        run_script("datasets/digits.py", data)
    if not (train / f"opt{config.train_steps:06d}.pt").exists():
        flags = TRAIN_FLAGS | {"data_dir": data / "train", "log_dir": train, "lr_anneal_steps": config.train_steps}
        flags |= {"objective": config.objective, "precision": precision}
        run_timed("train", "scripts/image_train.py", flags, out)
    if not samples.exists():
        flags = SAMPLE_FLAGS | {"model_path": train, "log_dir": samples.parent, "num_samples": config.num_samples}
        run_timed("sample", "scripts/image_sample.py", flags | {"precision": precision}, out)
    if not (out / "report.json").exists():
        write_report(out, samples, config.train_steps)
    print((out / "report.json").read_text())
    print(f"look at {out / 'samples.png'} and {out / 'loss.png'}")


if __name__ == "__main__":
    script_util.run(main)
