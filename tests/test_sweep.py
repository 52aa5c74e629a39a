"""scripts/sweep.py: every setting is graded once, whatever happens on the way, and the best one is named."""

import json
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import demo_run
import numpy as np
import pytest
import sweep
import sweep_grading
import sweep_report
from digits import write_digits
from fill import fill
from helpers import REPO, crops, evaluate, needs_tensorflow, run_sample, run_script, sample_flags
from PIL import Image
from sweep_grading import GradingConfig

from evaluations import grade_digits
from masked_diffusion import create_model, script_util
from masked_diffusion.sample_config import SampleConfig, WeightsConfig
from masked_diffusion.sampling.build import load_weights
from masked_diffusion.sampling.shards import ShardStore
from masked_diffusion.training.ema import reconstruct, save_snapshots
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """What `make demo` leaves, of a model that has learned nothing: two checkpoints with snapshots of two widths."""
    folder = tmp_path_factory.mktemp("demo")
    options = {"input_size": 8, "in_channels": 3, "num_classes": 10}
    model = fill(create_model("MDTv2_Nano_2", **options))
    (folder / "train").mkdir()
    names = [name for name, _ in model.named_parameters()]
    for step in (10, 20):
        for parameter in model.parameters():
            parameter.data *= 1 - step / 200
        state = {name: value.clone() for name, value in model.state_dict().items()}
        save_checkpoint(folder / "train", step, state, {"0.9": state}, {"step": step})
        save_snapshots(folder / "train", step, {w: list(model.parameters()) for w in ("0.050", "0.100")}, state, names)
    config = {"model": {"name": "MDTv2_Nano_2", "options": options}, "diffusion": {"snr_gamma": 5.0}, "vae": "identity"}
    (folder / "train" / "config.json").write_text(json.dumps(config))
    write_digits(folder / "data")
    return folder


def words_of(demo, out, **flags):
    base = {"model_path": demo / "train", "digits": demo / "data", "out": out, "num_samples": 20, "batch_size": 8}
    base |= {"scale_pows": 1, "bootstrap": 5, "solvers": "ddim:2", "cfg_scales": [1, 2.5]}
    words = []
    for name, value in (base | {"sigma_rels": [0.05, 0.08]} | flags).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])] if value is not None else []
    return words


