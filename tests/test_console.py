"""How a command of evaluations/ ends, on one rank and on several."""

import shutil
import signal
import subprocess
import sys

import pytest
from helpers import REPO

from evaluations import console, files, ranks
from evaluations.errors import UserError


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("rank, expected", [("0", "error: --speed is 9: it must be 1\n"), ("1", "")])
def test_what_the_user_can_mend_is_one_sentence_of_rank_0(rank, expected, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop:
        console.run(failing(UserError("--speed is 9: it must be 1")))
    assert stop.value.code == 2 and capsys.readouterr().err == expected


@pytest.mark.parametrize("error", [ValueError("shapes differ"), OSError("broken"), MemoryError()], ids=repr)
def test_a_fault_of_the_program_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)) as caught:
        console.run(failing(error))
    assert caught.value is error and capsys.readouterr().err == ""


def test_ctrl_c_ends_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        console.run(failing(KeyboardInterrupt()))
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path):
    for name in ("as_package.py", "__init__.py"):
        shutil.copy(REPO / "evaluations" / name, tmp_path)
    script = "if __spec__ is None:\n    from as_package import run_script\n\n    run_script(__file__)\n"
    (tmp_path / "evaluator.py").write_text(script + "else:\n    raise KeyboardInterrupt\n")
    result = subprocess.run([sys.executable, tmp_path / "evaluator.py"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_ctrl_c_ends_the_processes_of_all_devices(monkeypatch):
    told = []

    class Process:
        """The first is interrupted while it is waited for; the second does not hear of it."""

        def __init__(self, command, env):
            self.rank, self.waits = env["RANK"], 0

        def wait(self, timeout=None):
            self.waits += 1
            if timeout is None and self.waits == 1:
                raise KeyboardInterrupt
            if self.rank == "1" and timeout is not None:
                raise subprocess.TimeoutExpired("evaluator.py", timeout)

        def send_signal(self, number):
            told.append((self.rank, number))

        def kill(self):
            told.append((self.rank, "kill"))

    monkeypatch.setattr(ranks.subprocess, "Popen", Process)
    assert ranks.launch(2) == 130
    assert told == [("0", signal.SIGINT), ("1", signal.SIGINT), ("1", "kill")]


@pytest.mark.parametrize("rank, expected", [("0", KeyError), ("1", SystemExit)])
def test_a_fault_of_rank_0_ends_the_ranks_that_wait_for_it(rank, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(ranks, "_meet", lambda: None)
    told = []

    def broadcast(values, source):
        if rank == "0":
            told.extend(values)
        else:
            values[0] = (None, False)

    monkeypatch.setattr(ranks.dist, "broadcast_object_list", broadcast)
    with pytest.raises(expected):
        ranks.on_first(failing(KeyError("weights")))
    assert told == ([(None, False)] if rank == "0" else [])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(UserError, match=r"a\.json cannot be written \(.*No space left on device\): make room"),
        files.atomic_write(tmp_path / "a.json"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
