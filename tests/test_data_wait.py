"""Waiting for data: measured, and said with the flags that would help."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import make_loop, stream

from masked_diffusion import dist_util
from masked_diffusion.config import RunConfig
from masked_diffusion.training import data_wait, metrics
from masked_diffusion.training.data_wait import DataWait, advise, share_of_large_jpegs

WAITS = r"rank 0 waits for data in (\d+) % of the time: loading gives (\S+) images/s, its device takes ([^;]+); (.+)"


def train(log_dir, monkeypatch, waits, **flags):
    """Train with a loader that takes some seconds for each batch, and steps of 0.1 s. Returns the log and the rows."""
    now = 0.0
    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr(data_wait, "time", clock)
    monkeypatch.setattr(metrics, "time", clock)
    loop = make_loop(log_dir, max_steps=12, log_interval=4, save_interval=100, **flags)

    def load():
        nonlocal now
        for item, seconds in zip(stream(0, 0), waits):  # noqa: B905
            now += seconds
            yield item

    def step(*batch, run_step=loop.run_step):
        nonlocal now
        run_step(*batch)
        now += 0.1

    loop.data, loop.run_step = load(), step
    loop.run_loop()
    rows = [json.loads(line) for line in (log_dir / "progress.jsonl").read_text().splitlines()]
    return (log_dir / "log.txt").read_text(), [row["data_wait"] for row in rows]


# 8 images in 0.2 s; with processes of its own, loading goes on during the step.
@pytest.mark.parametrize("num_workers, gives", [(0, 40), (2, 32)])
def test_a_slow_loader_is_said_once_with_figures(tmp_path, monkeypatch, num_workers, gives):
    log, shares = train(tmp_path, monkeypatch, [0.2] * 12, num_workers=num_workers)
    (said,) = re.findall(WAITS, log)
    assert said[:3] == ("60", str(gives), "80") and shares == pytest.approx([0.6, 2 / 3, 2 / 3])
    assert log.index("waits for data") < log.index("step 4/12"), "when it begins"
    assert f"--num_workers from {num_workers} to" in said[3] or "no flag helps" in said[3]


def test_a_fast_loader_is_not_mentioned(tmp_path, monkeypatch):
    log, shares = train(tmp_path, monkeypatch, [0.01] * 12)
    assert "waits for data" not in log and shares == pytest.approx([0.03 / 0.43, 1 / 11, 1 / 11])


def test_the_start_of_the_loader_is_no_waiting(tmp_path, monkeypatch):
    log, shares = train(tmp_path, monkeypatch, [60.0] + [0.001] * 11)
    assert "waits for data" not in log and max(shares) < 0.01


def test_the_slowest_rank_is_named_and_the_line_is_repeated_after_hours(tmp_path, monkeypatch, capsys):
    config = RunConfig().replaced(batch_size=10, num_workers=3)
    wait, now = DataWait(config, ()), 100.0
    monkeypatch.setattr(data_wait.time, "monotonic", lambda: now)
    monkeypatch.setattr(data_wait, "cores_per_rank", lambda: 8)
    assert wait.report([0.1, 6.0, 0.2], 10.0, 20) == 0.6
    expected = "rank 1 waits for data in 60 % of the time: loading gives 20 images/s, its device takes 50; raise "
    assert expected + "--num_workers from 3 to 8 (this rank has 8 cores)" in capsys.readouterr().out
    for now, lines in ((200.0, 0), (100.0 + data_wait.QUIET_SECONDS, 0), (101.0 + data_wait.QUIET_SECONDS, 1)):  # noqa: B007
        wait.report([0.1, 6.0, 0.2], 10.0, 20)
        assert capsys.readouterr().out.count("waits for data") == lines
    assert wait.report([0.1, 0.2, 0.0], 10.0, 20) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "flags, names, expected",
    [
        ({}, ["a.jpg"], ["num_workers from 4 to 8", "fast_decode True, for the JPEGs of at least 512", "latent_dir"]),
        ({"random_crop": True}, ["a.JPEG"], ["num_workers", "at least 640 pixels"]),
        ({}, ["a.png"] * 20 + ["a.jpg"], ["num_workers", "latent_dir"]),
        ({"fast_decode": True}, ["a.jpg"], ["num_workers", "latent_dir"]),
        ({"vae": "identity", "fast_decode": True}, ["a.jpg"], ["num_workers"]),
        ({"latent_dir": "cache"}, ["a.jpg"], ["num_workers"]),
        ({"latent_dir": "cache", "num_workers": 16}, ["a.jpg"], ["no flag helps, all 16 cores"]),
    ],
)
def test_only_what_applies_is_advised(monkeypatch, flags, names, expected):
    monkeypatch.setattr(data_wait, "cores_per_rank", lambda: 16)
    advice = advise(RunConfig().replaced(**flags), names, gives=100, takes=200)
    assert len(advice) == len(expected) and all(a in b for a, b in zip(expected, advice, strict=True)), advice


def test_no_more_processes_are_advised_than_there_are_cores(monkeypatch):
    monkeypatch.setattr(data_wait, "cores_per_rank", lambda: 6)
    assert "from 4 to 6 (this rank has 6 cores)" in advise(RunConfig(), (), gives=1, takes=1000)[0]
    monkeypatch.setattr(data_wait, "cores_per_rank", lambda: 4)
    assert "num_workers" not in advise(RunConfig(), (), gives=1, takes=1000)[0]


def test_cores_are_shared_by_the_ranks_of_a_node(monkeypatch):
    monkeypatch.setattr(data_wait.os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert data_wait.cores_per_rank() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert data_wait.cores_per_rank() == 12


def test_known_sizes_decide_whether_fast_decoding_helps():
    class Sized(list):
        def sizes(self):
            return np.array([[500, 375], [1024, 768], [600, 513], [511, 2000]])

    names = Sized(["a.jpg", "b.jpg", "c.png", "d.jpg"])
    assert share_of_large_jpegs(names, 512) == 0.25
    assert share_of_large_jpegs(list(names), 512) == 0.75 and share_of_large_jpegs((), 512) == 0
