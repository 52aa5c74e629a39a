"""How a script ends: one sentence for what the user can mend, a traceback for a fault of the program."""

import gc
import os
import subprocess
import sys

import pytest
from helpers import REPO, run_train, train_flags

from masked_diffusion import dist_util, logger, script_util
from masked_diffusion.utils.errors import UserError


def end(error, monkeypatch, tmp_path):
    """The exit code of a script whose `main` raises."""

    def main():
        logger.configure(str(tmp_path / "log"))
        raise error

    with pytest.raises(SystemExit) as stop:
        script_util.run(main)
    return stop.value.code


def test_what_the_user_can_mend_is_one_sentence(monkeypatch, tmp_path, capsys):
    assert end(UserError("--lr is fast: it must be a number"), monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err == "error: --lr is fast: it must be a number\n"
    assert "Traceback" in (tmp_path / "log" / "log.txt").read_text()
    assert end(UserError(""), monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err == "error: UserError\n"


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, AssertionError])
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, tmp_path, kind):
    with pytest.raises(kind, match="ours"):
        end(kind("ours"), monkeypatch, tmp_path)
    assert "ours" in (tmp_path / "log" / "log.txt").read_text()


def test_ctrl_c_ends_without_a_traceback(monkeypatch, tmp_path, capsys):
    assert end(KeyboardInterrupt(), monkeypatch, tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_before_the_ranks_meet_rank_0_speaks_for_all(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "1")
    assert end(UserError("wrong"), monkeypatch, tmp_path) == 2
    assert capsys.readouterr().err == ""


def test_torchrun_does_not_start_again_what_the_user_must_mend(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command += [REPO / "scripts" / "image_train.py", "--lr", "nan", "--log_dir", tmp_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode != 0
    assert result.stderr.count("error: --lr is nan: it must be finite and above 0") == 1, result.stderr


def test_restarts_are_ended_only_where_torchrun_would_restart(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    dist_util.end_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    dist_util.end_restarts()  # the parent is pytest's, not torchrun
    assert killed == []


def test_a_script_ends_without_a_search_for_cycles(monkeypatch):
    at_exit = []
    monkeypatch.setattr(script_util.atexit, "register", at_exit.append)
    script_util.run(lambda: None)
    assert at_exit == [gc.freeze]


# ---------------------------------------------------------------- the order of checks


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"model": "MDTv2_Huge_2"}, "no model is called 'MDTv2_Huge_2': the nearest are"),
        ({"data_dir": ""}, "--data_dir"),
        ({"data_dir": "nowhere"}, "--data_dir nowhere is not a folder"),
        ({"latent_dir": "nowhere", "data_dir": ""}, "nowhere"),
    ],
    ids=str,
)
def test_cheap_mistakes_are_named_before_the_vae_is_fetched(images, tmp_path, monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_train(monkeypatch, train_flags(images, tmp_path, **{"vae": tmp_path / "no_vae"} | flags))
    error = capsys.readouterr().err
    assert message in error and "no VAE" not in error and error.count("\n") == 1


def test_a_log_dir_that_cannot_be_made_is_named(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, train_flags(images, tmp_path / "file" / "log"))
    assert stop.value.code == 2 and str(tmp_path / "file" / "log") in capsys.readouterr().err
