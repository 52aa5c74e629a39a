"""The study of learning speed: its queue and its factors in closed form, a miniature of it, and what docs/ holds."""

import json
import shutil
import signal
import sys
from itertools import product
from pathlib import Path

import compare_learning
import image_classifier
import learning_report
import learning_tuning
import numpy as np
import pytest
import torch
from helpers import REPO, write_images
from learning_factors import all_factors, factor, reached_at
from learning_runs import UNMASKED, VARIANTS, Cell, Curve, Run, evenly, processor, published_cell
from PIL import Image

from masked_diffusion import script_util
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.locks import FileLock

FAST, SLOW = Cell("MDTv2", "adan", True), Cell("DiT", "adamw", False)
MINI = {"steps": 8, "eval_interval": 1, "num_samples": 20, "num_sampling_steps": 2, "batch_size": 8}
TUNED = {0.005: 3.0, 0.01: 2.0, 0.02: 2.5}  # Frechet distance by learning rate


def make_row(cell, qualities, seed=1, lr=0.01, step=10, seconds=1.0, **more):
    curve = [
        {"step": step * i, "images": 32 * step * i, "flop": 1e9 * i, "cpu_seconds": seconds * i, "frechet": quality,
         "class_accuracy": i / 10}
        for i, quality in enumerate(qualities, start=1)
    ]  # fmt: skip
    row = {"lr": lr, "seed": seed, "steps": 8, "complete": True, "fault": None, "processor": "one", "curve": curve}
    return cell._asdict() | row | more


def run_study(monkeypatch, out, draw=False, tuned=(), **flags):
    """Run the script; its JSON.

    :param tuned: cells that a new JSON holds the tuning of already, to a learning rate of 0.01.
    """
    flags = MINI | {"out": out, "work": f"{out}_work"} | flags
    words = [f"--{key}={value}" for key, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["compare_learning.py", *words])
    if tuned and not Path(f"{out}.json").exists():
        results = compare_learning.Results(script_util.parse_flags(compare_learning.StudyConfig, ""))
        for cell, (lr, score) in product(map(learning_tuning.tuning_cell, tuned), TUNED.items()):
            results.add("tuning", make_row(cell, [score], 0, lr))
    threads = torch.get_num_threads()
    try:
        with monkeypatch.context() as patched:
            if not draw:  # the pictures take longer than the training
                patched.setattr(learning_report, "write", lambda *args: None)
            compare_learning.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(Path(f"{out}.json").read_text())


def source_of(picture):
    return Image.open(picture).text["Source"]


# ---------------------------------------------------------------- closed forms


def test_variants_as_published_and_what_is_tuned():
    assert published_cell("MDTv2") == FAST and published_cell("DiT") == SLOW
    assert published_cell(UNMASKED) == Cell(UNMASKED, "adan", True)
    assert published_cell("MDT") == Cell("MDT", "adamw", False)
    assert [Cell(variant, "adan", True).masked for variant in VARIANTS] == [True, False, True, False]
    assert learning_tuning.tuning_cell(FAST) == Cell("MDTv2", "adan", False)


def test_tuning_walks_to_the_best_rate_from_either_side_and_stops_between_two_worse_ones():
    for best, tries in ((0.001, 5), (0.008, 3), (0.064, 6)):  # the neighbour below is tried first
        scores = {}
        while (lr := learning_tuning.next_lr(scores, 0.008, 2.0)) is not None:
            scores[lr] = abs(np.log2(lr / best))
        assert learning_tuning.best_lr(scores) == pytest.approx(best)
        assert len(scores) == tries
    flat = {}
    while (lr := learning_tuning.next_lr(flat, 0.008, 2.0)) is not None:
        flat[lr] = 1.0
    assert len(flat) == learning_tuning.MOST_RATES
    diverged = {0.008: float("inf"), 0.004: 1.0}
    assert learning_tuning.next_lr(diverged, 0.008, 2.0) == 0.002


def test_where_a_curve_reaches_a_target():
    places, qualities = np.array([[10.0, 20, 30]] * 4), np.array([[8.0, 4, 1]] * 4)
    targets = np.array([4, 2, 9, 0.5])
    np.testing.assert_allclose(reached_at(places, qualities, targets), [20, 25, 10, np.inf])


