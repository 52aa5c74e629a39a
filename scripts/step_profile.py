"""Where the time of a step goes, part by part, and the least that each part could take: as a table and as a picture.

On a GPU the times are those of its kernels, on a CPU those that operations and compiled loops take themselves.
The least is the roofline's (Williams et al. 2009): FLOP at the measured peak, or bytes at the measured bandwidth.
"""

import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.profiler import ProfilerActivity

from masked_diffusion.models import DiT
from masked_diffusion.utils.flops import attention_flops, attention_values, elementwise_values, forward_flops
from masked_diffusion.utils.pictures import save_picture

if TYPE_CHECKING:
    from benchmark_steps import Step

MATMUL, ATTENTION, ELEMENTWISE, BIAS = "matrix products", "attention", "norms and elementwise", "bias"
OPTIMIZER, GAPS = "optimizer", "host gaps"
PARTS = (MATMUL, ATTENTION, ELEMENTWISE, BIAS, OPTIMIZER, GAPS)
# The first that is found in the name of a kernel or an operation decides. Compiled loops carry the names of all the
# operations that were fused into them: a product that stands there is only the loop behind it. Batched products are
# those of an attention that PyTorch writes out, as on a CPU with a bias that needs a gradient.
FUSED = r"cpp_fused|triton_(poi|red|per)_"
ATTENTION_WORDS = r"attention|flash|fmha|mem_eff|sdpa|softmax|aten::(badd)?bmm"
BIAS_WORDS = r"embedding|index|gather|scatter|table_gradient|pairbias|^(sum_samples|fold_pairs)_kernel"
HOST_WORDS = r"^## call|^torchdynamo|^torch-compiled"
MATMUL_WORDS = r"gemm|nvjet|cutlass|cublas|xmma|splitk|mkldnn|triton_(tem|mm)|convolution|\b(add)?mm\b|linear"
WORDS = {GAPS: HOST_WORDS, ATTENTION: ATTENTION_WORDS, BIAS: BIAS_WORDS, MATMUL: MATMUL_WORDS}
REPEATS = 3
SLOWEST = 12  # kernels or operations that are listed by name


@dataclass(frozen=True)
class Machine:
    """What a device can do at best: FLOP/s of matrix products, and bytes/s to and from its memory."""

    flops: float
    bandwidth: float


@dataclass
class Profile:
    """Seconds of one step, by part and by name of the kernel or operation."""

    parts: Counter = field(default_factory=Counter)
    names: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # part: name: seconds

    def add(self, part: str, name: str, seconds: float) -> None:
        self.parts[part] += seconds
        self.names[part][name] += seconds

    @property
    def slowest(self) -> list[dict[str, Any]]:
        """The kernels or operations that take longest, whatever their part."""
        rows = [(seconds, part, name) for part, names in self.names.items() for name, seconds in names.items()]
        return [{"name": name, "part": part, "ms": s * 1e3} for s, part, name in sorted(rows, reverse=True)[:SLOWEST]]


def part_of(name: str) -> str:
    """The part of the step that a kernel or an operation belongs to, by its name; all but the optimizer's."""
    name = name.lower()
    fused = re.search(FUSED, name)
    for part, words in WORDS.items():
        if re.search(words, name) and not (fused and part == MATMUL):
            return part
    return ELEMENTWISE


def name_compiled_loops() -> None:
    """Let compiled loops of the CPU be seen by the profiler. To be called before anything is compiled."""
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True


# ---------------------------------------------------------------- the measured side


def profile_step(step: "Step", device: str) -> Profile:
    """Profile a step that has been run before: its computation, then the optimizer's part by itself."""
    found = Profile()
    for call, part in ((step.compute, None), (step.update, OPTIMIZER)):
        if call is None:
            continue
        wall, busy = 0.0, 0.0
        for _ in range(REPEATS):
            seconds, rows = profiled(call, device)
            wall += seconds
            for name, used in rows:
                busy += used
                found.add(part or part_of(name), name, used / REPEATS)
        found.parts[GAPS] += max(0.0, wall - busy) / REPEATS
    return found


def profiled(call: Callable[[], Any], device: str) -> tuple[float, list[tuple[str, float]]]:
    """Seconds of a call under the profiler; names and seconds of its kernels (GPU) or operations (CPU)."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    if device == "cuda":
        return seconds, list(kernels(profiler))
    return seconds, [(row.key, row.self_cpu_time_total / 1e6) for row in profiler.key_averages()]


def kernels(profiler: torch.profiler.profile) -> Iterator[tuple[str, float]]:
    """Name and seconds of everything that ran on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            yield event["name"], event["dur"] / 1e6


