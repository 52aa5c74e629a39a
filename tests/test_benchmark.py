"""The benchmark's numbers agree with each other, and compiled blocks compute what eager ones do."""

import argparse
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import attention_benchmark
import benchmark
import benchmark_steps
import loading_benchmark
import pytest
import step_profile
import torch
from fill import fill, tensor
from helpers import write_images
from PIL import Image

from masked_diffusion import create_diffusion, create_model
from masked_diffusion.training.objective import TwoPassObjective
from masked_diffusion.utils import precision
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.flops import attention_flops, attention_values, forward_flops
from masked_diffusion.utils.precision import autocast

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
NANO = ["--model", "MDTv2_Nano_2", "--input_size", "8", "--batch_size", "4", "--steps", "2", "--device", "cpu"]
NANO += ["--precision", "fp32"]
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
    [
        [],
        ["--optimizer", "adan"],
        ["--mode", "sample"],
        ["--grad_checkpoint", "True"],
        ["--model", "DiT_Nano_2"],
        ["--objective", "flow"],
    ],
)
def test_the_numbers_are_consistent(flags, monkeypatch, tmp_path, capsys):
    report = run(monkeypatch, tmp_path, *flags)
    row, *others = report["rows"]
    assert [other["name"] for other in others] == (["train, no optimizer"] if "--optimizer" in flags else [])
    assert row["images_per_second"] * row["ms"] / 1e3 == pytest.approx(4)
    assert row["tflops"] == pytest.approx(row["gflop_per_image"] * row["images_per_second"] / 1e3)
    assert row["share_of_peak"] == pytest.approx(row["tflops"])
    assert row["ms"] <= row["ms_median"] and row["peak_memory_mib"] > 0
    masked = "--model" not in flags
    options = {"input_size": 8, "learn_sigma": "flow" not in flags} | ({"mask_ratio": 0.3} if masked else {})
    model = create_model("MDTv2_Nano_2" if masked else "DiT_Nano_2", **options)
    passes = forward_flops(model) + (forward_flops(model, 9) if masked else 0)  # 9 = int(16 * (1 - 0.4))
    expected = 2 * forward_flops(model) if "sample" in flags else 3 * passes
    assert row["gflop_per_image"] == pytest.approx(expected / 1e9)
    assert report["settings"]["batch_size"] == 4 and {"date", "device", "torch", "matmul_tflops"} <= report.keys()
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_whole_sampling_counts_all_its_steps(objective, monkeypatch, tmp_path):
    of = ("--objective", objective)
    (row,) = run(monkeypatch, tmp_path, *of, "--mode", "draw", "--num_sampling_steps", "3")["rows"]
    (step,) = run(monkeypatch, tmp_path, *of, "--mode", "sample")["rows"]
    assert row["gflop_per_image"] == pytest.approx(3 * step["gflop_per_image"])
    assert row["seconds_per_image"] * 4 == pytest.approx(row["ms"] / 1e3)
    assert "seconds_per_image" in row and step["seconds_per_image"] is None


def test_auto_takes_bf16_where_it_is_faster(monkeypatch, tmp_path):
    for faster in (True, False):
        monkeypatch.setattr(precision, "computes_bf16", lambda device_type, faster=faster: faster)
        report = run(monkeypatch, tmp_path, "--precision", "auto")
        assert report["settings"]["precision"] == ("bf16" if faster else "fp32")


def test_compare_leaves_out_what_a_cpu_emulates(monkeypatch):
    for has_bf16, device, count in ((True, "cpu", 5), (None, "cpu", 5), (False, "cpu", 3), (False, "cuda", 5)):
        monkeypatch.setattr(benchmark_steps, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert len(benchmark_steps.compared_variants(device)) == count


def test_compare_runs_the_same_step_in_every_variant(monkeypatch, tmp_path):
    # Compiling is tested below, with fewer forms.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    rows = {row["name"]: row for row in run(monkeypatch, tmp_path, "--compare")["rows"]}
    assert rows.keys() == benchmark_steps.compared_variants("cpu").keys()
    assert rows["naive"]["speedup"] == 1
    for row in rows.values():
        assert row["speedup"] == pytest.approx(rows["naive"]["ms"] / row["ms"])
        assert row["loss"] == pytest.approx(rows["naive"]["loss"], rel=1e-5 if "bf16" not in row["name"] else 0.02)


def test_the_written_out_attention_is_the_same_maths():
    args = argparse.Namespace(objective="diffusion", batch_size=2, device="cpu", optimizer=None)
    model = fill(create_model("MDTv2_Nano_2", input_size=8, mask_ratio=0.3))
    step = benchmark_steps.training_step(model, args, "fp32")
    assert step.num_kept == 9
    loss = step()
    gradients = [p.grad for p in model.parameters()]
    with benchmark_steps.naive_attention():
        torch.testing.assert_close(step(), loss, rtol=1e-5, atol=1e-6)
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-3, atol=1e-5)


def test_a_wrong_closed_form_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_steps, "counted_flops", lambda args, num_kept: 1e6)
    with pytest.raises(ValueError, match="PyTorch counts"):
        run(monkeypatch, tmp_path)


