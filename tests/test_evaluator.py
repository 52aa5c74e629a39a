"""The evaluator against the definitions, end to end; its warnings and refusals."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    REPO,
    Trap,
    adm_distances,
    by_definition,
    crops,
    evaluate,
    needs_tensorflow,
    numbers,
    small_features,
    write_npz,
)
from PIL import Image

from evaluations import errors, evaluator
from evaluations.metrics import frechet_distance, gaussian_statistics

ADM_LINES = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def frechet(features1, features2):
    """By the definition, with the roots of S1 S2 as the singular values of the product of the centred features."""
    centred = [(f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (features1, features2)]
    roots = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return ((features1.mean(0) - features2.mean(0)) ** 2).sum() + sum((c**2).sum() for c in centred) - 2 * roots


def adm_precision_recall(batches):
    """By ADM's formula from TensorFlow's own features: to the last image."""
    from evaluations.inception_tensorflow import TensorFlowInception

    network = TensorFlowInception(batches / "small.pb")
    reference, samples = (
        np.concatenate([network(images[i : i + 64])["pool"] for i in range(0, len(images), 64)])
        for images in (np.load(batches / f"{name}.npz")["arr_0"] for name in ("reference", "samples"))
    )
    radii, sample_radii = (np.sort(adm_distances(f, f), axis=1)[:, 3] for f in (reference, samples))
    across = adm_distances(reference, samples)
    return (across <= radii[:, None]).any(0).mean(), (across <= sample_radii).any(1).mean()


@needs_tensorflow
def test_the_numbers_are_the_definitions(batches, monkeypatch, capsys):
    files = [batches / "reference.npz", batches / "samples.npz", "--inception", batches / "small.pb"]
    code, output, errors = evaluate(monkeypatch, capsys, *files, "--backend", "tensorflow")
    found = numbers(output)
    assert code == 0 and list(found)[:5] == ADM_LINES
    reference, samples = (
        {k: f.numpy() for k, f in small_features(batches / "small.pb", np.load(path)["arr_0"]).items()}
        for path in files[:2]
    )
    assert found["FID"] == pytest.approx(frechet(samples["pool"], reference["pool"]), rel=1e-4)
    assert found["sFID"] == pytest.approx(frechet(samples["spatial"], reference["spatial"]), rel=1e-4)
    p = np.exp(samples["logits"]) / np.exp(samples["logits"]).sum(1, keepdims=True)
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert found["Inception Score"] == pytest.approx(score, rel=1e-4)
    expected = by_definition(*(f["pool"].astype(np.float32) for f in (reference, samples)))
    for name in ("density", "coverage"):
        assert found[name.capitalize()] == pytest.approx(expected[name], abs=2e-3)
    assert (found["Precision"], found["Recall"]) == adm_precision_recall(batches)
    assert "samples.npz holds 120 images: published numbers have 50000" in errors


@needs_tensorflow
def test_ready_made_statistics_are_used(batches, tmp_path, monkeypatch, capsys):
    features = small_features(batches / "small.pb", np.load(batches / "reference.npz")["arr_0"])
    ready = {"mu": features["pool"].mean(0) + 1, "sigma": np.cov(features["pool"], rowvar=False)}
    np.savez(tmp_path / "ready.npz", **ready)
    files = [tmp_path / "ready.npz", batches / "samples.npz", "--inception", batches / "small.pb"]
    code, output, _ = evaluate(monkeypatch, capsys, *files, "--backend=tensorflow", "--metrics=is,fid")
    assert code == 0 and list(numbers(output)) == ["Inception Score", "FID"]
    samples = small_features(batches / "small.pb", np.load(batches / "samples.npz")["arr_0"])["pool"].numpy()
    shift = 2 * (features["pool"].numpy().mean(0) - samples.mean(0)).sum() + 32
    assert numbers(output)["FID"] == pytest.approx(frechet(samples, features["pool"].numpy()) + shift, rel=1e-4)
    code, _, errors = evaluate(monkeypatch, capsys, *files, "--backend=tensorflow", "--metrics=fid,sfid,pr")
    assert code == 2 and "choose --metrics is,fid" in errors


@needs_tensorflow
def test_statistics_in_a_file_of_samples_are_used_as_adm_uses_them(batches, tmp_path, monkeypatch, capsys):
    own, reference = (np.load(batches / f"{name}.npz")["arr_0"] for name in ("samples", "reference"))
    ready = {"mu": np.zeros(32), "sigma": np.eye(32)}
    np.savez(tmp_path / "ready.npz", own, **ready)
    flags = ["--inception", batches / "small.pb", "--backend=tensorflow", "--metrics=is,fid,sfid"]
    found = []
    for path in (batches / "samples.npz", tmp_path / "ready.npz"):
        words = [batches / "reference.npz", path, *flags, "--json", tmp_path / "a.json"]
        code, output, errors = evaluate(monkeypatch, capsys, *words)
        assert code == 0
        found.append(numbers(output))
    plain, used = found
    features = small_features(batches / "small.pb", reference)["pool"].numpy()
    expected = frechet_distance(ready["mu"], ready["sigma"], *gaussian_statistics(features))
    assert used["FID"] == pytest.approx(expected, rel=1e-4) and used["FID"] != pytest.approx(plain["FID"], rel=0.1)
    assert used["sFID"] == plain["sFID"] and used["Inception Score"] == plain["Inception Score"]
    told = "ready.npz holds statistics, which are used as ADM's evaluator does: mu and sigma for fid"
    assert told in errors and any(
        told in warning for warning in json.loads((tmp_path / "a.json").read_text())["warnings"]
    )
    np.savez(tmp_path / "ready.npz", own, mu=np.full(32, np.nan), sigma=np.eye(32))
    monkeypatch.setattr(evaluator, "create_network", None)
    code, _, errors = evaluate(monkeypatch, capsys, *words)
    assert code == 2 and "ready.npz: mu holds NaN" in errors


@needs_tensorflow
def test_a_run_is_told_in_full(batches, tmp_path, monkeypatch, capsys):
    variables = {"TF_ENABLE_ONEDNN_OPTS": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    files = [batches / f"{name}.npz" for name in ("reference", "samples", "other_seed")]
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = [
        "--inception",
        batches / "small.pb",
        "--backend=tensorflow",
        "--bootstrap=8",
        "--json",
        out,
        "--plot",
        picture,
    ]
    code, output, _ = evaluate(monkeypatch, capsys, *files, *flags)
    assert code == 0
    row = json.loads(out.read_text())
    runs = row["runs"]
    assert [run["count"] for run in runs] == [120, 120] and row["reference"]["count"] == 150
    assert runs[0]["description"]["settings"] == {"cfg_scale": 3.8} and len(runs[1]["sha256"]) == 64
    assert row["backend"] == "tensorflow" and {"python", "numpy", "torch"} <= row["versions"].keys()
    assert any(name.startswith("tensorflow") for name in row["versions"])  # tensorflow-cpu has another name
    assert "cores" in row["device"] and row["distances"].endswith("by the operations of ADM's graph in TensorFlow")
    assert row["variables"] == variables
    assert f"computed by tensorflow on {row['device']} (python " in output and row["distances"] in output
    assert len(row["warnings"]) == 3
    fids = [run["metrics"]["fid"] for run in runs]
    assert row["metrics"]["fid"] == pytest.approx(np.mean(fids))
    half_width = 12.7062 * np.std(fids, ddof=1) / np.sqrt(2)
    assert row["over_seeds"]["fid"]["half_width"] == pytest.approx(half_width, rel=1e-4)
    for run in runs:
        assert set(run["deviations"]) == set(run["metrics"]) - {"kid", "kid_std"}
        low, high = run["intervals"]["precision"]
        share = run["metrics"]["precision"]
        assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(share * (1 - share) / 120), rel=0.6)
        assert low < share < high and run["deviations"]["fid"] > 0
    assert "FID over 2 seeds" in output and Image.open(picture).size[0] > 1000


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("objects", lambda trap: {"arr_0": np.array([trap] * 3, dtype=object)}, "holds Python objects"),
        ("pickle", lambda trap: {"arr_0": b"\x80\x04cos\nsystem\n."}, "no array that can be read"),
        ("float", lambda trap: {"arr_0": np.zeros((5, 32, 32, 3), dtype=np.float32)}, "arr_0 is float32, not uint8"),
        ("nan", lambda trap: {"mu": np.full(32, np.nan), "sigma": np.eye(32)}, "holds statistics alone"),
        ("zero", lambda trap: {"arr_0": np.zeros((0, 32, 32, 3), dtype=np.uint8)}, "holds 0 images"),
        ("one", lambda trap: {"arr_0": np.zeros((1, 32, 32, 3), dtype=np.uint8)}, "holds 1 images"),
        ("sizes", lambda trap: {"arr_0": np.zeros((9, 64, 64, 3), dtype=np.uint8)}, "make a reference of the samples'"),
        ("missing", None, "does not exist"),
        ("text", b"not a zip", "cannot be read as an npz"),
        ("truncated", b"PK\x03\x04" + bytes(500), "cannot be read as an npz"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_samples_end_in_one_sentence(batches, tmp_path, monkeypatch, capsys, name, content, message):
    trap, path = Trap(tmp_path / "executed"), tmp_path / f"{name}.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None and name == "objects":
        np.savez(path, **content(trap))
    elif content is not None:
        write_npz(path, content(trap))
    code, _, errors = evaluate(monkeypatch, capsys, batches / "reference.npz", path)
    assert code == 2 and errors.startswith("error: ") and message in errors and len(errors.splitlines()) == 1
    assert not trap.path.exists()


@needs_tensorflow
def test_damage_within_the_images_ends_in_one_sentence(batches, tmp_path, monkeypatch, capsys):
    flags = ["--inception", batches / "small.pb", "--backend=tensorflow", "--metrics=fid"]
    np.savez(tmp_path / "nan.npz", mu=np.full(32, np.nan), sigma=np.eye(32))
    np.savez(tmp_path / "equal.npz", np.repeat(crops(1, 0), 9, axis=0))
    damaged = bytearray((batches / "samples.npz").read_bytes())
    damaged[50_000:50_004] = bytes(4) if any(damaged[50_000:50_004]) else b"1234"
    (tmp_path / "damaged.npz").write_bytes(damaged)
    for reference, samples, message in (
        (tmp_path / "nan.npz", batches / "samples.npz", "holds NaN or infinite numbers"),
        (batches / "reference.npz", tmp_path / "equal.npz", "all 9 images are the same"),
        (batches / "reference.npz", tmp_path / "damaged.npz", "damaged.npz cannot be read as an npz"),
    ):
        code, _, errors = evaluate(monkeypatch, capsys, reference, samples, *flags)
        assert code == 2 and errors.splitlines()[-1].startswith("error: ") and message in errors


@needs_tensorflow
def test_images_of_one_colour_are_counted(batches, tmp_path, monkeypatch, capsys):
    images = crops(20, 3)
    images[4:7] = 128
    np.savez(tmp_path / "flat.npz", images)
    flags = ["--inception", batches / "small.pb", "--backend=tensorflow", "--metrics=fid"]
    code, _, errors = evaluate(monkeypatch, capsys, batches / "reference.npz", tmp_path / "flat.npz", *flags)
    assert code == 0 and "flat.npz holds 3 images of one colour" in errors


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--metrics=fid,speed"], "--metrics names 'speed'"),
        (["--metrics=fd_dinov2"], "--metrics names 'fd_dinov2'"),
        (["--bootstrap=1"], "--bootstrap is 1"),
        (["--batch_size=0"], "--batch_size is 0"),
        (["--json=nowhere/a.json"], "the folder of nowhere/a.json does not exist"),
        (["--plot=a.jpg"], "name a .png"),
        (["--json=."], ". is a folder: name a file in it"),
        (["--plot=."], ". is a folder: name a file in it"),
        (["--inception=nowhere.pb"], "nowhere.pb, which does not exist"),
        (["--inception=."], "--inception names ., which is no file"),
        (["--dinov2=nowhere.pth"], "--dinov2 names nowhere.pth, which is no file"),
        (["--metrics=kid", "--exact_distances"], "--exact_distances is of precision and recall: add pr"),
        (["--devices=121"], "samples.npz holds 120 images, fewer than 121 processes"),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(batches, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(evaluator, "create_network", None)
    code, _, errors = evaluate(monkeypatch, capsys, batches / "reference.npz", batches / "samples.npz", *flags)
    assert code == 2 and errors.startswith("error: ") and message in errors


@pytest.mark.parametrize("named", ["flag", "environment"])
def test_weights_of_torch_are_for_the_torch_backend(batches, tmp_path, monkeypatch, capsys, named):
    path, flags = tmp_path / "weights.pth", []
    path.write_bytes(b"PK")
    if named == "flag":
        flags = ["--inception", path]
    else:
        monkeypatch.setenv("INCEPTION_V3_PATH", str(path))
    code, _, errors = evaluate(monkeypatch, capsys, batches / "reference.npz", batches / "samples.npz", *flags)
    assert code == 2 and "weights.pth cannot be read as the Inception network" in errors


def test_outputs_replace_no_input_and_no_pipe(batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "create_network", None)
    inputs = {name: tmp_path / name for name in ("reference.npz", "samples.npz", "small.pb", "dinov2.pth")}
    for name, path in inputs.items():
        path.write_bytes((batches / name).read_bytes() if (batches / name).exists() else b"weights")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to(tmp_path / "samples.npz")
    before = {path: path.lstat() for path in tmp_path.iterdir()}
    words = [inputs["reference.npz"], inputs["samples.npz"], "--inception", inputs["small.pb"]]
    words += ["--dinov2", inputs["dinov2.pth"]]
    flags = [([f"--json={path}"], "would replace") for path in (*inputs.values(), tmp_path / "link.json")]
    flags += [
        ([f"--json={tmp_path / 'pipe'}"], "which is a device or a pipe"),
        (
            [f"--json={tmp_path / 'a.png'}", f"--plot={tmp_path}/../{tmp_path.name}/a.png"],
            "--json and --plot both name",
        ),
        ([f"--json={tmp_path / ('x' * 250)}"], "cannot be written (File name too long)"),
        ([f"--json={tmp_path / ('x' * 300)}"], "cannot be written (File name too long)"),
        (["--json=/proc/a.json"], "/proc/a.json cannot be written"),
    ]
    for more, message in flags:
        code, _, errors = evaluate(monkeypatch, capsys, *words, *more)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1
    assert {path: path.lstat() for path in tmp_path.iterdir()}.keys() == before.keys()
    assert all(path.lstat().st_mtime_ns == stat.st_mtime_ns for path, stat in before.items())


@pytest.mark.parametrize(
    "package, flags",
    [
        ("timm", ["--dinov2=hub"]),
        ("matplotlib", ["--plot=a.png"]),
        ("torch-fidelity", ["--backend=torch"]),
        ("tensorflow", ["--backend=tensorflow"]),
    ],
)
def test_missing_packages_are_said_first(batches, tmp_path, monkeypatch, capsys, package, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package.replace("-", "_") else name)
    code, _, message = evaluate(monkeypatch, capsys, batches / "reference.npz", batches / "samples.npz", *flags)
    assert code == 2 and f"{package} is not installed, which" in message and f"pip install {package}" in message


def constant(count, rng):
    return rng.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2)


@pytest.mark.parametrize(
    "name, reference, samples, flags, message",
    [
        (
            "few samples",
            {},
            {"arr_0": crops(3, 0)},
            [],
            "a.npz holds 3 images, which have no 3 neighbours each: use at",
        ),
        ("few references", {"arr_0": crops(5, 0)}, {}, [], "or leave dc out of --metrics"),
        ("equal", {}, {"arr_0": crops(1, 0).repeat(9, 0)}, [], "a.npz: all 9 images are the same"),
        (
            "flat",
            {},
            {"arr_0": constant(9, np.random.default_rng(0))},
            [],
            "a.npz: all 9 images are of one colour each",
        ),
        ("equal reference", {"arr_0": crops(1, 0).repeat(9, 0)}, {}, [], "r.npz: all 9 images are the same"),
        ("nan", {}, {"arr_0": np.full((9, 32, 32, 3), np.nan)}, [], "arr_0 is float64, not uint8"),
        ("minus", {"mu": np.zeros(32), "sigma": -np.eye(32)}, {}, ["--metrics=fid"], "no eigenvalue below 0"),
        ("nan mean", {"mu": np.full(32, np.nan), "sigma": np.eye(32)}, {}, ["--metrics=fid"], "mu holds NaN"),
        ("shapes", {"mu": np.zeros(32), "sigma": np.eye(31)}, {}, ["--metrics=fid"], "must be (d,) and (d, d)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_network_mends_is_said_before_there_is_one(
    batches, tmp_path, monkeypatch, capsys, name, reference, samples, flags, message
):
    monkeypatch.setattr(evaluator, "create_network", None)
    paths = [batches / "reference.npz", batches / "samples.npz"]
    for place, arrays in enumerate((reference, samples)):
        if arrays:
            paths[place] = tmp_path / ("r.npz", "a.npz")[place]
            np.savez(paths[place], **arrays)
    code, _, errors = evaluate(monkeypatch, capsys, *paths, *flags)
    assert code == 2 and errors.startswith("error: ") and message in errors and len(errors.splitlines()) == 1


def test_samples_that_are_named_twice_are_refused(batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "create_network", None)
    (tmp_path / "link.npz").symlink_to(batches / "samples.npz")
    paths = [batches / f"{name}.npz" for name in ("reference", "samples", "other_seed")]
    code, _, errors = evaluate(monkeypatch, capsys, *paths, tmp_path / "link.npz")
    assert code == 2 and "samples.npz is named twice" in errors


@needs_tensorflow
def test_a_reference_of_another_network_is_refused_before_this_one_runs(batches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "collect", None)
    flags = ["--inception", batches / "small.pb", "--backend=tensorflow", "--metrics=fid,sfid"]
    for sizes, message in (((33, 448), "mu has shape (33,), but the network gives 32 pool"),
                           ((32, 447), "mu_s has shape (447,), but the network gives 448 spatial")):  # fmt: skip
        pool, spatial = sizes
        statistics = {
            "mu": np.zeros(pool),
            "sigma": np.eye(pool),
            "mu_s": np.zeros(spatial),
            "sigma_s": np.eye(spatial),
        }
        np.savez(tmp_path / "ready.npz", **statistics)
        code, _, errors = evaluate(monkeypatch, capsys, tmp_path / "ready.npz", batches / "samples.npz", *flags)
        assert code == 2 and message in errors


@needs_tensorflow
def test_exact_distances_are_told(batches, tmp_path, monkeypatch, capsys):
    files = [batches / "reference.npz", batches / "samples.npz", "--inception", batches / "small.pb"]
    flags = ["--backend=tensorflow", "--metrics=pr", "--exact_distances", "--json", tmp_path / "a.json"]
    code, output, _ = evaluate(monkeypatch, capsys, *files, *flags)
    row = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and row["distances"] == "single precision, without the half-precision rule"
    assert row["distances"] in output and list(row["metrics"]) == ["precision", "recall"]


# ---------------------------------------------------------------- several processes, both backends


@needs_tensorflow
@pytest.mark.slow
def test_two_processes_find_what_one_finds(batches, tmp_path, monkeypatch, capsys):
    files = [batches / "reference.npz", batches / "samples.npz", "--inception", batches / "small.pb", "--bootstrap=3"]
    _, output, _ = evaluate(monkeypatch, capsys, *files, "--backend=tensorflow")
    command = [sys.executable, REPO / "evaluations" / "evaluator.py", *files, "--devices=2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Computing evaluations...") == 1
    assert numbers(result.stdout) == pytest.approx(numbers(output), rel=1e-6) and len(numbers(output)) >= 9
    intervals = [np.array(re.findall(r"(\S+) to (\S+)", text), dtype=float) for text in (result.stdout, output)]
    np.testing.assert_allclose(*intervals, rtol=1e-4, atol=1e-6)
    assert len(intervals[0]) == 7
    damaged = bytearray((batches / "samples.npz").read_bytes())
    damaged[300_000:300_100] = bytes(100)  # in the second half, which the second process reads
    (tmp_path / "damaged.npz").write_bytes(damaged)
    command[3] = tmp_path / "damaged.npz"
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ")
    assert "damaged.npz cannot be read as an npz" in result.stderr


@needs_tensorflow
@pytest.mark.slow
def test_both_backends_agree_on_real_images(inception_graph, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "reference.npz", crops(24, seed=0))
    np.savez(tmp_path / "samples.npz", crops(24, seed=1) // 2)
    files = [tmp_path / "reference.npz", tmp_path / "samples.npz", "--inception", inception_graph]
    found = []
    for backend in ("tensorflow", "torch"):
        code, output, _ = evaluate(monkeypatch, capsys, *files, f"--backend={backend}")
        assert code == 0
        found.append(numbers(output))
    assert len(found[0]) == 9 and found[0]["FID"] > 1
    assert found[1] == pytest.approx(found[0], rel=1e-3)
