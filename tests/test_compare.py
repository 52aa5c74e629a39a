"""The table of results beside the published rows."""

import json
import sys

import pytest
from PIL import Image

from evaluations import compare, console, errors

ROW = {
    "metrics": {"fid": 1.234, "inception_score": 300.5, "kid": 0.00123},
    "over_seeds": {},
    "runs": [{"intervals": {"fid": [1.134, 1.334]}}],
    "warnings": [],
}
NAN = float("nan")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        console.run(compare.main)
    return stop.value.code, *capsys.readouterr()


def test_the_published_rows_stand_beside_ours(tmp_path, monkeypatch, capsys):
    (tmp_path / "ours.json").write_text(json.dumps(ROW))
    seeds = {"over_seeds": {"fid": {"mean": 1.234, "half_width": 0.5}}, "warnings": ["few images"]}
    (tmp_path / "seeds.json").write_text(json.dumps(ROW | seeds))
    files = [tmp_path / "ours.json", tmp_path / "seeds.json"]
    code, output, _ = run(monkeypatch, capsys, *files, "--plot", tmp_path / "table.png")
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in output.splitlines()[:8]}
    assert code == 0
    assert rows[""] == ["FID", "sFID", "Inception Score", "Precision", "Recall", "KID"]
    assert rows["MDTv2-XL/2-G"] == ["1.58", "4.52", "314.73", "0.790", "0.650", ""]
    assert rows["ADM"][:3] == ["10.94", "6.02", "100.98"]
    assert rows["ours"] == ["1.23 ± 0.10", "", "300.50", "", "", "0.00123"]
    assert rows["seeds (!)"][0] == "1.23 ± 0.50" and "(!) seeds: few images" in output
    assert Image.open(tmp_path / "table.png").size[0] > 500


def test_files_of_one_name_keep_apart(tmp_path, monkeypatch, capsys):
    paths = [tmp_path / folder / "metrics.json" for folder in ("guided", "unguided")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(ROW))
    assert all(str(path) in run(monkeypatch, capsys, *paths)[1] for path in paths)


def test_a_file_of_a_published_name_replaces_no_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "ADM.json").write_text(json.dumps(ROW))
    drawn = []
    monkeypatch.setattr(compare, "draw", lambda path, rows: drawn.extend(rows))
    code, output, _ = run(monkeypatch, capsys, tmp_path / "ADM.json", "--plot", tmp_path / "a.png")
    assert code == 0 and "| ADM | 10.94 |" in output and f"| {tmp_path / 'ADM.json'} | 1.23" in output
    assert [row.published for row in drawn] == [True] * 4 + [False]


def test_a_result_is_named_once_and_never_drawn_over(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROW))
    (tmp_path / "link.json").symlink_to(path)
    code, _, errors = run(monkeypatch, capsys, path, tmp_path / "link.json")
    assert code == 2 and "link.json: name each result once" in errors
    for picture, message in ((path, "would replace"), (path / "x.png", "does not exist"), (tmp_path, "is a folder")):
        code, output, errors = run(monkeypatch, capsys, path, "--plot", picture)
        assert code == 2 and message in errors and output == "" and json.loads(path.read_text()) == ROW


def test_a_missing_package_is_said_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(ROW))
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    code, output, message = run(monkeypatch, capsys, tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert code == 2 and output == "" and "matplotlib is not installed, which --plot needs" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"metrics": 3}', b'{"metrics": {"fid": []}, "over_seeds": {}}', b"\xff" * 10**6, b"[" * 100_000],
    ids=range(6),
)
def test_other_files_are_refused_in_few_words(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "a.json").write_bytes(content)
    code, _, errors = run(monkeypatch, capsys, tmp_path / "a.json")
    assert code == 2 and "a.json is no result of evaluator.py --json" in errors and len(errors) < 1000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": {"fid": NAN, "kid": 1.0}}, "fid is nan"),
        ({"metrics": {"fid": float("inf")}}, "fid is inf"),
        ({"over_seeds": {"fid": {"mean": 1.0, "half_width": NAN}}}, "fid is nan"),
        ({"runs": [{"intervals": {"fid": [NAN, 2.0]}}]}, "fid is nan"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path, monkeypatch, capsys, change, message):
    (tmp_path / "a.json").write_text(json.dumps(ROW | change))
    code, output, errors = run(monkeypatch, capsys, tmp_path / "a.json")
    assert code == 2 and output == "" and f"a.json: {message}, which compares with nothing" in errors
