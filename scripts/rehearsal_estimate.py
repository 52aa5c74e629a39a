"""What the real thing takes, from a stated speed, and the report of a rehearsal in words."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from masked_diffusion.utils.errors import UserError

PUBLISHED_SAMPLES = 50_000
NAMES = {"model_path": "the checkpoint", "vae": "the autoencoder", "inception": "the Inception network"}


class Rates(NamedTuple):
    """Images per second of one GPU.

    :param guided: guided sampling with all steps. :param decode: the autoencoder's decoder; None: not known.
    :param source: where the figures come from.
    """

    guided: float
    decode: float | None
    source: str


def read_rates(images_per_second: float | None, benchmarks: str | None, model: str) -> Rates | None:
    """The stated speed; None where none is stated.

    :param benchmarks: a report of scripts/measure_gpu.py; of its rows for this model the fastest counts.
    :param model: such as `MDTv2_XL_2`.
    :raises UserError: for a file that is no such report, or holds no sampling of this model.
    """
    if images_per_second:
        return Rates(images_per_second, None, "--images_per_second")
    if not benchmarks:
        return None
    size = re.sub(r"^.*?_([A-Z]+)_(\d+)$", r"\1/\2", model)
    try:
        report = json.loads(Path(benchmarks).read_text())
        rows = {name: row.get("rows", []) for name, row in report["rows"].items()}
        drawn = [
            line["images_per_second"] for name in rows if name.startswith(f"sample {size} ") for line in rows[name]
        ]
        decoded = [line["images_per_second"] for line in rows.get("vae", []) if line["name"] == "decode fp32"]
        device = f"{report['device']}, {report['date']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--benchmarks: {benchmarks} is no report of scripts/measure_gpu.py ({error!r})") from error
    if not drawn:
        raise UserError(f"--benchmarks: {benchmarks} holds no sampling of {size}: run `make gpu`, or give another")
    return Rates(max(drawn), decoded[0] if decoded else None, f"{Path(benchmarks).name}: {device}")


def estimate(rates: Rates) -> dict[str, Any]:
    """GPU hours of two rounds of 50,000 images.

    Without guidance the network runs on half as many rows.
    """
    hours = {"guided": PUBLISHED_SAMPLES / rates.guided / 3600, "unguided": PUBLISHED_SAMPLES / rates.guided / 2 / 3600}
    if rates.decode:
        hours["decoding"] = 2 * PUBLISHED_SAMPLES / rates.decode / 3600
    return {"gpu_hours": hours, "total": sum(hours.values()), "rates": rates._asdict()}


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table of the stages, what was random, and the estimate."""
    settings = report["settings"]
    title = f"{settings['model']}, {settings['num_samples']} images a round, {settings['num_sampling_steps']} steps"
    lines = [f"# Rehearsal: {title}", "", f"{report['device']}, {report['seconds']:.0f} s in all.", ""]
    lines += ["| stage | seconds | peak memory (GiB) |", "|---|---|---|"]
    lines += [f"| {row['stage']} | {row['seconds']:.1f} | {row['peak_memory_gib']:.2f} |" for row in report["stages"]]
    lines += ["", f"Peak memory, of all processes together: {report['peak_memory_gib']:.2f} GiB.", ""]
    if report["random"]:
        names = [NAMES[name] for name in report["random"]]
        lines += [f"Of random numbers: {', '.join(names)}. These metrics mean nothing:", ""]
    lines += [report["table"]]
    if report["estimate"] is None:
        return "\n".join([*lines, "GPU hours are not estimated: no speed was stated.", ""])
    found, rates = report["estimate"], report["estimate"]["rates"]
    parts = ", ".join(f"{name} {hours:.1f}" for name, hours in found["gpu_hours"].items())
    lines += [
        f"GPU hours of 2 x {PUBLISHED_SAMPLES:,} images: {found['total']:.1f} ({parts}), at {rates['guided']:.3g}"
    ]
    lines[-1] += f" guided images/s ({rates['source']}); without guidance twice as fast."
    missing = "Evaluation is not in it: its" if rates["decode"] else "Decoding and evaluation are not in it: their"
    lines += [f"{missing} speed was not stated."]
    return "\n".join([*lines, ""])
