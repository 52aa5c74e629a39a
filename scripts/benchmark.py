"""Measure how fast a model trains or samples here: images/s, FLOP, share of the device's matmul peak, peak memory.

`--profile OUT.png` also shows where the time of a step goes.
"""

import copy
import datetime
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import step_profile
import torch
from benchmark_steps import (
    STEPS,
    VARIANTS,
    WARMUP_STEPS,
    BenchmarkConfig,
    build_model,
    compared_variants,
    flops_per_image,
    forward_passes,
    naive_attention,
)
from typing_extensions import Self

from masked_diffusion import script_util
from masked_diffusion.models import DiT
from masked_diffusion.sampling.cuda_graphs import GraphedForward
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.precision import PRECISIONS, set_matmul_precision

COLUMNS = {
    "name": "{}",
    "ms": "{:.1f}",
    "ms_median": "{:.1f}",
    "images_per_second": "{:.2f}",
    "seconds_per_image": "{:.3f}",
    "gflop_per_image": "{:.1f}",
    "tflops": "{:.3f}",
    "share_of_peak": "{:.1%}",
    "peak_memory_mib": "{:.0f}",
    "loss": "{:.5f}",
    "speedup": "{:.2f}",
}


# ---------------------------------------------------------------- measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, to the end of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def matmul_peak(device: str, precision: str) -> float:
    """FLOP/s of the fastest of ten large square matrix products in `precision`.

    The matrices grow until one product takes 50 ms: without instructions for bf16 one of the largest size
    would take a minute.
    """
    set_matmul_precision(precision)
    for size in (8192,) if device == "cuda" else (256, 512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, dtype=PRECISIONS[precision] or torch.float32) for _ in range(2))
        product = partial(torch.matmul, a, b)
        if timed(product, device) > 0.05:
            break
    return 2 * size**3 / min(timed(product, device) for _ in range(10))


