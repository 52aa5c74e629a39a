"""The benchmark's numbers agree with each other, and compiled blocks compute what eager ones do."""

import argparse
import json
import shutil
import sys
from unittest import mock

import attention_benchmark
import benchmark
import loading_benchmark
import pytest
import torch
from fill import fill, tensor
from helpers import write_images

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.models import MDT
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.utils.flops import forward_flops
from masked_diffusion.utils.precision import autocast

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
NANO = ["--model", "MDTv2_Nano_2", "--input_size", "8", "--batch_size", "4", "--steps", "2", "--device", "cpu"]
KEYS = ("name", "ms", "images_per_second", "gflop_per_image", "tflops", "share_of_peak")


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch):
    """A peak that takes no time to measure, and threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "matmul_peak", lambda device, precision: 1e12)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, tmp_path, *flags):
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *NANO, "--json", str(path), *flags])
    benchmark.main()
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "flags",
    [[], ["--optimizer", "adan"], ["--mode", "sample"], ["--grad_checkpoint", "True"], ["--model", "DiT_Nano_2"]],
)
def test_the_numbers_are_consistent(flags, monkeypatch, tmp_path, capsys):
    report = run(monkeypatch, tmp_path, *flags)
    (row,) = report["rows"]
    assert row["images_per_second"] * row["ms"] / 1e3 == pytest.approx(4)
    assert row["tflops"] == pytest.approx(row["gflop_per_image"] * row["images_per_second"] / 1e3)
    assert row["share_of_peak"] == pytest.approx(row["tflops"])
    assert row["ms"] <= row["ms_median"] and row["peak_memory_mib"] > 0
    masked = "--model" not in flags
    model = create_model(
        "MDTv2_Nano_2" if masked else "DiT_Nano_2", input_size=8, **{"mask_ratio": 0.3} if masked else {}
    )
    passes = forward_flops(model) + (forward_flops(model, 9) if masked else 0)  # 9 = int(16 * (1 - 0.4))
    expected = 2 * forward_flops(model) if "sample" in flags else 3 * passes
    assert row["gflop_per_image"] == pytest.approx(expected / 1e9)
    assert report["settings"]["batch_size"] == 4 and {"date", "device", "torch", "matmul_tflops"} <= report.keys()
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)


def test_compare_runs_the_same_step_in_every_variant(monkeypatch, tmp_path):
    # Compiling is tested below, with fewer forms.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    rows = {row["name"]: row for row in run(monkeypatch, tmp_path, "--compare")["rows"]}
    assert rows.keys() == benchmark.VARIANTS.keys()
    assert rows["naive"]["speedup"] == 1
    for row in rows.values():
        assert row["speedup"] == pytest.approx(rows["naive"]["ms"] / row["ms"])
        assert row["loss"] == pytest.approx(rows["naive"]["loss"], rel=1e-5 if "bf16" not in row["name"] else 0.02)


def test_the_written_out_attention_is_the_same_maths():
    args = argparse.Namespace(batch_size=2, device="cpu", optimizer=None)
    model = fill(create_model("MDTv2_Nano_2", input_size=8, mask_ratio=0.3))
    step, num_kept = benchmark.training_step(model, args, "fp32")
    assert num_kept == 9
    loss = step()
    gradients = [p.grad for p in model.parameters()]
    with benchmark.naive_attention():
        torch.testing.assert_close(step(), loss, rtol=1e-5, atol=1e-6)
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_wrong_closed_form_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "counted_flops", lambda args, num_kept: 1e6)
    with pytest.raises(ValueError, match="PyTorch counts"):
        run(monkeypatch, tmp_path)


@needs_compiler
def test_compiled_blocks_compute_the_same_loss_in_few_forms(monkeypatch):
    # Version 1 has one kind of block, so less to compile; version 2 draws its lengths from a range.
    monkeypatch.setattr(MDT, "mask_ratio_spread", 0.2)
    options = {"input_size": 16, "in_channels": 3, "num_classes": 10, "mask_ratio": 0.3, "depth": 2, "decode_layer": 1}
    torch._dynamo.reset()
    eager, compiled = (fill(create_model("MDT_Nano_2", **options)).train() for _ in range(2))
    compiled.compile_blocks()
    x, t, y = tensor("pixels", (2, 3, 16, 16)), torch.tensor([30, 700]), torch.tensor([1, 2])
    modules = [TwoPassObjective(model, create_diffusion(), kept_multiple=16) for model in (eager, compiled)]
    torch._dynamo.utils.counters.clear()
    lengths = set()
    for share in torch.linspace(0, 1, 12):
        draws = modules[0].draw(x, host_rand=lambda n, share=share: share.expand(n))
        lengths.add(draws["ids_keep"].shape[1])
        ours, theirs = (module(x, t, y, **draws)["loss"].mean() for module in modules)
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    theirs.backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)
    assert lengths == {32, 48}
    # One form for each kept length, and one for the full one.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + len(lengths)


@pytest.mark.parametrize("exact", [False, True])
def test_version_2_is_compiled_in_few_forms(exact, monkeypatch):
    # The forms are counted without a compiler: `eager` runs what would be compiled.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="eager", **options)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"input_size": 16, "in_channels": 3, "num_classes": 10, "mask_ratio": 0.3, "depth": 6}
    model = fill(create_model("MDTv2_Nano_2", **options)).train()
    model.compile_blocks(dynamic=exact)
    objective = TwoPassObjective(model, create_diffusion(), kept_multiple=1 if exact else 8)
    x, t, y = tensor("pixels", (2, 3, 16, 16)), torch.tensor([30, 700]), torch.tensor([1, 2])
    lengths = set()
    for share in torch.linspace(0, 1, 8):
        draws = objective.draw(x, host_rand=lambda n, share=share: share.expand(n))
        lengths.add(draws["ids_keep"].shape[1])
        objective(x, t, y, **draws)["loss"].mean().backward()
    assert len(lengths) == (8 if exact else 3)
    # Blocks with and without a long skip; for the full length, and for each kept length or for any.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * (1 + (2 if exact else len(lengths)))


@needs_compiler
def test_compiled_blocks_compute_the_same_in_bf16():
    torch._dynamo.reset()
    eager, compiled = (fill(create_model("DiT_Nano_2", input_size=32, depth=1)).eval() for _ in range(2))
    compiled.compile_blocks()
    x, t, y = tensor("x", (2, 4, 32, 32)), torch.tensor([30, 700]), torch.tensor([1, 2])
    with torch.no_grad():
        ours, theirs = (autocast(model, "bf16")(x, t, y) for model in (eager, compiled))
    torch.testing.assert_close(theirs, ours, rtol=0.02, atol=0.02 * ours.abs().max().item())


def test_loading_is_measured_from_everything_that_is_loaded(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", [f"a_{i}.jpg" for i in range(5)], size=(40, 40))
    monkeypatch.setattr(loading_benchmark, "MANY_SHARDS", 64)
    flags = ["--data_dir", str(tmp_path / "images"), "--image_size", "16", "--batch_size", "2", "--batches", "2"]
    flags += ["--rounds", "2", "--json", str(tmp_path / "out.json"), "--scratch", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["loading_benchmark.py", *flags])
    loading_benchmark.main()
    report = json.loads((tmp_path / "out.json").read_text())
    names = [row["name"] for row in report["rows"]]
    assert names[:4] == ["folder", "folder, --fast_decode", "packed shards", "decoding alone"]
    assert names[4:] == ["latents, 1 shards", "latents, 64 shards", "latents, 64 shards, not in memory"]
    for row in report["rows"]:
        speed = row["images_per_core_second"]
        assert speed > 0 and row["ms_per_image"] == pytest.approx(1000 / speed)
        assert row["cores for 8 x S/2"] == pytest.approx(8 * 1572 / speed)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out.json"}, "the scratch folder is empty again"


def test_attention_alone_is_measured_for_both_implementations():
    pytest.importorskip("triton")
    config = attention_benchmark.AttentionConfig(
        batch_size=1, heads=1, head_width=16, lengths=(9, 16), implementations=("sdpa", "triton"), steps=1
    ).check()
    with mock.patch.object(attention_benchmark, "GRID", (4, 4)):
        rows = attention_benchmark.attention_rows(config)
    assert [(row["length"], row["implementation"]) for row in rows] == [
        (9, "sdpa"), (9, "triton"), (16, "sdpa"), (16, "triton")
    ]  # fmt: skip
    assert all(row["difference"] < 1e-5 and row["forward_backward_ms"] > 0 for row in rows)
    with pytest.raises(ValueError, match="--lengths has 300, but the grid has 256 tokens"):
        config.replaced(lengths=(300,)).check()