# ---------------------------------------------------------------- the least that it could take


def least_seconds(
    model: DiT, step: "Step", forward_passes: int, bytes_per_value: int, machine: Machine
) -> dict[str, float]:
    """The roofline of each part of a step.

    Attention takes the longer of its FLOP and its bytes. The optimizer reads and writes each weight and each tensor of
    its state once, and reads gradients twice, first for their norm. Bias and gaps need no time of their own: attention
    can look the bias up.

    :param forward_passes: of one image, that have the FLOP of the step's computation.
    :param bytes_per_value: of the numbers between the matrix products.
    """
    kept = (None,) if step.num_kept is None else (None, step.num_kept)
    flops, attention, attended, elementwise = (
        forward_passes * sum(count(model, each) for each in kept)
        for count in (forward_flops, attention_flops, attention_values, elementwise_values)
    )
    least = {
        MATMUL: (flops - attention) / machine.flops,
        ATTENTION: max(attention / machine.flops, attended * bytes_per_value / machine.bandwidth),
        ELEMENTWISE: elementwise * bytes_per_value / machine.bandwidth,
        BIAS: 0.0,
        GAPS: 0.0,
    }
    if step.optimizer is not None:
        weights = sum(p.numel() * p.element_size() for group in step.optimizer.param_groups for p in group["params"])
        tensors = [v for state in step.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        state = sum(v.numel() * v.element_size() for v in tensors)
        least[OPTIMIZER] = (4 * weights + 2 * state) / machine.bandwidth
    return least


# ---------------------------------------------------------------- showing both


def make_rows(found: Profile, least: dict[str, float]) -> list[dict[str, Any]]:
    """For each part of the step: `part`, `ms`, `share` of the step, and `least_ms`."""
    total = sum(found.parts.values())
    return [
        {
            "part": part,
            "ms": found.parts[part] * 1e3,
            "share": found.parts[part] / total,
            "least_ms": least.get(part, 0.0) * 1e3,
        }
        for part in PARTS
        if found.parts[part] or least.get(part)
    ]


def format_profile(profile: dict[str, Any]) -> str:
    """The parts of the step as a table, and the kernels or operations that take longest."""
    lines = [f"{'part':<22}{'ms':>10}{'share':>8}{'least ms':>10}"]
    for row in profile["rows"]:
        lines.append(f"{row['part']:<22}{row['ms']:>10.2f}{row['share']:>8.1%}{row['least_ms']:>10.2f}")
    total = sum(row["ms"] for row in profile["rows"])
    lines.append(f"{'all, under the profiler':<22}{total:>9.2f}; without it {profile['step_ms']:.2f} ms")
    lines.append(f"memory: {profile['bandwidth_gb_per_second']:.1f} GB/s; the slowest by name:")
    lines += [f"{row['ms']:>10.2f}  {row['part']}: {row['name'][:90]}" for row in profile["slowest"]]
    return "\n".join(lines)


def draw_profile(path: str | Path, profile: dict[str, Any], title: str) -> None:
    """The parts of the step as bars; a line across each stands at the least that it could take."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    left, width, height, top = 230, 560, 46, 64
    rows = profile["rows"]
    scale = width / max(max(row["ms"], row["least_ms"]) for row in rows)
    picture = Image.new("RGB", (left + width + 210, top + height * len(rows) + 44), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((16, 12), f"{profile['step_ms']:.1f} ms per step", "black", font)
    draw.text((16, 36), title, "#555555", small)
    for i, row in enumerate(rows):
        y = top + height * i
        draw.text((left - 12, y + 16), row["part"], "black", font, anchor="rm")
        draw.rectangle((left, y, left + row["ms"] * scale, y + 32), fill="#4878a8")
        least = left + row["least_ms"] * scale
        draw.line((least, y - 4, least, y + 36), fill="#d03020", width=3)
        end = left + max(row["ms"], row["least_ms"]) * scale + 10
        draw.text((end, y + 16), f"{row['ms']:.1f} ms  {row['share']:.0%}", "black", font, anchor="lm")
    note = "red line: the least that the measured matmul peak and memory bandwidth allow"
    draw.text((left, top + height * len(rows) + 12), note, "#d03020", small)
    save_picture(path, np.asarray(picture))
