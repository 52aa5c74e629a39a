"""The cost of a run, from a measured speed."""

import json

import plan
import pytest
from helpers import run_train, train_flags

from masked_diffusion import create_model
from masked_diffusion.script_util import parse_flags
from masked_diffusion.utils.errors import UserError


def show(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["plan.py", *map(str, words)])
    plan.main()
    return capsys.readouterr().out


def write(path, report):
    path.write_text(json.dumps(report))
    return path


def test_a_cache_of_other_autoencoders():
    config = plan.PlanConfig(images_per_second=1.0, num_images=100, latent_channels=32, downsample=32).check()
    assert plan.cache_bytes(config) == 100 * 2 * 2 * 32 * 8 * 8 * 2
    with pytest.raises(UserError, match="--image_size 256 must be a multiple of --downsample, 24"):
        plan.PlanConfig(images_per_second=1.0, downsample=24).check()


def test_days_and_disk(monkeypatch, capsys):
    words = ["--images_per_second", 200, "--encode_images_per_second", 600, "--gpus", 4, "--steps", 400000]
    lines = [line.split() for line in show(monkeypatch, capsys, *words, "--keep", 2).splitlines()]
    # 400,000 x 256 images at 200 per second; with the encoder 1 / (1/200 + 1/600) = 150 per second
    days = 400_000 * 256 / 200 / 86400
    assert ["cached", "latents", "400,000", "200", f"{days:.4g}", f"{days / 4:.4g}"] in lines
    days *= 200 / 150
    assert ["images,", "encoded", "on", "the", "way", "400,000", "150", f"{days:.4g}", f"{days / 4:.4g}"] in lines
    disk = {" ".join(line[:-1]): float(line[-1]) for line in lines if line and "GiB" not in line and len(line) > 2
            and line[-1].replace(".", "").isdigit()}  # fmt: skip
    assert disk["latent cache of 1,281,167 images"] == round(1_281_167 * 2 * 2 * 4 * 32 * 32 * 2 / 2**30, 2)
    weights = 4 * 742.264e6 / 2**30
    assert disk["a checkpoint: weights, 1 EMA, adan"] == pytest.approx(6 * weights, rel=1e-3)
    # two checkpoints without their EMAs, and 40 EMAs
    assert disk["log directory after 400,000 steps (--keep 2)"] == pytest.approx((2 * 5 + 40) * weights, rel=1e-3)


def test_a_checkpoint_has_the_planned_size(images, tmp_path, monkeypatch, capsys):
    flags = {"optimizer": "adan", "max_steps": 1, "num_workers": 0, "model": "DiT_Tiny_8", "mask_ratio": None}
    run_train(monkeypatch, train_flags(images, tmp_path, **flags))
    num_params = sum(
        p.numel() for p in create_model("DiT_Tiny_8", input_size=8, in_channels=3, num_classes=3).parameters()
    )
    size = sum(path.stat().st_size for path in tmp_path.glob("*000001.pt"))
    assert size == pytest.approx(plan.memory_estimate(num_params, 1, "adan", 1, "none") - 4 * num_params, rel=0.05)
    capsys.readouterr()
    # The run is a measurement, too: of one rank, in pixels.
    (row,) = map(json.loads, (tmp_path / "progress.jsonl").read_text().splitlines())
    speed = plan.read_speed(str(tmp_path), None)
    assert speed.latents == row["images_per_second"] and speed.live is None and speed.model == "DiT_Tiny_8"
    out = show(monkeypatch, capsys, "--measured", tmp_path)
    assert "DiT_Tiny_8: " in out and "unknown" in out and "--encode_images_per_second" in out.splitlines()[-1]
    with pytest.raises(UserError, match="--measured is of DiT_Tiny_8, not of --model MDT_S_2"):
        show(monkeypatch, capsys, "--measured", tmp_path, "--model", "MDT_S_2")


def test_the_second_half_of_a_run_counts_and_ranks_share_its_speed(tmp_path):
    rows = [{"step": i, "images_per_second": speed} for i, speed in enumerate([1, 5, 80, 120, 88, 80])]
    (tmp_path / "progress.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 7, "ima')
    write(tmp_path / "config.json", {"flags": {"batch_size": 8, "model": "MDT_S_2"}, "global_batch": 32})
    speed = plan.read_speed(str(tmp_path / "progress.jsonl"), None)
    assert (speed.live, speed.latents, speed.model) == (88 / 4, None, "MDT_S_2") and "4 ranks" in speed.source
    # An encoder at 44 images/s takes half of the time.
    assert speed.completed(44).latents == pytest.approx(44) and speed.completed(20).latents is None


def test_reports_of_the_benchmarks(tmp_path):
    settings = {"mode": "train", "model": "MDTv2_XL_2", "precision": "bf16", "optimizer": "adan"}
    rows = [{"name": "train", "images_per_second": 180.0}, {"name": "train, no optimizer", "images_per_second": 200.0}]
    report = {"device": "a GPU", "settings": settings, "rows": rows}
    speed = plan.read_speed(str(write(tmp_path / "xl.json", report)), None)
    assert speed.latents == 180 and speed.source == "train bf16, a GPU, xl.json"
    for mode in ("sample", "draw"):
        path = write(tmp_path / "other.json", report | {"settings": settings | {"mode": mode}})
        with pytest.raises(UserError, match=f"--measured is of --mode {mode}: measure a training step"):
            plan.read_speed(str(path), None)
    gpu = {
        "train XL/2 eager bf16": {"rows": rows},
        "train XL/2 compiled bf16 triton": {"rows": [{"name": "train", "images_per_second": 190.0}]},
        "train S/2 compiled bf16 triton": {"error": "out of memory"},
        "vae": {"rows": [{"name": "encode bf16", "images_per_second": 900.0}, {"name": "decode bf16"}]},
    }
    path = str(write(tmp_path / "gpu.json", {"device": "a GPU", "rows": gpu}))
    speed = plan.read_speed(path, None)
    assert (speed.latents, speed.encode) == (190, 900) and speed.source.startswith("train XL/2 compiled bf16 triton")
    with pytest.raises(UserError, match="has no training step of MDTv2_S_2"):
        plan.read_speed(path, "MDTv2_S_2")


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"rows": []}', '{"rows": 5}', '{"rows": {"vae": 1}}', "\0"])
def test_other_files_are_a_sentence(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json (is no report|has no training step)"):
        plan.read_speed(str(tmp_path / "a.json"), None)


def test_other_folders_are_a_sentence(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is a folder without progress.jsonl"):
        plan.read_speed(str(tmp_path), None)
    (tmp_path / "progress.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="holds no speed yet"):
        plan.read_speed(str(tmp_path), None)
    (tmp_path / "progress.jsonl").write_text('{"step": 1, "images_per_second": 4}\n')
    with pytest.raises(UserError, match=r"holds no config\.json"):
        plan.read_speed(str(tmp_path), None)
    with pytest.raises(UserError, match="--measured nowhere does not exist"):
        plan.read_speed("nowhere", None)
    for words in ([], ["--measured", "a", "--images_per_second", "3"]):
        with pytest.raises(UserError, match="name one source of the speed"):
            parse_flags(plan.PlanConfig, "", words)
