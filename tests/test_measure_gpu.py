"""One command that measures a GPU: its rows are real commands, and it keeps what it has."""

import json
import sys

import measure_gpu
import pytest
from attention_benchmark import AttentionConfig
from benchmark_steps import BenchmarkConfig
from component_benchmark import ComponentConfig
from measure_gpu import Row

from masked_diffusion import script_util
from masked_diffusion.utils.errors import UserError

FLAGS = {
    measure_gpu.BENCHMARK: BenchmarkConfig,
    measure_gpu.ATTENTION: AttentionConfig,
    measure_gpu.COMPONENT: ComponentConfig,
}
WRITE = "import json, sys; json.dump({}, open(sys.argv[-1], 'w'))"
GOOD = {"rows": [{"name": "train", "ms": 2.5, "share_of_peak": 0.5}], "matmul_tflops": {"bf16": 700.0}}


def python(name, code, group="training", seconds=9):
    return Row(name, group, ("-c", code), seconds)


ROWS = [
    python("good", WRITE.format(GOOD)),
    python("crash", "print('loading'); raise RuntimeError('CUDA out of memory: 80 GiB')"),
    python("killed", "import os; os.kill(os.getpid(), 9)", "sampling"),
    python("missing", WRITE.format({"rows": [], "skipped": "diffusers is not installed"}), "VAE"),
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the script with other rows; returns its report, the text of it, and what was printed."""

    def call(rows, *flags):
        monkeypatch.setattr(measure_gpu, "all_rows", lambda tiny: rows)
        monkeypatch.setattr(
            sys, "argv", ["measure_gpu.py", "--out", str(tmp_path), "--commit", "abc", "--tiny", "False", *flags]
        )
        capsys.readouterr()
        measure_gpu.main()
        (file,) = tmp_path.glob("*.json")
        return json.loads(file.read_text()), file.with_suffix(".md").read_text(), capsys.readouterr().out

    return call


def test_a_row_that_fails_is_a_row_that_says_so(run):
    report, text, _ = run(ROWS)
    assert report["commit"] == "abc" and report["torch"] and report["device"]
    rows = report["rows"]
    assert list(rows) == [row.name for row in ROWS]
    assert rows["good"]["rows"] == GOOD["rows"] and rows["good"]["command"].startswith("python -c")
    assert rows["crash"]["error"] == "RuntimeError: CUDA out of memory: 80 GiB"
    assert rows["killed"]["error"].startswith("exit code -9")
    assert rows["missing"]["skipped"] == "diffusers is not installed"
    assert "| measured | name | ms | share_of_peak |" in text and "| good | train | 2.5 | 50.0% |" in text
    assert "crash: error: RuntimeError: CUDA out of memory" in text
    assert "missing: skipped: diffusers is not installed" in text
    assert "bf16 700 to 700" in text


def test_it_goes_on_where_it_stopped(run):
    run(ROWS[:2])
    report, _, out = run([python("good", "raise SystemExit('again')"), *ROWS[1:3]])
    assert "good" not in out and "crash" not in out and "killed" in out
    assert report["rows"]["good"]["rows"] == GOOD["rows"]
    report, _, out = run([python("crash", WRITE.format(GOOD)), *ROWS[:1]], "--again", "failed")
    assert "crash: measured" in out and "good" not in out and "error" not in report["rows"]["crash"]
    report, _, out = run([python("good", WRITE.format({"rows": []}))], "--again", "crash, good", "--commit", "def")
    assert report["rows"]["good"]["rows"] == [] and report["rows"]["crash"]["rows"] == GOOD["rows"]
    assert report["commit"] == "def"


def test_what_does_not_fit_waits_for_the_next_call(run):
    slow = "import time; time.sleep(60)"
    rows = [python("long", slow, seconds=100), python("slow", slow, seconds=0.5), ROWS[0]]
    report, text, out = run([*rows[:2], python("quick", WRITE.format(GOOD), seconds=1)], "--minutes", "0.3")
    assert report["rows"]["slow"]["error"] == "it took more than 2 s" and "quick" in report["rows"]
    assert "long" not in report["rows"] and "Not measured yet: long." in text
    assert "wait for the next call: long" in out


def test_a_row_that_the_end_cuts_short_is_not_held_against_it(run):
    run(ROWS[:1])
    report, _, out = run([*ROWS[:1], python("cut", "import time; time.sleep(60)", seconds=1)], "--minutes", "0.03")
    assert "cut" not in report["rows"] and "wait for the next call: cut" in out


def test_a_damaged_report_is_not_overwritten(run, tmp_path):
    run(ROWS[:1])
    (file,) = tmp_path.glob("*.json")
    file.write_text("[1]")
    with pytest.raises(UserError, match="is no report of this script"):
        run(ROWS[:1])
    assert file.read_text() == "[1]"


def test_the_result_of_tests(tmp_path):
    file = tmp_path / "report"
    file.write_text(
        '<testsuites><testsuite errors="0" failures="1" skipped="2" tests="9"><testcase name="a"/>'
        '<testcase name="b"><failure message="no"/></testcase></testsuite></testsuites>'
    )
    (row,) = measure_gpu.read_tests(file)["rows"]
    assert row == {"name": "gpu tests", "tests": 9, "failures": 1, "errors": 0, "skipped": 2, "failed": "b"}


@pytest.mark.parametrize("tiny", [True, False])
def test_rows_are_commands_with_flags_that_exist(tiny, monkeypatch):
    for kind in FLAGS.values():
        monkeypatch.setattr(kind, "check", lambda self: self)  # of a GPU that is not here
    rows = measure_gpu.all_rows(tiny)
    assert len({row.name for row in rows}) == len(rows) and {row.group for row in rows} == set(measure_gpu.GROUPS)
    for row in rows:
        if row.words[0] == "pytest":
            continue
        assert (measure_gpu.REPO / row.words[0]).exists()
        script_util.parse_flags(FLAGS[row.words[0]], "", row.words[1:])
    text = " ".join(row.name for row in rows)
    for size in ("S", "B", "L", "XL"):
        for how in ("naive fp32", "eager bf16", "compiled bf16 sdpa", "compiled bf16 triton"):
            assert f"train {size}/2 {how}" in text
    assert "sample S/2" in text and "sample XL/2" in text and "attention width 72" in text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_of_every_kind_run_at_tiny_sizes(monkeypatch, tmp_path):
    others = ("XL/2", "L/2", "B/2", "compiled bf16 sdpa")  # at tiny sizes, nearly the same is compiled again
    kinds = [row for row in measure_gpu.all_rows(True) if not any(name in row.name for name in others)]
    assert {row.group for row in kinds} == {row.group for row in measure_gpu.all_rows(True)}
    monkeypatch.setattr(measure_gpu, "all_rows", lambda tiny: kinds)
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py", "--out", str(tmp_path), "--tiny", "True", "--minutes", "28"])
    measure_gpu.main()
    (file,) = tmp_path.glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert rows.keys() == {row.name for row in kinds}
    assert {name: row for name, row in rows.items() if "error" in row} == {}