PARTS = ["matrix products", "attention", "norms and elementwise", "bias", "optimizer", "host gaps"]


def test_the_profile_adds_up(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "memory_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(step_profile, "REPEATS", 1)
    picture = tmp_path / "profile.png"
    profile = run(monkeypatch, tmp_path, "--optimizer", "adan", "--profile", str(picture))["profile"]
    rows = {row["part"]: row for row in profile["rows"]}
    assert list(rows) == PARTS
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in rows.values())
    model = create_model("MDTv2_Nano_2", input_size=8, mask_ratio=0.3)
    linear, attention = (
        12 * sum(count(model, kept) for kept in (None, 9)) / 1e9  # 4 images, forward and backward, at 1e12 FLOP/s
        for count in (lambda *on: forward_flops(*on) - attention_flops(*on), attention_flops)
    )
    assert rows["matrix products"]["least_ms"] == pytest.approx(linear)
    moved = 12 * sum(attention_values(model, kept) for kept in (None, 9)) * 4 / 1e7  # fp32, at 1e10 bytes/s
    assert rows["attention"]["least_ms"] == pytest.approx(max(attention, moved))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Adan's state: three moments and the last gradient; weights are read and written, gradients are read twice.
    assert rows["optimizer"]["least_ms"] == pytest.approx(4 * trained * (2 * 4 + 4) / 1e7, rel=0.01)
    assert Image.open(picture).size[0] > 500
    out = capsys.readouterr().out
    assert all(part in out for part in PARTS) and "aten::addmm" in out


def test_a_profile_is_of_one_step(monkeypatch, tmp_path):
    for flags in (["--compare"], ["--mode", "draw"]):
        with pytest.raises(UserError, match="--profile is of one step"):
            run(monkeypatch, tmp_path, *flags, "--profile", str(tmp_path / "profile.png"))
    with pytest.raises(UserError, match="extension of a picture"):
        run(monkeypatch, tmp_path, "--profile", str(tmp_path / "profile"))


@pytest.mark.parametrize(
    "part, names",
    {
        "matrix products": [
            "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "sm90_xmma_gemm_bf16bf16_bf16f32", "aten::addmm",
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "aten::mm", "mkldnn::_linear_pointwise",
            "aten::mkldnn_convolution", "ampere_bf16_s16816gemm_bf16_128x128", "void cublasLt::splitKreduce_kernel",
        ],
        "attention": [
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "void pytorch_flash::flash_fwd_kernel",
            "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::softmax", "attention_keys_kernel",
            "masked_diffusion::relative_attention_backward", "attention_forward_kernel", "aten::bmm", "aten::baddbmm",
        ],
        "bias": [
            "aten::embedding_dense_backward", "aten::index", "triton_poi_fused__to_copy_embedding_3",
            "void at::native::vectorized_gather_kernel", "masked_diffusion::table_gradient", "fold_pairs_kernel",
        ],
        "norms and elementwise": [
            "triton_per_fused_addmm_native_layer_norm_7", "graph_0_cpp_fused_addmm_gelu_mul_3", "aten::mul",
            "aten::sum", "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "Memcpy DtoD",
        ],
    }.items(),
)  # fmt: skip
def test_kernels_belong_to_parts(part, names):
    assert {name: step_profile.part_of(name) for name in names} == dict.fromkeys(names, part)


def test_kernels_are_read_from_the_trace():
    class Profiler:
        def export_chrome_trace(self, path):
            events = [
                {"cat": "kernel", "name": "gemm", "dur": 2000.0},
                {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "dur": 9000.0},
                {"cat": "gpu_memset", "name": "Memset", "dur": 1.0},
                {"cat": "cpu_op", "name": "aten::mm", "dur": 5.0},
                {"ph": "M", "name": "process_name"},
            ]
            Path(path).write_text(json.dumps({"traceEvents": events}))

    assert list(step_profile.kernels(Profiler())) == [("gemm", 2e-3), ("Memset", 1e-6)]


@needs_compiler
def test_compiled_blocks_compute_the_same_loss_in_few_forms():
    # Version 1 has one kind of block and one number of kept tokens, so less to compile; the next test counts others.
    options = {"input_size": 16, "in_channels": 3, "num_classes": 10, "mask_ratio": 0.3, "depth": 2, "decode_layer": 1}
    torch._dynamo.reset()
    eager, compiled = (fill(create_model("MDT_Nano_2", **options)).train() for _ in range(2))
    compiled.compile_blocks()
    x, t, y = tensor("pixels", (2, 3, 16, 16)), torch.tensor([30, 700]), torch.tensor([1, 2])
    modules = [TwoPassObjective(model, create_diffusion(), kept_multiple=16) for model in (eager, compiled)]
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        draws = modules[0].draw(x)
        assert draws["ids_keep"].shape[1] == 48
        ours, theirs = (module(x, t, y, **draws)["loss"].mean() for module in modules)
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    theirs.backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)
    # One form for the kept tokens, and one for all.
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


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