def run(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    script_util.run(sweep.main)


def report_of(out):
    """The report without speeds and command, which differ from run to run."""
    report = json.loads(out.with_suffix(".json").read_text())
    assert "cores" in report.pop("device") and report.pop("command").startswith("python scripts/sweep.py ")
    for row in report["rows"].values():
        row.pop("images_per_second")
    return report


def test_an_interrupted_sweep_goes_on_to_the_same_report(demo_folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "interrupted"
    run(monkeypatch, words_of(demo_folder, whole))
    write, written = ShardStore.write, []

    def write_until_ctrl_c(*args):
        write(*args)
        written.append(args)
        if len(written) == 8:  # in the third of four settings, after two of its three batches
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardStore, "write", write_until_ctrl_c)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, words_of(demo_folder, out))
    assert stop.value.code == 130 and len(report_of(out)["rows"]) == 2
    capsys.readouterr()
    run(monkeypatch, words_of(demo_folder, out))
    said = capsys.readouterr().out
    assert "4 settings, of which 2 are to be drawn" in said and "16 of 20 images are there already" in said
    assert len(written) == 12 and report_of(out) == report_of(whole) and len(report_of(out)["rows"]) == 4
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width > 500
    table = out.with_suffix(".md").read_text()
    assert table.count("\n| ") == 4 and report_of(out)["best"]["setting"] in re.search(r"\*\*(.*)\*\*", table)[1]
    assert not list((tmp_path / "interrupted_samples").glob("*.npz"))  # graded images are not kept
    assert len(list((tmp_path / "interrupted_samples").glob("*.png"))) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_to_the_same_report(demo_folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    flags = {"sigma_rels": [0.05, 0.08, 0.1], "cfg_scales": [1, 1.5, 2, 3], "solvers": ["ddim:2", "sde-dpm++:2"]}
    run(monkeypatch, words_of(demo_folder, whole, **flags))
    command = [sys.executable, REPO / "scripts" / "sweep.py", *words_of(demo_folder, out, **flags)]
    for rows in (2, 9):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.time() + 200
        while process.poll() is None and time.time() < deadline:
            if out.with_suffix(".json").exists() and len(report_of(out)["rows"]) >= rows:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        process.wait()
        assert process.returncode == -signal.SIGKILL and rows <= len(report_of(out)["rows"]) < 24
    run(monkeypatch, words_of(demo_folder, out, **flags))
    assert report_of(out) == report_of(whole) and len(report_of(out)["rows"]) == 24


@pytest.mark.slow
def test_two_ranks_share_the_images_of_each_setting(demo_folder, tmp_path, monkeypatch):
    run(monkeypatch, words_of(demo_folder, tmp_path / "one", sigma_rels=0.05))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run_script("sweep.py", *words_of(demo_folder, tmp_path / "two", sigma_rels=0.05), launcher=launcher)
    one, two = report_of(tmp_path / "one")["rows"], report_of(tmp_path / "two")["rows"]
    assert list(one) == list(two) and len(one) == 2
    for key, row in one.items():
        assert two[key]["metrics"] == pytest.approx(row["metrics"], rel=1e-2)


def test_a_setting_is_the_images_of_image_sample_with_these_weights(demo_folder, tmp_path, monkeypatch):
    import torch

    out = tmp_path / "one"
    run(monkeypatch, words_of(demo_folder, out, sigma_rels=0.08, cfg_scales=2.5, solvers="ddim:2"))
    path = tmp_path / "posthoc.pt"
    torch.save(reconstruct(demo_folder / "train", 0.08), path)
    (tmp_path / "config.json").write_text((demo_folder / "train" / "config.json").read_text())
    flags = {"num_samples": 20, "batch_size": 20, "class_rule": "balanced", "solver": "ddim", "num_sampling_steps": 2}
    flags |= {"cfg_cond": True, "cfg_scale": 2.5, "scale_pow": 1.0}
    run_sample(monkeypatch, sample_flags(path, tmp_path / "samples", **flags))
    images, labels = grade_digits.read_samples(tmp_path / "samples" / "samples_20x8x8x3.npz")
    expected = grade_digits.grade(demo_folder / "data", images, labels)
    (row,) = report_of(out)["rows"].values()
    assert row["metrics"] == {key: expected[key] for key in ("class_accuracy", "frechet_pixels")}


def test_more_values_are_added_to_a_report(demo_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "grown"
    small = {"solvers": "ddim:2", "sigma_rels": None}
    run(monkeypatch, words_of(demo_folder, out, **small))
    before = report_of(out)["rows"]
    run(monkeypatch, words_of(demo_folder, out, **small | {"guidance_intervals": ["0,500", "200,900"]}))
    assert "4 settings, of which 2 are to be drawn" in capsys.readouterr().out  # the unguided one has no shape
    rows = report_of(out)["rows"]
    assert before.items() <= rows.items() and len(rows) == 4
    assert "weights, ddim:2, scale 2.5, interval 200,900" in rows
    with pytest.raises(SystemExit):
        run(monkeypatch, words_of(demo_folder, out, **small | {"seed": 1}))
    assert "was made with seed 0, now it is 1: move" in capsys.readouterr().err
    emas = {"solvers": "ddim:2", "sigma_rels": None, "emas": ["ema_0.9_000010.pt", "ema_0.9_000020.pt"]}
    run(monkeypatch, words_of(demo_folder, out, **emas))
    assert len(report_of(out)["rows"]) == 8  # those of other EMAs stay
    assert report_of(out)["best"]["setting"].startswith("ema_0.9_0000")


@needs_tensorflow
def test_the_suite_grades_like_the_evaluator(demo_folder, batches, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "reference.npz", crops(30, seed=0, size=8))
    out, inception = tmp_path / "suite", batches / "small.pb"
    flags = {"digits": None, "reference": tmp_path / "reference.npz", "inception": inception, "bootstrap": 3}
    flags |= {"metrics": "fid,is,pr", "solvers": "ddim:2", "cfg_scales": 2.5, "sigma_rels": None, "best": "recall"}
    kept = []
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, **_: kept.append(path), raising=True)
    run(monkeypatch, words_of(demo_folder, out, **flags))
    monkeypatch.undo()
    (row,), (samples,) = report_of(out)["rows"].values(), [path for path in kept if path.suffix == ".npz"]
    words = [tmp_path / "reference.npz", samples, "--inception", inception, "--metrics", "is,fid,pr"]
    evaluate(monkeypatch, capsys, *words, "--json", tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert row["metrics"] == pytest.approx(metrics, rel=1e-9)
    resampled = {"inception_score", "fid", "precision"}  # recall is a share of reference images
    assert row["deviations"].keys() == row["replicates"].keys() == resampled
    assert report_of(out)["best"]["measure"] == "recall"


def cell(scale):
    return sweep.Cell("ema", scale, "power 1", "ddim:2")


def report_with(measure, values, count=1000):
    """A report of rows, one for each guidance scale: (value, resampled values) or (value, None)."""
    rows = {}
    for scale, (value, drawn) in values.items():
        known = {} if drawn is None else {measure: drawn}
        row = {"metrics": {measure: value}, "replicates": known, "images_per_second": 1.0}
        rows[cell(scale).key()] = row | {"deviations": {key: float(np.std(d, ddof=1)) for key, d in known.items()}}
    return {"rows": rows, "settings": {"num_samples": count, "bootstrap": 50}, "device": "a processor"}


def best_of(report, values, **grading):
    return sweep_report.add_best(report, [cell(scale) for scale in values], GradingConfig(**grading))


def resampled(*images):
    """For each array of what images count: its mean, and means over the same images drawn with replacement."""
    draws = np.random.default_rng(1).integers(len(images[0]), size=(50, len(images[0])))
    return [(float(np.mean(one)), np.mean(one[draws], axis=1).tolist()) for one in images]


def test_the_best_is_named_with_its_interval():
    noise = np.random.default_rng(0).standard_normal(4000)
    spread = [0.4 * noise, 0.3 + 0.4 * noise, 0.1 * noise[::-1], noise]  # of FID: lower is better
    values = dict(zip((1.0, 2.0, 3.0, 4.0), resampled(*spread), strict=True))
    report = best_of(report_with("fid", values), values, reference="r.npz", metrics="fid")
    best = report["best"]
    assert best["measure"] == "fid" and best["value"] == min(value for value, _ in values.values())
    deviation = report["rows"][best["setting"]]["deviations"]["fid"]
    assert best["interval"] == pytest.approx([best["value"] - 1.96 * deviation, best["value"] + 1.96 * deviation], 1e-4)
    values = {scale: (value, None) for scale, (value, _) in values.items()}
    report = best_of(report_with("recall", values), values, reference="r.npz", metrics="pr", best="recall")
    assert report["best"]["interval"] is None and report["best"]["not_told_apart"] == []
    assert report["best"]["sentence"].endswith("; no interval is known")
    table = sweep_report.as_markdown(report, [cell(scale) for scale in values], ["recall"])
    assert "; in brackets: 95 % over images, not known of Recall; a processor." in table


def test_all_images_right_is_not_certain():
    right = np.ones((2, 1000)), np.arange(1000) >= 10
    values = dict(zip((1.0, 2.0, 3.0), resampled(*right[0], right[1]), strict=True))
    report = best_of(report_with("class_accuracy", values), values, digits="digits")
    low, high = report["best"]["interval"]
    assert low == pytest.approx(1 - 3.84 / 1003.84, abs=1e-5) and high == 1  # Wilson's interval of 1000 of 1000
    assert report["best"]["not_told_apart"] == [cell(2.0).key()]  # ten images of 1000 apart
    table = sweep_report.as_markdown(report, [cell(scale) for scale in values], ["class_accuracy"])
    assert "1 (0.9962 to 1)" in table
    one_wrong = resampled(np.ones(1000), np.arange(1000) > 0)
    values = {1.0: one_wrong[0], 2.0: (one_wrong[1][0], [1.0] * 50)}  # an image that no resample drew
    report = best_of(report_with("class_accuracy", values), values, digits="digits")
    assert report["best"]["not_told_apart"] == [cell(2.0).key()]


def test_rows_are_told_apart_by_their_differences_on_the_same_images():
    rng = np.random.default_rng(0)
    image = rng.standard_normal(1000)  # what all settings share
    for gap, apart in ((0.02, True), (0.0, False)):
        pair = resampled(image, image + gap + 0.1 * rng.standard_normal(1000))
        values = dict(zip((1.0, 2.0), pair, strict=True))
        assert gap < 1.96 * np.std(pair[0][1])  # as if independent, none would be told apart
        report = best_of(report_with("fid", values), values, reference="r.npz", metrics="fid")
        assert (report["best"]["not_told_apart"] == []) == apart


def test_the_number_of_comparisons_is_corrected_for():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(100):  # 21 settings that are equal in truth: one that is best here is so by chance
        values = dict(enumerate(resampled(*rng.standard_normal((21, 200)))))
        best = best_of(report_with("fid", values), values, reference="r.npz", metrics="fid")["best"]
        wrong += cell(0).key() not in (best["setting"], *best["not_told_apart"])
    assert wrong <= 5


def test_the_report_keeps_what_rows_are_compared_by(demo_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "kept"
    run(monkeypatch, words_of(demo_folder, out, sigma_rels=0.05))
    report = report_of(out)
    for row in report["rows"].values():
        for measure in ("class_accuracy", "frechet_pixels"):
            drawn = row["replicates"][measure]
            assert len(drawn) == 5 and row["deviations"][measure] == pytest.approx(np.std(drawn, ddof=1))
    assert report["settings"]["vae_precision"] == "fp32"
    report["settings"]["vae_precision"] = "bf16"
    out.with_suffix(".json").write_text(json.dumps(report))
    with pytest.raises(SystemExit):
        run(monkeypatch, words_of(demo_folder, out, sigma_rels=0.05))
    assert "kept.json was made with vae_precision bf16, now it is fp32" in capsys.readouterr().err
    for row in report["rows"].values():
        del row["replicates"]
    out.with_suffix(".json").write_text(json.dumps(report))
    with pytest.raises(SystemExit):
        run(monkeypatch, words_of(demo_folder, out, sigma_rels=0.05))
    assert "kept.json is of an older version, which kept no resampled values" in capsys.readouterr().err


def test_the_presets_are_the_studies_of_the_demo():
    for preset in sweep.PRESETS:
        config = sweep.read_flags(["--preset", preset])
        assert config.axes.scale_pows == (demo_run.GUIDANCE.scale_pow,)
        assert {1.0, demo_run.GUIDANCE.cfg_scale} <= set(config.axes.cfg_scales)
        assert config.images.out.startswith("output_demo/")
    assert sweep.read_flags(["--preset", "digits", "--cfg_scales", "3"]).axes.cfg_scales == (3.0,)


@pytest.mark.parametrize("name", ["sweep", "solvers"])
def test_the_pages_in_docs_are_made_of_their_reports(name):
    report = json.loads((REPO / f"docs/{name}.json").read_text())
    config = sweep.read_flags(report["command"].split()[2:])
    cells = sweep.all_cells(config.axes, list(report["emas"]), "power-cosine")
    assert {cell.key() for cell in cells} == set(report["rows"])
    assert sweep_report.add_best(report, cells, config.grading) == report
    page = sweep_report.as_markdown(report, cells, config.grading.keys)
    assert page == (REPO / f"docs/{name}.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"solvers": "ddim"}, "--solvers is ddim: it must be SOLVER:STEPS such as ddim:50"),
        ({"solvers": "ddim:0"}, "--solvers is ddim:0: it must be"),
        ({"solvers": "dpm++:1000"}, "solver dpm++ takes one number from 1 to 999"),
        ({"guidance_intervals": "9,3"}, "--guidance_intervals is 9,3: it must be FIRST,LAST"),
        ({"cfg_scales": [2, 2]}, "--cfg_scales names a value twice: 2.0 2.0"),
        ({"digits": None}, "give --reference, an npz to compare with, or --digits"),
        ({"digits": "nowhere"}, "nowhere/train holds no digits"),
        ({"digits": None, "reference": "r.npz", "metrics": "fid,lpips"}, "--metrics names 'lpips': choose of is, fid"),
        ({"digits": None, "reference": "r.npz"}, "r.npz does not exist"),
        ({"best": "fid"}, "--best is fid: choose one of class_accuracy, frechet_pixels"),
        ({"bootstrap": 1}, "--bootstrap is 1"),
        ({"sigma_rels": 0.5}, "--sigma_rels is 0.5: it must be above 0 and below 0.2887"),
        ({"emas": "ema_0.5_000010.pt"}, "--emas names ema_0.5_000010.pt, but"),
        ({"preset": "none"}, "--preset is none: it must be one of digits, solvers"),
        ({"out": "nowhere/out"}, "nowhere is no folder"),
        ({"sigma_rels": None, "emas": ["ema_0.9_000010.pt", "opt000020.pt"]}, "opt000020.pt holds no state dict of"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_said_before_anything_is_drawn(demo_folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "draw_samples", None)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words_of(demo_folder, **{"out": tmp_path / "out"} | flags)])
    with pytest.raises(UserError, match=re.escape(message)):
        sweep.main()


def test_a_file_that_is_no_report_is_refused(demo_folder, tmp_path, monkeypatch, capsys):
    for content in ("[]", "{", '{"settings": {}, "emas": {}, "rows": 3}'):
        (tmp_path / "out.json").write_text(content)
        with pytest.raises(SystemExit):
            run(monkeypatch, words_of(demo_folder, tmp_path / "out"))
        assert "out.json is no report of this script" in capsys.readouterr().err
        assert (tmp_path / "out.json").read_text() == content


def test_a_network_that_is_no_file_is_refused_before_the_weights_are_loaded(demo_folder, tmp_path, monkeypatch):
    np.savez(tmp_path / "reference.npz", crops(30, seed=0, size=8))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    monkeypatch.setattr(sweep, "load_weights", None)
    for flags, message in (
        (
            {"reference": tmp_path / "reference.npz", "inception": tmp_path / "none.pb"},
            r"none\.pb, which does not exist",
        ),
        ({"reference": tmp_path / "statistics.npz", "metrics": "pr"}, "holds statistics alone, without images"),
    ):
        words = words_of(demo_folder, tmp_path / "out", digits=None, **flags)
        monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
        with pytest.raises(UserError, match=message):
            sweep.main()


def test_other_settings_are_refused_before_the_reference_is_read(demo_folder, tmp_path, monkeypatch):
    np.savez(tmp_path / "reference.npz", crops(30, seed=0, size=8))
    settings = {"num_samples": 20, "seed": 0, "clip_denoised": False, "bootstrap": 5}
    (tmp_path / "out.json").write_text(json.dumps({"settings": settings, "emas": {}, "rows": {}}))
    flags = {"digits": None, "reference": tmp_path / "reference.npz", "sigma_rels": None, "seed": 1}
    words = words_of(demo_folder, tmp_path / "out", **flags)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    monkeypatch.setattr(sweep_grading.SuiteGrader, "prepare", None)
    with pytest.raises(UserError, match="was made with seed 0, now it is 1: move"):
        sweep.main()


def test_an_ema_of_another_model_is_refused(demo_folder, tmp_path):
    import torch

    path = tmp_path / "other.pt"
    torch.save(create_model("MDTv2_Nano_2", input_size=8, in_channels=3, num_classes=3).state_dict(), path)
    weights = load_weights(SampleConfig(WeightsConfig(model_path=str(demo_folder / "train"))))
    with pytest.raises(
        UserError, match=r"other\.pt does not fit the model of .*ema_0\.9_000020\.pt: it has other shapes"
    ):
        sweep.load_ema(weights, path)


def test_images_of_finished_settings_do_not_stay(demo_folder, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", {"sigma_rels": 0.05, "cfg_scales": 1, "bootstrap": 0}
    with monkeypatch.context() as patched, pytest.raises(SystemExit):  # stopped at the last picture
        patched.setattr(sweep, "write_pictures", mock.Mock(side_effect=KeyboardInterrupt))
        run(patched, words_of(demo_folder, out, **flags))
    assert len(report_of(out)["rows"]) == len(list((tmp_path / "out_samples").glob("*.npz"))) == 1
    run(monkeypatch, words_of(demo_folder, out, **flags))
    assert out.with_suffix(".png").exists() and not list((tmp_path / "out_samples").glob("*.npz"))