def test_the_factor_of_two_exact_curves():
    slow = [make_row(SLOW, [16, 8, 4, 2], seed) for seed in (1, 2)]
    fast = [make_row(FAST, [4, 2, 1, 0.5], seed, seconds=4.0) for seed in (1, 2)]
    found = factor(FAST, SLOW, fast, slow)
    assert (found.value, found.interval, found.seeds) == (2.0, (2.0, 2.0), (2, 2))
    assert found.on("cpu_seconds", 0.25)[2:6] == ("cpu_seconds", 0.5, 0.25, (0.5, 0.5))
    assert all_factors(slow + fast)[2][1].value == 0.5
    back = factor(SLOW, FAST, slow, fast)
    assert back.value is None and back.bound == 1
    assert learning_report.factor_words(back) == "< 1.00 (< 1.00 to < 1.00)"


@pytest.mark.parametrize("last", [0.25, 1, 2, 8])
def test_a_side_is_as_fast_as_itself_also_where_its_last_evaluation_is_a_spike(last):
    rows = [make_row(SLOW, [8, 4, 1, 0.5, last], seed) for seed in (1, 2)]
    found = factor(SLOW, SLOW, rows, rows)
    assert found.value == 1 and found.bound <= 1


def test_the_interval_of_a_factor_is_that_of_its_seeds():
    slow = [make_row(SLOW, [16, 8, 4, 2])]
    fast = [make_row(FAST, qualities, seed) for seed, qualities in enumerate(([2, 1, 1, 1], [8, 4, 2, 1]))]
    alone = factor(FAST, SLOW, fast, slow)
    assert alone.interval is None and 4 / 3 < alone.value < 4
    found = factor(FAST, SLOW, fast, slow * 2)
    stretch = 4.302653 / 1.959964 * 2**0.5  # Student's t of two degrees of freedom
    assert found.value == alone.value and found.interval[0] is None  # below what the length of the runs shows
    assert found.interval[1] == pytest.approx(alone.value * (4 / alone.value) ** stretch, rel=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_interval_covers_what_it_says(seeds):
    """Curves of a power law whose true factor is 2, moved as a whole by each seed."""
    rng, steps, covered = np.random.default_rng(0), np.arange(1, 13), []
    for _ in range(150):
        sides = [
            [make_row(cell, scale / steps * np.exp(0.1 * rng.standard_normal()), i) for i in range(seeds)]
            for cell, scale in ((FAST, 1.0), (SLOW, 2.0))
        ]
        low, high = factor(FAST, SLOW, *sides).interval
        covered.append((low or 0) <= 2 <= high)
    assert 0.9 < np.mean(covered) < 0.99


def test_questions_are_asked_of_the_cells_that_have_runs():
    rows = [make_row(cell, [4, 2]) for cell in (FAST, SLOW, FAST._replace(optimizer="adamw"))]
    rows.append(make_row(Cell("MDT", "adamw", False), [4, 2], complete=False))
    asked = [(heading, found.fast.variant, found.slow.variant) for heading, found in all_factors(rows)]
    assert asked[::3] == [("as published", "MDTv2", "DiT"), ("Adan instead of AdamW", "MDTv2", "MDTv2")]


def test_seconds_are_those_of_one_processor():
    rows = [
        make_row(cell, [4, 2], seed, seconds=seconds) for cell, seconds in ((FAST, 2.0), (SLOW, 4.0)) for seed in (1, 2)
    ]
    rows += [make_row(FAST, [4, 2], 3, seconds=100.0, processor="another")]
    found = {factor.axis: factor for _, factor in all_factors(rows)}
    assert found["cpu_seconds"].value == 2 and found["step"].value == 1
    assert found["cpu_seconds"].seeds == found["step"].seeds == (3, 2)  # their qualities are those of all runs
    text = learning_report.final_table({"settings": {"steps": 20}, "judge": {}, "runs": rows})
    assert "| 3 | 2.000 (2.000 to 2.000) | 0.200 (0.200 to 0.200) | 0.00 | 4 |" in text
    assert "CPU seconds, here and below: one, which trained 4 of the runs." in text
    rows = [row for row in rows if row["variant"] != "MDTv2" or row["processor"] == "another"]
    assert {factor.axis for _, factor in all_factors(rows)} == {"step", "flop"}
    table = learning_report.factor_table({"runs": rows})
    assert table.splitlines()[2] == "| as published | MDTv2 | DiT | 1 and 2 | 1.00 | 1.00 |  |"


def test_a_study_that_has_just_begun_is_reported_too(tmp_path):
    tuning = [make_row(SLOW, [2.0], 0), make_row(SLOW, [], 0, 0.02, complete=False)]
    settings = {"steps": 40, "eval_interval": 20, "tuning_lr": 0.01, "tuning_factor": 2.0}
    content = {"settings": settings, "judge": {}, "tuning": tuning, "runs": []}
    learning_report.write(str(tmp_path / "out"), tmp_path / "out.md", content, tmp_path)
    assert "| DiT | adamw | **2.000** | diverged |" in (tmp_path / "out.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["out_tuning.png"]
    content["runs"] = [make_row(FAST._replace(min_snr=False), [2.0, 1.0]), make_row(SLOW, [], complete=False)]
    learning_report.write_tables(str(tmp_path / "out"), tmp_path / "out.md", content)
    text = (tmp_path / "out.md").read_text()
    assert "Diverged, and in no mean: DiT, adamw, without Min-SNR, seed 1." in text and text.count("## ") == 3
    assert "| MDTv2 | adan | no | 0.01 | 1 | 1.000 (1.000 to 1.000) | 0.200 (0.200 to 0.200) | 0.00 | 2 |" in text


def test_places_at_even_distances():
    assert evenly(60, 45).tolist()[::11] == [0, 15, 30, 44, 59] and evenly(3, 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": {}}'])
def test_other_json_is_no_study(text, tmp_path, monkeypatch):
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(UserError, match=r"out.json (cannot be read as JSON|is not the JSON of a study)"):
        run_study(monkeypatch, tmp_path / "out", report=True)


def test_runs_at_other_rates_than_the_tuned_one_are_left_out():
    cell = FAST._replace(min_snr=False)
    tuning = [make_row(cell, [score], 0, lr) for lr, score in ((0.005, 3.0), (0.01, 2.0), (0.02, 2.5))]
    content = {"settings": {"tuning_lr": 0.01, "tuning_factor": 2.0}, "tuning": tuning}
    content["runs"] = [make_row(each, [4, 2], lr=lr) for each in (FAST, cell, SLOW) for lr in (0.01, 0.02)]
    kept = [(row["variant"], row["lr"]) for row in learning_report.at_tuned_rates(content)["runs"]]
    assert kept == [("MDTv2", 0.01), ("MDTv2", 0.01), ("DiT", 0.01), ("DiT", 0.02)]  # of DiT there is no tuning yet
    content["tuning"] = tuning[:2]
    assert learning_report.at_tuned_rates(content) == content


def test_samples_are_those_of_any_run_of_a_cell(tmp_path):
    content = {"settings": {"steps": 2, "eval_interval": 1}, "runs": [make_row(FAST, [4, 2], seed) for seed in (1, 2)]}
    content["runs"].append(make_row(SLOW, [4, 2]))
    picture = tmp_path / "samples.png"
    for cell, row, shade in ((FAST, content["runs"][1], 50), (SLOW, content["runs"][2], 200)):
        learning_report.draw_samples(picture, content, tmp_path)
        assert not picture.exists()
        run = Run(cell, row["lr"], row["seed"], 2, 1)
        np.savez(tmp_path / f"{run.name}.npz", images=np.full((30, 8, 8, 3), shade, np.uint8))
    learning_report.draw_samples(picture, content, tmp_path)
    pixels = np.asarray(Image.open(picture))
    assert pixels[0, 0].tolist() == [50] * 3 and pixels[pixels.shape[0] // 2, 0].tolist() == [200] * 3


def test_the_processor_has_a_name():
    assert len(processor()) > 3


# ---------------------------------------------------------------- a miniature


def test_a_miniature_resumes_exactly_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    cells = [SLOW]
    monkeypatch.setattr(compare_learning, "cells_of", lambda config: cells)
    flags = {"tuned": [FAST, SLOW], "seeds": 1, "work": tmp_path / "work"}
    (whole,) = run_study(monkeypatch, tmp_path / "whole", **flags)["runs"]
    steps, seconds, flop = ([point[key] for point in whole["curve"]] for key in ("step", "cpu_seconds", "flop"))
    assert steps == list(range(1, 9)) and seconds == sorted(seconds) and flop[-1] == pytest.approx(8 * flop[0])
    assert whole["complete"] and (whole["seed"], whole["lr"], whole["threads"]) == (1, 0.01, 1)
    digits, folder = sorted((tmp_path / "work").iterdir())
    assert digits.name == "digits" and folder.name.startswith("whole-")
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".npz"]  # the index, and the samples

    after_step, stopped = Curve.after_step, []

    def stop_at_five(self, loop):
        wants_row = after_step(self, loop)
        if loop.step == 5 and not stopped:
            stopped.append(loop)
            loop._stop_signal = signal.SIGTERM
        return wants_row

    monkeypatch.setattr(Curve, "after_step", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        run_study(monkeypatch, tmp_path / "cut", **flags)
    assert stopped and json.loads((tmp_path / "cut.json").read_text())["runs"] == []
    cells.append(FAST)
    runs = run_study(monkeypatch, tmp_path / "cut", draw=True, **flags)["runs"]
    assert [row["variant"] for row in runs] == ["DiT", "MDTv2"]
    for ours, theirs in zip(runs[0]["curve"], whole["curve"], strict=True):
        assert ours["cpu_seconds"] > 0 and ours | {"cpu_seconds": 0} == theirs | {"cpu_seconds": 0}
    text = (tmp_path / "cut.md").read_text()
    assert "| MDTv2 | adan | yes | 0.01 | 1 |" in text and "| as published | MDTv2 | DiT | 1 and 1 |" in text
    for name in ("cut.png", "cut_cells.png", "cut_tuning.png", "cut_samples.png"):
        assert (tmp_path / name).stat().st_size > 1000 and f"]({name})" in text

    monkeypatch.setattr(compare_learning, "train", lambda *args: pytest.fail("a finished run is trained again"))
    assert run_study(monkeypatch, tmp_path / "cut", **flags)["runs"] == runs
    content = json.loads((tmp_path / "cut.json").read_text())
    assert learning_report.content_hash(content) == source_of(tmp_path / "cut.png")
    lock = FileLock(tmp_path / "cut.json.lock", "", "")
    with pytest.raises(UserError, match=r"cut.json is being added to already, by process \d+"):
        run_study(monkeypatch, tmp_path / "cut", **flags)
    lock.release()
    with pytest.raises(UserError, match=r"cut.json was made with batch_size 8, not 9"):
        run_study(monkeypatch, tmp_path / "cut", **flags | {"batch_size": 9})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_steps_of_the_whole_study(tmp_path, monkeypatch):
    monkeypatch.setattr(learning_tuning, "MOST_RATES", 3)
    flags = {"steps": 20, "eval_interval": 2, "seeds": 1}
    content = run_study(monkeypatch, tmp_path / "out", draw=True, **flags)
    assert len(content["runs"]) == 16 and all(len(row["curve"]) == 10 for row in content["runs"])
    tuned = {(row["variant"], row["optimizer"]) for row in content["tuning"]}
    assert len(tuned) == 8 and all(row["seed"] == 0 for row in content["tuning"])
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert sum(line.startswith(f"| {variant} |") for variant in VARIANTS for line in lines) == 16 + 8
    assert sum(" 1 and 1 |" in line for line in lines) == 5 * 5 + 8 + 8


def test_a_folder_of_images_is_judged_by_a_classifier_of_its_own(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_images(tmp_path / split, [f"{'ab'[i % 2]}_{i}.png" for i in range(40)], size=(8, 8))
    monkeypatch.setattr(compare_learning, "cells_of", lambda config: [FAST])
    flags = {"tuned": [FAST], "seeds": 1}
    flags |= {"data_dir": tmp_path / "train", "test_dir": tmp_path / "test", "random_flip": True}
    content = run_study(monkeypatch, tmp_path / "out", **flags)
    last = content["runs"][0]["curve"][-1]
    assert {"class_accuracy", "frechet", "kernel"} <= last.keys() and content["judge"]["features"] == "classifier"
    assert "| kernel distance |" in learning_report.final_table(content)
    with pytest.raises(UserError, match=r"8 x 8 pixels, but --image_size is 16"):
        image_classifier.classifier_judge(tmp_path / "train", tmp_path / "test", 16, 10, tmp_path / "other.pt")
    assert run_study(monkeypatch, tmp_path / "out", **flags) == content  # with the classifier beside the JSON
    (tmp_path / "out_classifier.pt").unlink()
    monkeypatch.setattr(image_classifier, "SEED", 1)
    with pytest.raises(UserError, match=r"out.json holds runs that another classifier has judged"):
        run_study(monkeypatch, tmp_path / "out", **flags)
    write_images(tmp_path / "train", ["a_41.png"], size=(8, 8))
    with pytest.raises(UserError, match=r"out.json was made with data \["):
        run_study(monkeypatch, tmp_path / "out", **flags)


def test_the_classifier_learns(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    images = torch.randint(0, 100, (256, 3, 8, 8), generator=generator)
    images[labels == 1, 0] += 100
    model = image_classifier.train_classifier(images.to(torch.uint8), labels, 2, epochs=6)
    features, found = image_classifier.classify(model, images.to(torch.uint8))
    assert features.shape == (256, image_classifier.WIDTHS[-1]) and (found == labels.numpy()).mean() > 0.95


# ---------------------------------------------------------------- what is refused, and what docs/ holds


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"steps": 7}, "at least 8 evaluations"),
        ({"data_dir": "here"}, "--data_dir and --test_dir go together"),
        ({"report": True}, "out.json is no file"),
        ({"image_size": 16}, "--image_size is 16, but the digits have 8"),
        ({"doc": "nowhere/x.md"}, "there is no folder nowhere"),
        ({"size": "Foo_2"}, "no model is called"),
        ({"hidden_size": 50}, r"hidden_size \(50\) must be a multiple"),
        ({"work": "setup.py"}, "--work setup.py is a file"),
    ],
)
def test_what_is_refused_before_anything_is_trained(flags, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        run_study(monkeypatch, tmp_path / "out", **flags)
    assert not (tmp_path / "out.json").exists()


def test_the_page_in_docs_has_a_place_for_every_table():
    text = (REPO / "docs/learning.md").read_text()
    for name, section in product(("learning", "learning_cifar10"), learning_report.SECTIONS):
        first, last = f"<!-- {name}: {section} -->", f"<!-- end of {name}: {section} -->"
        assert text.count(first) == text.count(last) == 1 and text.index(first) < text.index(last)


@pytest.mark.parametrize("path", sorted((REPO / "docs").glob("learning*.json")), ids=lambda path: path.stem)
def test_the_tables_and_pictures_in_docs_are_those_of_the_json(path, tmp_path):
    content = json.loads(path.read_text())
    for kept in (REPO / "docs/learning.md", *(REPO / "docs").glob(f"{path.stem}_samples.png")):
        shutil.copy(kept, tmp_path)
    learning_report.write(str(tmp_path / path.stem), tmp_path / "learning.md", content, tmp_path / "no samples")
    assert (tmp_path / "learning.md").read_text() == (REPO / "docs/learning.md").read_text()
    for picture in tmp_path.glob("*.png"):
        assert (REPO / "docs" / picture.name).exists() and picture.stat().st_size > 1000
        if not picture.name.endswith("_samples.png"):  # which are drawn of what the runs left
            source = learning_report.content_hash(learning_report.at_tuned_rates(content))
            assert source_of(REPO / "docs" / picture.name) == source_of(picture) == source
    for row in content["runs"]:
        assert len(row["curve"]) >= 8 and row["processor"] and "compare_learning.py" in row["command"]


def test_the_script_says_what_it_does(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_learning.py", "--help"])
    with pytest.raises(SystemExit):
        script_util.run(compare_learning.main)
    assert "learning rate" in capsys.readouterr().out


def test_a_run_has_one_name():
    names = {Run(cell, 0.01, 1, 8, 1).name for cell in compare_learning.cells_of(compare_learning.StudyConfig())}
    assert len(names) == 16
