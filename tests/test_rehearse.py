"""scripts/rehearse.py: the published layout, the memory of all processes, the estimate, and the whole at S size."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import rehearse
import torch
from helpers import DATA, crops
from PIL import Image
from rehearsal_estimate import Rates, as_markdown, estimate, read_rates
from rehearsal_memory import MemoryWatch
from rehearsal_weights import write_checkpoint, write_inception, write_vae

from masked_diffusion import script_util
from masked_diffusion.latents.autoencoder import create_first_stage
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.pretrained import load_model


@pytest.mark.parametrize("model", ["MDTv2_S_2", pytest.param("MDT_S_2", marks=pytest.mark.slow)])
def test_the_checkpoint_has_the_published_layout(model, tmp_path):
    state = torch.load(write_checkpoint(tmp_path / "model.pt", model, 32), weights_only=True)
    published = json.loads((DATA / "state_dicts.json").read_text())[model]
    assert {key: [list(value.shape), str(value.dtype)] for key, value in state.items()} == published
    weight = state["final_layer.linear.weight"]
    assert weight.std() == pytest.approx(0.02, rel=0.05) and len(weight.unique()) > 1000
    assert load_model(tmp_path / "model.pt").depth == 12  # which refuses indices outside their table


def test_memory_is_that_of_all_processes():
    with MemoryWatch() as watch:
        _, before = watch.end_stage()
        watch.start_stage()
        code = "import time; held = b'1' * 300_000_000; time.sleep(1)"
        grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
        subprocess.run([sys.executable, "-c", grandchild], check=True)
        seconds, peak = watch.end_stage()
        assert seconds > 1 and peak > before + 0.27
        watch.start_stage()
        time.sleep(0.05)
        assert watch.end_stage()[1] < before + 0.2  # what has ended is not in the next stage


def test_memory_of_a_stage_that_has_ended_is_not_the_next_ones(monkeypatch):
    with MemoryWatch() as watch:

        def slowly(root):  # the next stage begins while it looks
            watch.start_stage()
            return 7 * 2**30

        monkeypatch.setattr("rehearsal_memory.resident_bytes", slowly)
        watch._look()
        monkeypatch.setattr("rehearsal_memory.resident_bytes", lambda root: 2**30)
        assert watch.end_stage()[1] == 1


def test_gpu_hours_come_from_the_stated_speed(tmp_path):
    found = estimate(read_rates(2.0, None, "MDTv2_XL_2"))
    assert found["gpu_hours"]["guided"] == pytest.approx(50_000 / 2 / 3600)
    assert found["total"] == pytest.approx(1.5 * 50_000 / 2 / 3600)
    assert read_rates(None, None, "MDTv2_XL_2") is None
    coding = {"encode fp32": 1.0, "decode fp32": 50.0}
    rows = {
        "sample XL/2 compiled bf16 triton": {"rows": [{"images_per_second": 4.0}, {"images_per_second": 5.0}]},
        "sample S/2 compiled bf16 triton": {"rows": [{"images_per_second": 90.0}]},
        "vae": {"rows": [{"name": name, "images_per_second": value} for name, value in coding.items()]},
        "inception": {"error": "out of memory"},
    }  # fmt: skip
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": "a GPU", "date": "2026-01-01", "rows": rows}))
    rates = read_rates(None, str(path), "MDTv2_XL_2")
    assert rates == (5.0, 50.0, "gpu.json: a GPU, 2026-01-01")
    assert estimate(rates)["gpu_hours"]["decoding"] == pytest.approx(100_000 / 50 / 3600)
    with pytest.raises(UserError, match="holds no sampling of B/2"):
        read_rates(None, str(path), "MDTv2_B_2")
    path.write_text("[]")
    with pytest.raises(UserError, match=r"gpu\.json is no report of scripts/measure_gpu\.py"):
        read_rates(None, str(path), "MDTv2_XL_2")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--photos", ""], "--photos is '': it must be a folder of photos"),
        (["--photos", "nowhere"], "--photos names nowhere, which does not exist"),
        (["--photos", ".", "--out", "full"], "--out is full, which holds something: name a new folder"),
        (["--photos", ".", "--out", "no/where"], "no is no folder"),
        (["--photos", ".", "--model_path", "a.pt"], "--model_path names a.pt, which does not exist"),
        (["--photos", ".", "--num_samples", "3"], "--num_samples is 3: it must be at least 4"),
        (["--photos", ".", "--image_size", "68"], "--image_size is 68: it must be a multiple of 16, the 8 pixels of a"),
        (
            ["--photos", ".", "--image_size", "80", "--model", "MDT_S_4"],
            "--image_size is 80: it must be a multiple of 32",
        ),
        (["--photos", ".", "--model", "MDTv3"], "no model is called 'MDTv3'"),
        (["--photos", ".", "--num_photos", "2"], "--num_photos is 2: it must be 0 (all), or at least 6"),
        (["--photos", ".", "--vae", "nofile"], "--vae names nofile, which does not exist"),
        (["--photos", ".", "--images_per_second", "0"], "--images_per_second is 0.0: it must be above 0"),
        (["--photos", ".", "--images_per_second", "1", "--benchmarks", "b"], "state the same figure"),
    ],
    ids=str,
)
def test_what_cannot_be_rehearsed_is_said_first(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("")
    with pytest.raises(UserError, match=re.escape(message)):
        script_util.parse_flags(rehearse.RehearsalConfig, "", flags)


def test_what_a_later_stage_would_refuse_is_said_before_the_first(tmp_path, autoencoders, monkeypatch):
    pytest.importorskip("torch_fidelity")

    def refused(**flags):
        words = [f"--{key}={value}" for key, value in ({"photos": tmp_path, "out": tmp_path / "out"} | flags).items()]
        monkeypatch.setattr(sys, "argv", ["rehearse.py", *words])
        with pytest.raises(UserError) as error:
            rehearse.main()
        return str(error.value)

    monkeypatch.setattr(rehearse, "rehearse", None)
    for i, pixels in enumerate(crops(6, seed=0)):
        assert f"holds {i} images below .: 6 are needed" in refused()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    assert "holds 6 images below .: 7 are needed" in refused(num_photos=7)
    assert "channels 16, but the model was trained with 4: name" in refused(vae=autoencoders / "flux")
    monkeypatch.setattr("evaluations.errors.find_spec", lambda name: None if name == "torch_fidelity" else name)
    assert refused().startswith("torch-fidelity is not installed, which the network of the evaluation")


def test_the_report_says_what_the_hours_leave_out():
    report = {"settings": {"model": "M", "num_samples": 4, "num_sampling_steps": 2}, "device": "a processor"}
    report |= {"stages": [], "seconds": 1.0, "peak_memory_gib": 1.0, "random": [], "table": ""}
    for decode, missing in ((50.0, "Evaluation is"), (None, "Decoding and evaluation are")):
        text = as_markdown(report | {"estimate": estimate(Rates(5.0, decode, "gpu.json"))})
        assert f"\n{missing} not in it: " in text and ("decoding" in text) == (decode is not None)


def test_a_step_that_fails_ends_the_rehearsal(capfd):
    with pytest.raises(UserError, match=r"raise SystemExit\(3\).* ended with status 3"):
        list(rehearse.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"]))
    assert "why" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_at_s_size(vae_folder, tmp_path, monkeypatch, capfd):
    pytest.importorskip("torch_fidelity")
    out = tmp_path / "out"
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(crops(12, seed=0, size=80)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    flags = {"photos": tmp_path / "photos", "out": out, "model": "MDTv2_S_2", "image_size": 64}
    flags |= {"num_samples": 4, "num_sampling_steps": 2, "vae": vae_folder, "images_per_second": 4}
    monkeypatch.setattr(sys, "argv", ["rehearse.py", *(f"--{key}={value}" for key, value in flags.items())])
    script_util.run(rehearse.main)
    report = json.loads((out / "rehearsal.json").read_text())
    assert [row["stage"] for row in report["stages"]] == [
        "checkpoint of random numbers", "autoencoder and Inception of random numbers", "reference",
        "sampling, guided", "evaluation, guided", "sampling, unguided", "evaluation, unguided", "table",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and 0.1 < row["peak_memory_gib"] < 16 for row in report["stages"])
    assert report["random"] == ["model_path", "inception"]
    assert all(np.isfinite(value) for metrics in report["metrics"].values() for value in metrics.values())
    with np.load(out / "guided" / "samples_4x64x64x3.npz") as guided, np.load(out / "reference.npz") as reference:
        assert guided["arr_0"].std() > 1 and reference["arr_0"].shape == (12, 64, 64, 3)
    text = (out / "rehearsal.md").read_text()
    assert "GPU hours of 2 x 50,000 images: 5.2 (guided 3.5, unguided 1.7), at 4 guided images/s" in text
    assert "Of random numbers: the checkpoint, the Inception network" in text and "MDTv2-XL/2-G" in text
    assert (out / "table.png").exists()


@pytest.mark.slow
def test_the_random_autoencoder_and_inception_are_of_the_published_kind(tmp_path):
    pytest.importorskip("torch_fidelity")
    from evaluations.inception_torch import TorchInception

    first_stage = create_first_stage(str(write_vae(tmp_path / "vae")))
    assert (first_stage.channels, first_stage.downsample) == (4, 8)
    assert sum(p.numel() for p in first_stage.vae.decoder.parameters()) == 49_490_179  # as Stable Diffusion's
    features = TorchInception(write_inception(tmp_path / "i.pth"))(np.random.default_rng(0).integers(
        0, 256, (2, 64, 64, 3), dtype=np.uint8
    ))["pool"]  # fmt: skip
    assert features.isfinite().all() and 0.01 < features.mean() < 100
