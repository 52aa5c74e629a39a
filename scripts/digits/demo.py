"""From nothing to handwritten digits on request: write the data, train a small masked MDTv2, sample, grade.

A step whose result is there is not done again, and an interrupted training goes on.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "evaluations"))

import grade_digits  # noqa: E402 (evaluations/ is no package: it stands alone)

TRAIN_FLAGS = {
    "model": "MDTv2_Nano_2",
    "image_size": 8,
    "vae": "identity",
    "mask_ratio": 0.3,
    "random_flip": False,
    "batch_size": 32,
    "lr": 5e-3,
    "ema_rate": 0.995,
    "log_interval": 50,
    "num_workers": 0,
}
SAMPLE_FLAGS = {
    "num_sampling_steps": 50,
    "cfg_cond": True,
    "cfg_scale": 1.5,
    "scale_pow": 1.0,
    "class_rule": "balanced",
    "batch_size": 250,
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="output_demo", help="folder for everything that is made")
    parser.add_argument("--train_steps", type=int, default=3000, help="training steps")
    parser.add_argument("--num_samples", type=int, default=1000, help="images to draw and grade")
    return parser.parse_args()


def run_timed(name, script, flags, out):
    """Run a script of this project, and add its seconds to `seconds.json`."""
    command = [sys.executable, str(REPO / script)] + [f"--{key}={value}" for key, value in flags.items()]
    print(" ".join(command), flush=True)
    record, start = out / "seconds.json", time.perf_counter()
    try:
        subprocess.run(command, check=True)
    finally:
        seconds = json.loads(record.read_text()) if record.exists() else {}
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        record.write_text(json.dumps(seconds))


def write_report(out, samples, args):
    images, labels = grade_digits.read_samples(samples)
    seconds = json.loads((out / "seconds.json").read_text())
    report = grade_digits.grade(out / "data", images, labels) | {
        "train_seconds": seconds["train"],
        "sample_seconds": seconds["sample"],
        "images_per_second": args.train_steps * TRAIN_FLAGS["batch_size"] / seconds["train"],
        "sampled_images_per_second": len(images) / seconds["sample"],
    }
    grade_digits.draw_samples(out / "samples.png", images, labels)
    grade_digits.draw_loss(out / "loss.png", out / "train" / "progress.jsonl")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def main():
    args = parse_args()
    out = Path(args.out)
    train, data = out / "train", out / "data"
    samples = out / "samples" / f"samples_{args.num_samples}x8x8x3.npz"
    out.mkdir(parents=True, exist_ok=True)
    if not (data / "test").exists():
        subprocess.run([sys.executable, str(REPO / "datasets" / "digits.py"), str(data)], check=True)
    if not (train / f"opt{args.train_steps:06d}.pt").exists():
        flags = TRAIN_FLAGS | {"data_dir": data / "train", "log_dir": train, "lr_anneal_steps": args.train_steps}
        run_timed("train", "scripts/image_train.py", flags, out)
    if not samples.exists():
        flags = SAMPLE_FLAGS | {"model_path": train, "log_dir": samples.parent, "num_samples": args.num_samples}
        run_timed("sample", "scripts/image_sample.py", flags, out)
    if not (out / "report.json").exists():
        write_report(out, samples, args)
    print((out / "report.json").read_text())
    print(f"look at {out / 'samples.png'} and {out / 'loss.png'}")


if __name__ == "__main__":
    main()
