"""Logs of runs as a picture."""

import json

import numpy as np
import plot_run
import pytest
from helpers import run_train, train_flags
from PIL import Image

from masked_diffusion import script_util
from masked_diffusion.utils.errors import UserError


def write_log(folder, rows, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return folder


def draw(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["plot_run.py", *map(str, words)])
    plot_run.main()
    return capsys.readouterr().out


def test_a_step_counts_as_it_was_logged_last(tmp_path):
    rows = [{"step": step, "loss": 10.0 + step} for step in (100, 200, 300)]
    rows += [{"step": step, "loss": 1.0, "note": "resumed"} for step in (200, 250)]
    folder = write_log(tmp_path, rows, end='{"step": 400, "lo')
    read = plot_run.read_rows(folder)
    assert [(row["step"], row["loss"]) for row in read] == [(100, 110), (200, 1), (250, 1), (300, 310)]
    (folder / "progress.jsonl").unlink()
    (folder / "progress.csv").write_text("step,loss,eval_fid\n100,1.5,\n200,nan,3\n100,2.5,\n300\n")
    first, second, third = plot_run.read_rows(folder)
    assert first == {"step": 100, "loss": 2.5} and second["eval_fid"] == 3 and third == {"step": 300}
    assert np.isnan(second["loss"])


def test_the_lines_of_a_real_run_and_of_another(images, tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, train_flags(images, tmp_path / "a" / "run", max_steps=4, num_workers=0))
    rows = [{"step": step, "samples": step * 8, "loss": 1 / step, "eval_frechet": 9 / step} for step in range(1, 9)]
    write_log(tmp_path / "b" / "run", rows)
    capsys.readouterr()
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def remember(axis, x, y, **options):
        drawn.setdefault(options["label"], []).append((list(x), list(y)))
        return plot(axis, x, y, **options)

    monkeypatch.setattr(Axes, "plot", remember)
    out = draw(monkeypatch, capsys, tmp_path / "a" / "run", tmp_path / "b" / "run", "--out", tmp_path / "runs.png")
    assert "a/run: 4 rows to step 4, loss " in out and "b/run: 8 rows to step 8" in out
    read = plot_run.read_rows(tmp_path / "a" / "run")
    assert drawn["a/run"][0] == ([1, 2, 3, 4], [row["loss"] for row in read])
    # Loss, four quartiles, gradient norm, speed and one evaluation.
    assert len(drawn["a/run"]) == len(drawn["b/run"]) == 8 and drawn["b/run"][7] == (
        [*range(1, 9)],
        [9 / s for s in range(1, 9)],
    )
    assert drawn["a/run"][7] == ([], [])
    with Image.open(tmp_path / "runs.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 1500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    drawn.clear()
    draw(monkeypatch, capsys, tmp_path / "a" / "run", "--out", tmp_path / "one.jpg", "--x", "train_seconds")
    assert drawn["run"][0][0] == [row["train_seconds"] / 3600 for row in read]
    assert Image.open(tmp_path / "one.jpg").format == "JPEG"


def test_what_is_no_log_is_a_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"nowhere is no folder: name the log directory"):
        plot_run.read_rows(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is a folder without progress\.jsonl and progress\.csv"):
        plot_run.read_rows(tmp_path)
    for text in ("", "[1]\n5\n", '{"loss": 3}\n', '{"step": NaN}\n', "\x00\n"):
        (tmp_path / "progress.jsonl").write_text(text)
        with pytest.raises(UserError, match="has no row yet"):
            plot_run.read_rows(tmp_path)
    (tmp_path / "progress.jsonl").write_bytes(b"\xff\xff\n")
    with pytest.raises(UserError, match="cannot be read"):
        plot_run.read_rows(tmp_path)
    write_log(tmp_path, [{"step": 1, "other": 2}])
    with pytest.raises(UserError, match="nothing to draw"):
        draw(monkeypatch, capsys, tmp_path, "--out", tmp_path / "a.png")
    monkeypatch.setattr("sys.argv", ["plot_run.py", str(tmp_path), "--out", "runs.txt"])
    with pytest.raises(SystemExit) as stop:
        script_util.run(plot_run.main)
    assert stop.value.code == 2 and "runs.txt has no extension of a picture" in capsys.readouterr().err
    for words, message in (
        ([], "required: LOG_DIR"),
        (["a", "--x", "days"], "invalid choice"),
        (["a", "--ot", "b"], "--out"),
    ):
        monkeypatch.setattr("sys.argv", ["plot_run.py", *words])
        with pytest.raises(UserError, match=message):
            plot_run.main()


def test_runs_have_names_that_tell_them_apart():
    assert plot_run.run_names(["out/a", "out/b"]) == ["a", "b"]
    assert plot_run.run_names(["x/a", "y/a/", "z/b"]) == ["x/a", "y/a", "z/b"]
