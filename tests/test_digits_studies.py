"""The demo's parts, and a study of its model, on a model that has learned nothing."""

import json
import sys

import demo
import demo_run
import inpaint
import numpy as np
import pytest
from digits import write_digits
from fill import fill
from PIL import Image

from masked_diffusion import create_model, script_util
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import save_checkpoint


@pytest.fixture
def demo_folder(tmp_path):
    """What `make demo` leaves, as far as the studies read it."""
    options = {"input_size": 8, "in_channels": 3, "num_classes": 10}
    state = fill(create_model("MDTv2_Nano_2", **options)).state_dict()
    (tmp_path / "train").mkdir()
    save_checkpoint(tmp_path / "train", 1, state, {"0.9": state}, {"step": 1})
    config = {"model": {"name": "MDTv2_Nano_2", "options": options}, "diffusion": {"snr_gamma": 5.0}, "vae": "identity"}
    (tmp_path / "train" / "config.json").write_text(json.dumps(config))
    write_digits(tmp_path / "data")
    return tmp_path


def test_the_demo_samples_with_the_guidance_of_the_studies():
    flags = demo.SAMPLE_FLAGS
    assert (flags["cfg_scale"], flags["scale_pow"]) == (demo_run.GUIDANCE.cfg_scale, demo_run.GUIDANCE.scale_pow)
    assert demo_run.GUIDANCE.rule == "power-cosine" and flags["cfg_cond"]


def test_inpainting_keeps_what_is_known_and_grades_the_rest(demo_folder, monkeypatch, capsys):
    flags = {"demo": demo_folder, "out": demo_folder / "out", "num_sampling_steps": 2, "resamplings": 2}
    words = [f"--{key}={value}" for key, value in (flags | {"num_digits": 12}).items()]
    monkeypatch.setattr(sys, "argv", ["inpaint.py", *words])
    script_util.run(inpaint.main)
    assert capsys.readouterr().out.count("known pixels kept: True") == 4 * len(inpaint.HOLES)
    report = json.loads((demo_folder / "out.json").read_text())
    assert report["num_digits"] == 12 and report["class_accuracy"]["untouched"] > 0.9
    for method in ("repaint", "side-interpolater"):
        for run in (f"{method}, resamplings 1", f"{method}, resamplings 2"):
            assert report["class_accuracy"][f"all but a frame, {run}"] < 0.5 and report["cpu_seconds"][run] > 0
    assert (report["solver"], report["num_sampling_steps"]) == ("ddpm", 2)
    picture = np.asarray(Image.open(demo_folder / "out.png"))
    assert picture.shape == (16 * 9 * inpaint.SCALE, 12 * 9 * inpaint.SCALE, 3)


def test_without_the_demo_a_study_says_what_to_run(demo_folder):
    with pytest.raises(UserError, match=r"nowhere/train is not there: run `make demo` first"):
        demo_run.open_demo(demo_folder / "nowhere")
    (demo_folder / "data").rename(demo_folder / "moved")
    with pytest.raises(UserError, match=r"data/test is not there"):
        demo_run.open_demo(demo_folder)


def test_the_demo_trains_and_samples_in_the_precision_that_is_faster_here(tmp_path, monkeypatch, capsys):
    calls = {}
    monkeypatch.setattr(demo, "run_script", lambda *words: None)
    monkeypatch.setattr(demo, "run_timed", lambda name, script, flags, out: calls.update({name: flags}))
    monkeypatch.setattr(demo, "write_report", lambda out, *_: (out / "report.json").write_text("{}"))
    monkeypatch.setattr(demo, "choose_precision", lambda name, device: {"auto": "bf16"}.get(name, name))
    for flags, expected in (([], "bf16"), (["--precision", "fp32", "--objective", "flow"], "fp32")):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / expected), *flags])
        demo.main()
        assert {name: flags["precision"] for name, flags in calls.items()} == {"train": expected, "sample": expected}
        assert calls["train"]["objective"] == ("flow" if "flow" in flags else "diffusion")
        assert f"precision: {expected} (--precision" in capsys.readouterr().out


def test_a_script_that_fails_ends_the_demo_with_its_exit_code(tmp_path):
    (tmp_path / "stop.py").write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit) as stop:
        demo.run_timed("stop", tmp_path / "stop.py", {"speed": 1}, tmp_path)
    assert stop.value.code == 7 and json.loads((tmp_path / "seconds.json").read_text())["stop"] > 0
