"""The screen before training: bad images, classes, masking, memory; and the check of the number format."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import break_image, write_images
from PIL import ExifTags, Image, ImageFile

from masked_diffusion import create_model
from masked_diffusion.config import RunConfig
from masked_diffusion.training import preflight
from masked_diffusion.training.resume import resolve
from masked_diffusion.utils import precision
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.precision import check_precision, choose_precision, set_matmul_precision


def test_bad_images_are_listed_with_their_reason(tmp_path):
    paths = write_images(tmp_path, ["a_0.png", "a_1.png", "b_2.png"], size=(16, 16))
    (tmp_path / "a_1.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((3, 90, 3), dtype=np.uint8)).save(tmp_path / "b_2.png")
    bad, rotated, tiny = preflight.inspect_images(paths, 16)
    assert rotated.tolist() == [] and tiny.tolist() == [2]
    assert list(bad) == [1] and "cannot be read: " in bad[1]
    assert preflight.check_images(paths, 16, "skip") == [paths[0], paths[2]]
    with pytest.raises(ValueError, match=r"1 images cannot be used, the first: .*a_1\.png.*--on_bad_image skip"):
        preflight.check_images(paths, 16, "error")


def test_classes_that_cannot_be_meant():
    with pytest.raises(ValueError, match=r"all images of data are of one class, 'img'"):
        preflight.check_classes("data", ["img"], 1)
    with pytest.raises(ValueError, match=r"data has 3 classes \(a, b, c, \.\.\.\), more than --num_classes 2"):
        preflight.check_classes("data", ["a", "b", "c"], 2)
    preflight.check_classes("data", ["a", "b"], 1000)


def test_few_classes_are_counted_and_many_make_a_histogram():
    few = preflight.describe_classes(np.array([0] * 40 + [1] * 10), ["cat", "dog"])
    assert [line.split()[:2] for line in few] == [["cat", "40"], ["dog", "10"]]
    assert few[0].count("#") == 4 * few[1].count("#") == 40
    labels = np.repeat(np.arange(100), np.arange(1, 101))
    many = preflight.describe_classes(labels, [str(i) for i in range(100)])
    assert len(many) == 10 and sum(int(line.split(":")[1].split()[0]) for line in many) == 100


def test_memory_is_that_of_the_tensors():
    model = create_model("MDTv2_Nano_2", input_size=8)
    num = sum(p.numel() for p in model.parameters())
    assert preflight.memory_estimate(num, 2, "adan", 1, "none") == 4 * num * 8
    assert preflight.memory_estimate(num, 1, "adamw", 4, "zero1") == 4 * num * (3 + 0.5)
    for shard in ("fsdp", "hsdp"):
        assert preflight.memory_estimate(num, 1, "adamw", 4, shard) == 4 * num * 5 / 4


@pytest.mark.parametrize(
    "kind, reason", [("bomb", "decompression bomb"), ("dangling link", "No such file"), ("loop", "symbolic links")]
)
def test_bombs_and_broken_links_are_bad_images(tmp_path, monkeypatch, kind, reason):
    good, bad = map(Path, write_images(tmp_path, ["a_0.png", "a_1.png"], size=(8, 8)))
    break_image(bad, kind, monkeypatch)
    with pytest.raises(UserError, match=rf"1 images cannot be used, the first: {bad} cannot be read: .*{reason}"):
        preflight.check_images([str(good), str(bad)], 8, "error")
    assert preflight.check_images([str(good), str(bad)], 8, "skip") == [str(good)]


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_all_images_bad_is_said(tmp_path, on_bad_image):
    paths = write_images(tmp_path, ["a_0.png", "a_1.png"], size=(8, 8))
    for path in paths:
        Path(path).write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"^none of the 2 images of data can be used, the first: {paths[0]} cannot be"):
        preflight.check_images(paths, 64, on_bad_image, "data")


def test_tiny_images_are_trained_on_with_a_warning(tmp_path, capsys):
    paths = write_images(tmp_path, ["a_0.png", "a_1.png"], size=(8, 8))
    assert preflight.check_images(paths, 64, "error") == paths
    assert f"2 images are smaller than half of --image_size 64, such as {paths[0]}: they are enlarged" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_exif_rotations_are_counted_without_decoding(tmp_path, monkeypatch, capsys, ending):
    paths = []
    for i, orientation in enumerate((1, 6, 3, None)):
        exif = Image.Exif()
        exif[ExifTags.Base.Make] = "a camera"
        if orientation:
            exif[ExifTags.Base.Orientation] = orientation
        paths.append(str(tmp_path / f"a_{i}.{ending}"))
        Image.new("RGB", (16, 16)).save(paths[-1], exif=exif)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert preflight.check_images(paths, 16, "error") == paths
    assert f"2 images carry an EXIF rotation, such as {paths[1]}: it is not applied" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_makes_no_bad_image(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a_0.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    paths = [str(tmp_path / "a_0.jpg")]
    assert [len(found) for found in preflight.inspect_images(paths, 16)] == [0, 0, 0]


def show(capsys, model_name="MDTv2_Nano_2", vae_factor=1, world_size=1, labels=None, classes=(), **flags):
    """The lines of the screen for a small model of 16 tokens."""
    config = resolve(RunConfig().replaced(**{"model": model_name, "optimizer": "adan"} | flags))
    config = config.replaced(classes=classes, global_batch=config.train.batch_size * world_size)
    options = {} if config.model.mask_ratio is None else {"mask_ratio": config.model.mask_ratio}
    model = create_model(model_name, input_size=8, in_channels=4, num_classes=2, **options)
    first_stage = SimpleNamespace(downsample=vae_factor, scale=0.18215, shift=0.0, precision="fp32")
    preflight.report(config, model, first_stage, num_images=960, labels=labels)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "model_name, mask_ratio, line",
    [
        ("MDTv2_Nano_2", 0.3, "masking: 30 % to 50 % of 16 tokens dropped in the masked pass"),
        ("MDT_Nano_2", 0.3, "masking: 30 % of 16 tokens dropped in the masked pass"),
        (
            "MDTv2_Nano_2", None,
            "no masked pass: MDTv2_Nano_2 trains without masking, since --mask_ratio is not set (the paper's runs have "
            "0.3)",
        ),
        ("DiT_Nano_2", None, "no masked pass: DiT_Nano_2 models are trained without masking"),
    ],
)  # fmt: skip
def test_the_screen_shows_masking(capsys, model_name, mask_ratio, line):
    assert line in show(capsys, model_name, mask_ratio=mask_ratio)


def test_the_screen_shows_what_is_trained_how(capsys):
    assert {
        "960 images, no labels",
        "first stage: ema, diffusion in pixels of 4 x 8 x 8",
        "precision: fp32, not compiled",
        "attention: sdpa (--attention auto)",
        "optimizer: adan, lr 0.0003, gradients clipped to a norm of 1",
        "batch: 32 images x 1 ranks = global batch 32 per step, in microbatches of 32; 30.0 steps per epoch",
    } <= set(show(capsys))
    changes = {"world_size": 8, "microbatch": 16, "precision": "bf16", "compile": True, "lr_anneal_steps": 70}
    changes |= {"optimizer": "adamw", "weight_decay": 0.1, "labels": np.arange(960) % 2, "classes": ("cat", "dog")}
    assert {
        "960 images of 2 classes",
        "first stage: ema, latents of 4 x 8 x 8, 8 times smaller than the images; scale 0.18215, shift 0, computed in "
        "fp32",
        "precision: bf16, compiled blocks",
        "optimizer: adamw, lr 0.0003 annealed to 0 at step 70, weight decay 0.1, gradients not clipped",
        "batch: 32 images x 8 ranks = global batch 256 per step, in microbatches of 16; 3.8 steps per epoch",
    } <= set(show(capsys, vae_factor=8, **changes))


CPU = torch.device("cpu")
FLAGS = "processor\t: 0\nflags\t\t: fpu avx512f avx512_{}\n"


@pytest.mark.parametrize(
    "flags, speedup, chosen",
    [
        (FLAGS.format("bf16"), 2.0, "bf16"),
        (FLAGS.format("bf16"), 0.5, "fp32"),  # instructions that are slow, as a Xeon's without AMX
        (FLAGS.format("vnni"), 2.0, "fp32"),  # no instructions: whatever was measured was noise
        ("Features\t: fp asimd bf16 i8mm\n", 2.0, "bf16"),  # ARM
        (None, 2.0, "bf16"),
        (None, 1.1, "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_computes_it_faster(flags, speedup, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPU_FLAGS", tmp_path / "cpuinfo")
    monkeypatch.setattr(precision, "cpu_has_bf16", precision.cpu_has_bf16.__wrapped__)  # not what it found before
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    precision.computes_bf16.cache_clear()
    assert choose_precision("auto", CPU) == chosen
    precision.computes_bf16.cache_clear()
    assert choose_precision("fp32", CPU) == "fp32" and choose_precision("bf16", CPU) == "bf16"


def test_the_speedup_is_measured_quickly():
    precision.bf16_speedup(64)
    assert 0.01 < precision.bf16_speedup(64) < 100


def test_checking_a_precision_changes_nothing():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check_precision("bf16", torch.device("cpu"))
        check_precision("tf32", torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "medium"
        for precision, expected in (("tf32", "high"), ("bf16", "highest"), ("fp32", "highest")):
            set_matmul_precision(precision)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(UserError, match="--precision tf32 needs a GPU"):
        check_precision("tf32", torch.device("cpu"))
    with pytest.raises(UserError, match="--precision is 'fp8': choose one of fp32"):
        check_precision("fp8", torch.device("cpu"))