def memory_bandwidth(device: str) -> float:
    """Bytes/s that the fastest of ten copies of a large tensor reads and writes."""
    size = 2**30 if device == "cuda" else 2**27
    a, b = (torch.zeros(size // 4, device=device) for _ in range(2))
    return 2 * size / min(timed(lambda: b.copy_(a), device) for _ in range(10))


def peak_memory(config: BenchmarkConfig) -> float | None:
    """MiB: of the allocator on a GPU; on a CPU the process's largest resident size so far, Python included.

    None under `--compare`, where the models of all variants are in memory.
    """
    if config.compare:
        return None
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Variant:
    """One way to run the step.

    :param model: taken over; a compiled variant compiles its blocks.
    """

    def __init__(
        self,
        config: BenchmarkConfig,
        name: str,
        model: DiT,
        precision: str,
        compiled: bool = False,
        naive: bool = False,
    ):
        self.config, self.name, self.model, self.precision = config, name, model, precision
        self.naive, self.seconds, self.memory = naive, [], None
        if compiled:
            model.compile_blocks()
            if config.mode != "train":  # as `load_weights` does
                model.forward = GraphedForward(model)
        with naive_attention() if naive else nullcontext():
            self.step = STEPS[config.mode](model, config, precision)

    def _step(self) -> None:
        self.loss = self.step()

    def without_update(self) -> Self:
        """The same step without the optimizer's part."""
        other = copy.copy(self)
        other.name, other.seconds = f"{self.name}, no optimizer", []
        other.step = replace(self.step, update=None)
        return other

    def run(self, record: bool = True) -> None:
        """One step in this variant's settings."""
        set_matmul_precision(self.precision)
        if self.config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with naive_attention() if self.naive else nullcontext():
            seconds = timed(self._step, self.config.device)
        if record:
            self.seconds.append(seconds)
        self.memory = peak_memory(self.config)

    def row(self, peak: float) -> dict[str, Any]:
        # The fastest step is the program's own: whatever else runs on the machine can only make a step slower.
        seconds, flops = min(self.seconds), flops_per_image(self.config, self.model, self.step.num_kept)
        return {
            "name": self.name,
            "ms": seconds * 1e3,
            "ms_median": statistics.median(self.seconds) * 1e3,
            "images_per_second": self.config.batch_size / seconds,
            "seconds_per_image": seconds / self.config.batch_size if self.config.mode == "draw" else None,
            "gflop_per_image": flops / 1e9,
            "tflops": flops * self.config.batch_size / seconds / 1e12,
            "share_of_peak": flops * self.config.batch_size / seconds / peak,
            "peak_memory_mib": self.memory,
            "loss": self.loss.item(),
        }


def make_variants(config: BenchmarkConfig) -> list[Variant]:
    model = build_model(config)
    if not config.compare:
        variant = Variant(config, config.mode, model, config.precision, config.compile, config.naive)
        return [variant, variant.without_update()] if variant.step.update else [variant]
    variants = compared_variants(config.device)
    if len(variants) < len(VARIANTS):
        print("bf16 is left out: this CPU has no instructions for it")
    return [Variant(config, name, copy.deepcopy(model), *how) for name, how in variants.items()]


def measure(config: BenchmarkConfig, variants: list[Variant]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each variant; their steps take turns, so that what else the machine does hits all alike."""
    for variant in variants:
        for _ in range(0 if config.mode == "draw" else WARMUP_STEPS):
            variant.run(record=False)
    for _ in range(config.steps):
        for variant in variants:
            variant.run()
    peaks = {precision: matmul_peak(config.device, precision) for precision in {v.precision for v in variants}}
    rows = [variant.row(peaks[variant.precision]) for variant in variants]
    if config.compare:
        rows = [row | {"speedup": rows[0]["ms"] / row["ms"]} for row in rows]
    return rows, {precision: peak / 1e12 for precision, peak in peaks.items()}


def profile(config: BenchmarkConfig, variant: Variant) -> dict[str, Any]:
    """Where the time of a measured variant's step goes, and the least that each part could take; see `step_profile`.

    :return: `rows`, see `step_profile.make_rows`; `step_ms` without the profiler; `bandwidth_gb`.
    """
    set_matmul_precision(variant.precision)
    bandwidth = memory_bandwidth(config.device)
    machine = step_profile.Machine(matmul_peak(config.device, variant.precision), bandwidth)
    half = PRECISIONS[variant.precision] is not None
    passes = forward_passes(config) * config.batch_size
    least = step_profile.least_seconds(variant.model, variant.step, passes, 2 if half else 4, machine)
    found = step_profile.profile_step(variant.step, config.device)
    return {
        "step_ms": min(variant.seconds) * 1e3,
        "bandwidth_gb_per_second": bandwidth / 1e9,
        "rows": step_profile.make_rows(found, least),
        "slowest": found.slowest,
    }


# ---------------------------------------------------------------- reporting


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def format_table(rows: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """Aligned text with one line per row and the columns that some row has.

    :param columns: how the values of each are formatted.
    """
    columns = {key: form for key, form in columns.items() if any(row.get(key) is not None for row in rows)}
    cells = [list(columns)] + [[form.format(row[key]) for key, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> None:
    config = script_util.parse_flags(BenchmarkConfig, __doc__).resolved()
    torch.set_num_threads(config.threads)
    if config.profile:
        step_profile.name_compiled_loops()
    variants = make_variants(config)
    rows, peaks = measure(config, variants)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(config.device),
        "torch": torch.__version__,
        "settings": config.values(),
        "matmul_tflops": peaks,
        "rows": rows,
    }
    title = f"{config.model}, {config.mode}, batch {config.batch_size}, {report['device']}, {config.threads} threads"
    title += "" if config.compare else f", {config.precision}"
    print(title)
    print(f"torch {report['torch']}; matmul peak in TFLOP/s: {', '.join(f'{k} {v:.3f}' for k, v in peaks.items())}")
    print(format_table(rows))
    if config.profile:
        report["profile"] = profile(config, variants[0])
        print(step_profile.format_profile(report["profile"]))
        step_profile.draw_profile(config.profile, report["profile"], title)
    if config.json:
        write_json(config.json, report)


if __name__ == "__main__":
    script_util.run(main)
