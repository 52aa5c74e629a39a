"""docs/tour.ipynb runs from its first cell to its last."""

import re

import pytest
from helpers import REPO

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


def outputs_of(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def test_what_the_notebook_shows_was_run_in_full():
    notebook = nbformat.read(REPO / "docs" / "tour.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len([output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]) == 4
    report = dict(line.split(": ") for line in outputs_of(code[-1]).splitlines())
    assert float(report["class_accuracy"]) > 0.9
    for cell in code:
        assert not re.search(r"(^|[\s=])/\w", outputs_of(cell))  # no path of the machine that ran it


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "20")
    monkeypatch.setenv("TOUR_OUT", str(tmp_path / "out"))
    notebook = nbformat.read(REPO / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(REPO / "docs")}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # loss, drawn, guided, inpainted
    steps, report = (outputs_of(cell) for cell in code[-2:])
    assert steps.count("masked pass") == 10 and "step 9: full pass " in steps
    assert "\nclass_accuracy: 0." in report and "frechet_pixels_real: " in report
