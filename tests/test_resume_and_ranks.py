"""Runs that are killed, stopped, spread over ranks, sharded, continued: always the same run."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import REPO, assert_same, fork, tensors, train_flags
from PIL import Image

from masked_diffusion.weights.checkpoint import complete_steps


def losses(folder):
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows])


# ---------------------------------------------------------------- killed and stopped


@pytest.mark.slow
def test_a_run_killed_20_times_is_bitwise_the_same(images, tmp_path):
    options = {"optimizer": "adan", "max_steps": 60, "save_interval": 2, "keep": 2, "ema_rate": "0.9,0.99"}
    for kind, kills in (("whole", 0), ("killed", 20)):
        fork("image_train.py", train_flags(images, tmp_path / kind, **options), kills=kills, first=0.3, last=1.5)
    log = (tmp_path / "killed" / "log.txt").read_text()
    starts = [
        int(line.split("starting at step ")[1].split(",")[0]) for line in log.splitlines() if "starting at" in line
    ]
    assert len(starts) > 8 and len(set(starts)) > 4 and starts == sorted(starts)
    ours, theirs = (tensors(tmp_path / kind, 60) for kind in ("killed", "whole"))
    assert_same(ours, theirs)
    assert np.array_equal(losses(tmp_path / "killed"), losses(tmp_path / "whole"))
    assert not list((tmp_path / "killed").glob(".*.partial")) and complete_steps(tmp_path / "killed") == [58, 60]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_0(images, tmp_path, number):
    flags = train_flags(images, tmp_path, max_steps=100_000)
    process = subprocess.Popen([sys.executable, REPO / "scripts" / "image_train.py", *flags], stdout=subprocess.PIPE)
    while not (tmp_path / "progress.jsonl").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"stopped by a signal" in out
    assert complete_steps(tmp_path) == [len(losses(tmp_path))]


def test_torchrun_restarts_go_on_from_the_checkpoint(images, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    flags = train_flags(images, tmp_path, batch_size=4, max_steps=80, save_interval=5, keep=2)
    process = subprocess.Popen(
        [sys.executable, *launch, REPO / "scripts" / "image_train.py", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
    )
    while not complete_steps(tmp_path):
        time.sleep(0.05)
        assert process.poll() is None
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-9", workers[-1]], check=True)
    assert process.wait(timeout=200) == 0
    assert "starting at step" in (tmp_path / "log.txt").read_text().split("fresh weights")[1]
    assert len(losses(tmp_path)) == 80


# ---------------------------------------------------------------- ranks and shards


@pytest.fixture(scope="module")
def one_rank(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    fork("image_train.py", train_flags(images, folder, max_steps=20))
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(images, one_rank, tmp_path, ranks):
    fork("image_train.py", train_flags(images, tmp_path, max_steps=20, batch_size=8 // ranks), ranks=ranks)
    np.testing.assert_allclose(losses(tmp_path), losses(one_rank), atol=1e-5)


def test_stopped_with_4_ranks_it_goes_on_with_2(images, one_rank, tmp_path):
    fork("image_train.py", train_flags(images, tmp_path, max_steps=9, batch_size=2), ranks=4)
    fork("image_train.py", train_flags(images, tmp_path, max_steps=20, batch_size=4), ranks=2)
    np.testing.assert_allclose(losses(tmp_path), losses(one_rank), atol=1e-5)


@pytest.mark.slow  # test_parallel.py tests the same with fewer processes
@pytest.mark.parametrize("shard, atol", [("zero1", 1e-6), ("fsdp", 1e-5)])
@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_sharding_changes_nothing(images, tmp_path, shard, atol, optimizer):
    options = {"batch_size": 4, "optimizer": optimizer, "save_interval": 3, "sample_interval": 6}
    options["diffusion_steps"] = 25
    for kind in ("none", shard):
        fork("image_train.py", train_flags(images, tmp_path / kind, max_steps=6, shard=kind, **options), ranks=2)
    ours, theirs = tensors(tmp_path / shard, 6), tensors(tmp_path / "none", 6)
    assert_same(ours, theirs, rtol=0, atol=atol)
    grids = [np.asarray(Image.open(tmp_path / kind / "grid000006.png")).astype(int) for kind in ("none", shard)]
    assert np.abs(grids[0] - grids[1]).max() <= 1
    # A checkpoint of one sharding continues under another: whole tensors, one layout.
    (tmp_path / shard / "opt000006.pt").unlink()
    fork("image_train.py", train_flags(images, tmp_path / shard, max_steps=6, **options), ranks=2)
    assert_same(tensors(tmp_path / shard, 6), theirs, rtol=0, atol=atol)
    (tmp_path / "none" / "opt000006.pt").unlink()
    fork("image_train.py", train_flags(images, tmp_path / "none", max_steps=6, shard=shard, **options), ranks=2)
    assert_same(tensors(tmp_path / "none", 6), ours, rtol=0, atol=atol)


@pytest.mark.slow
def test_16_ranks_train_save_resume_and_sample(images, tmp_path):
    kinds = {"16": {"ranks": 16}, "1": {}}
    for kind, launch in kinds.items():
        options = {"optimizer": "adan", "batch_size": 16 // launch.get("ranks", 1), "num_workers": 0}
        for steps, shard in ((3, "none"), (6, "fsdp" if launch else "none")):
            flags = train_flags(images, tmp_path / kind, max_steps=steps, shard=shard, **options)
            fork("image_train.py", flags, **launch)
        flags = {"model_path": tmp_path / kind, "log_dir": tmp_path / f"samples{kind}", "num_samples": 32}
        flags |= {"num_sampling_steps": 3, "batch_size": 2}
        fork("image_sample.py", [f"--{key}={value}" for key, value in flags.items()], **launch)
    assert "starting at step 3" in (tmp_path / "16" / "log.txt").read_text()
    np.testing.assert_allclose(losses(tmp_path / "16"), losses(tmp_path / "1"), atol=1e-5)
    assert_same(tensors(tmp_path / "16", 6), tensors(tmp_path / "1", 6), rtol=0, atol=1e-5)
    drawn = [np.load(next((tmp_path / f"samples{kind}").glob("*.npz")))["arr_0"].astype(int) for kind in kinds]
    assert drawn[0].shape == (32, 8, 8, 3) and np.abs(drawn[0] - drawn[1]).max() <= 1


def test_fsdp_needs_a_process_group(images, tmp_path):
    result = fork("image_train.py", train_flags(images, tmp_path, shard="fsdp"), check=False)
    assert result.returncode == 2 and "error: --shard fsdp needs a process group" in result.stderr


def test_split_backward_and_checkpointing_change_nothing(images, tmp_path):
    kinds = {"plain": {}, "split": {"split_backward": True}, "checkpoint": {"grad_checkpoint": True}}
    for kind, options in kinds.items():
        fork("image_train.py", train_flags(images, tmp_path / kind, batch_size=4, microbatch=2, **options), ranks=2)
    plain = torch.load(tmp_path / "plain" / "model000003.pt", weights_only=True)
    for kind in ("split", "checkpoint"):
        ours = torch.load(tmp_path / kind / "model000003.pt", weights_only=True)
        assert_same(ours, plain, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(losses(tmp_path / kind), losses(tmp_path / "plain"), rtol=1e-5)
