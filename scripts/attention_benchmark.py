"""Measure attention with a relative position bias alone: forward and backward of both implementations, by length."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmark import device_name, timed
from typing_extensions import Self

from masked_diffusion import script_util
from masked_diffusion.layers.relative_attention import (
    check_implementation,
    look_up_kept,
    relative_attention,
    relative_position_index,
)
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import write_json
from masked_diffusion.utils.options import Config, option
from masked_diffusion.utils.precision import PRECISIONS, check_precision, set_matmul_precision

GRID = (16, 16)  # of an image of 256 pixels
LENGTHS = (128, 144, 160, 176, 256)  # those of the masked pass that `--compile` rounds to, and the full pass
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class AttentionConfig(Config):
    """attention"""

    batch_size: int = option(32 if CUDA else 2, "samples", at_least=1)
    heads: int = option(16, "heads; those of MDTv2_XL_2", at_least=1)
    head_width: int = option(72, "features of a head; those of MDTv2_XL_2", at_least=1)
    lengths: tuple[int, ...] = option(LENGTHS, "numbers of tokens; 256 is the full pass", at_least=1)
    implementations: tuple[str, ...] = option(("sdpa", "triton") if CUDA else ("sdpa",), "sdpa, triton, or both")
    steps: int = option(20, "timed calls", at_least=1)
    device: str = option("cuda" if CUDA else "cpu", "where to run", choices=("cpu", "cuda"))
    precision: str = option("bf16" if CUDA else "fp32", "number format of q, k and v", choices=tuple(PRECISIONS))
    json: str | None = option(None, "file for the table and all settings")

    def check(self) -> Self:
        super().check()
        check_precision(self.precision, torch.device(self.device))
        for implementation in self.implementations:
            check_implementation(implementation, torch.device(self.device))
        if max(self.lengths) > GRID[0] * GRID[1]:
            raise UserError(f"--lengths has {max(self.lengths)}, but the grid has {GRID[0] * GRID[1]} tokens")
        return self


def measured(call: Callable[[], Any], device: str, steps: int) -> float:
    """Milliseconds of the fastest of some calls; on a GPU without what the host needs to start them."""
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(call, rep=max(20, steps), return_mode="min")
    call()
    return 1e3 * min(timed(call, device) for _ in range(steps))


def attention_rows(config: AttentionConfig) -> list[dict[str, Any]]:
    """A row for each length and implementation: times, FLOP/s of the matrix products, and how far results differ."""
    set_matmul_precision(config.precision)
    dtype, rows = PRECISIONS[config.precision] or torch.float32, []
    index = relative_position_index(*GRID).to(config.device)
    for length in config.lengths:
        torch.manual_seed(0)
        shape = (config.batch_size, length, 3, config.heads, config.head_width)
        qkv = torch.randn(shape).to(config.device, dtype).requires_grad_()
        table = torch.randn(int(index.max()) + 4, config.heads).to(config.device).requires_grad_()
        grad = torch.randn(config.batch_size, config.heads, length, config.head_width).to(config.device, dtype)
        ids = torch.rand(config.batch_size, len(index)).argsort(1)[:, :length].sort(1).values.to(config.device)
        positions = look_up_kept(ids, index) if length < len(index) else None
        first = None
        for implementation in config.implementations:

            def forward(implementation=implementation, qkv=qkv, table=table, positions=positions):
                q, k, v = qkv.permute(2, 0, 3, 1, 4)
                return relative_attention(q, k, v, table, positions, GRID, implementation, index)

            def both(forward=forward, qkv=qkv, table=table, grad=grad):
                return torch.autograd.grad(forward(), (qkv, table), grad)

            results = [forward().detach(), *both()]
            first = results if first is None else first
            differences = [((a - b).norm() / b.norm()).item() for a, b in zip(results, first, strict=True)]
            with torch.no_grad():
                forward_ms = measured(forward, config.device, config.steps)
            both_ms = measured(both, config.device, config.steps)
            # Two products forward, and twice as many backward; what a backward pass computes again counts once.
            flop = 3 * 4 * config.batch_size * config.heads * length**2 * config.head_width
            rows.append(
                {
                    "length": length,
                    "implementation": implementation,
                    "forward_ms": forward_ms,
                    "forward_backward_ms": both_ms,
                    "tflops": flop / both_ms / 1e9,
                    "difference": max(differences),
                }
            )
    return rows


def main() -> None:
    config = script_util.parse_flags(AttentionConfig, __doc__)
    rows = attention_rows(config)
    report = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(config.device),
        "torch": torch.__version__,
        "settings": config.values(),
        "rows": rows,
    }
    print(f"{report['device']}, torch {report['torch']}, batch {config.batch_size}, {config.precision}")
    for row in rows:
        print(
            f"{row['length']:4d} tokens  {row['implementation']:6s}  forward {row['forward_ms']:8.3f} ms, "
            f"with backward {row['forward_backward_ms']:8.3f} ms  {row['tflops']:7.2f} TFLOP/s, "
            f"difference {row['difference']:.1e}"
        )
    if config.json:
        write_json(config.json, report)


if __name__ == "__main__":
    script_util.run(main)
