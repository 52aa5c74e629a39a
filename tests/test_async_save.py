"""Sharded checkpoints in the background: of their step, one at a time, never half, and bitwise the same when killed."""

import errno
import json
import os
import re
import signal
import threading
import time

import pytest
import torch
from helpers import (
    assert_same,
    fork,
    make_loop,
    tensors,
    train_flags,
    trained,
    whole_tensors,
)

from masked_diffusion.config import RunConfig
from masked_diffusion.training import saving
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import complete_steps

SHARDED = {"checkpoint_format": "sharded"}
ASYNC = SHARDED | {"async_save": True}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A run with whole checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("expected")
    trained(folder, phema="0.05")
    return folder


class Gate:
    """Lets the background write when it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.begun, self.write = threading.Event(), threading.Event(), saving.write_sharded
        monkeypatch.setattr(saving, "write_sharded", self)

    def __call__(self, *arguments):
        self.begun.set()
        assert self.open.wait(30)
        self.write(*arguments)


def test_what_is_written_is_of_its_step(expected, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    loop = make_loop(tmp_path / "run", phema="0.05", **ASYNC)
    for _ in range(2):
        loop.run_step(*next(loop.data))
    loop.save()
    with torch.no_grad():
        for tensor in (*loop.state.params, *loop.state.ema["0.9"], *loop.state.phema.averages["0.050"]):
            tensor.fill_(7)
        for entry in loop.state.opt.state.values():
            entry["exp_avg"].fill_(7)
    loop.guardian.losses.clear()
    assert gate.begun.wait(30) and complete_steps(tmp_path / "run") == []
    gate.open.set()
    loop.saver.finish()
    assert_same(whole_tensors(tmp_path / "run", 2, tmp_path / "out"), tensors(expected, 2))


def test_one_is_in_flight_and_the_log_says_who_waited(tmp_path, monkeypatch, capsys):
    gate = Gate(monkeypatch)
    loop = make_loop(tmp_path, **ASYNC)
    loop.run_step(*next(loop.data))
    loop.save()
    assert not loop.saver.has_failed()
    loop.run_step(*next(loop.data))
    threading.Timer(0.7, gate.open.set).start()
    loop.save()
    loop.saver.finish()
    assert complete_steps(tmp_path) == [1, 2]
    lines = capsys.readouterr().out.splitlines()
    first, second = (line for line in lines if "in the background" in line)
    assert "to wait for" not in first and float(re.search(r"([\d.]+) s of it to wait", second)[1]) > 0.4
    assert sum("written in" in line for line in lines) == 2


@pytest.mark.parametrize("kind", [SHARDED, ASYNC], ids=["sync", "async"])
def test_a_full_disk_ends_the_run_and_leaves_no_half(kind, tmp_path, monkeypatch):
    trained(tmp_path, max_steps=2, **kind)
    whole_fsync = os.fsync

    def full(descriptor):
        if "ema_0.99" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"ema_0\.99.* could not be written \(No space left.*the last checkpoint is intact"
    ):
        trained(tmp_path, max_steps=1000, save_interval=3, **kind)
    assert complete_steps(tmp_path) == [2] and not list(tmp_path.glob(".sharded*"))


def test_a_signal_waits_for_what_is_being_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    loop = make_loop(tmp_path, max_steps=100_000, save_interval=2, **ASYNC)

    def stop():
        assert gate.begun.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        gate.open.set()

    thread = threading.Thread(target=stop)
    thread.start()
    loop.run_loop()
    thread.join()
    assert complete_steps(tmp_path)[0] == 2 and complete_steps(tmp_path)[-1] == loop.step


def test_a_rollback_takes_what_is_being_written(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    loop = make_loop(tmp_path, rollback_on_spike=1, **ASYNC)
    for _ in range(2):
        loop.run_step(*next(loop.data))
    expected = {key: value.clone() for key, value in loop.model.state_dict().items()}
    loop.save()
    loop.run_step(*next(loop.data))
    threading.Timer(0.3, gate.open.set).start()
    loop._roll_back()
    assert loop.step == 2 and loop.state.rollbacks == 1
    assert_same(loop.model.state_dict(), expected)


def test_an_error_of_training_is_not_hidden_and_leaves_the_checkpoint(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    gate.open.set()
    loop = make_loop(tmp_path, save_interval=2, **ASYNC)
    batches = loop.data

    def breaks():
        yield next(batches)
        yield next(batches)
        raise RuntimeError("of the data")

    loop.data = breaks()
    with pytest.raises(RuntimeError, match="of the data"):
        loop.run_loop()
    assert complete_steps(tmp_path) == [2]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    loop = make_loop(tmp_path, **ASYNC)
    loop.run_step(*next(loop.data))
    with torch.no_grad():
        loop.state.params[0].view(-1)[0] = torch.nan
    with pytest.raises(UserError, match="weights of step 1 are NaN or infinite and are not saved"):
        loop.save()
    loop.saver.finish()
    assert complete_steps(tmp_path) == []


def test_whole_files_are_not_written_in_the_background():
    with pytest.raises(UserError, match=r"--async_save True works with --checkpoint_format sharded only"):
        RunConfig().replaced(async_save=True).check()


# ---------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("ranks, shard", [(1, "none"), (2, "fsdp")])
def test_a_killed_run_is_bitwise_the_same(images, tmp_path, ranks, shard):
    options = {"optimizer": "adan", "max_steps": 40, "save_interval": 2, "keep": 2, "shard": shard} | ASYNC
    options |= {"batch_size": 8 // ranks}
    for kind, kills in (("expected", 0), ("killed", 6)):
        flags = train_flags(images, tmp_path / kind, **options)
        fork("image_train.py", flags, kills=kills, first=0.3, last=2.5, ranks=ranks)
    assert (tmp_path / "killed" / "log.txt").read_text().count("starting at") > 3
    ours, theirs = (whole_tensors(tmp_path / kind, 40, tmp_path / f"{kind}_out") for kind in ("killed", "expected"))
    assert_same(ours, theirs)
    rows = [
        [json.loads(line)["loss"] for line in (tmp_path / kind / "progress.jsonl").read_text().splitlines()]
        for kind in ("killed", "expected")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 40
    assert complete_steps(tmp_path / "killed") == [38, 40] and not list((tmp_path / "killed").glob(".sharded*"))
