"""The shell scripts and mpiexec, for real, with CPU processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, train_flags

from masked_diffusion.weights.checkpoint import complete_steps


def environment(folder, data, **settings):
    """The settings of a small run, and nothing of the caller's own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = {"MODEL": "MDTv2_Nano_2", "IMAGE_SIZE": 8, "DECODE_LAYER": 2, "BATCH_SIZE": 4, "VAE": "identity"}
    settings = {"DATA_DIR": data, "OPENAI_LOGDIR": folder, "OMP_NUM_THREADS": 1, "PATH": path} | small | settings
    return {**os.environ, **{key: str(value) for key, value in settings.items()}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_run_sh_trains(images, tmp_path):
    command = [REPO / "run.sh", "--max_steps=2", "--ema_rate=0.9"]
    result = subprocess.run(
        command, env=environment(tmp_path, images, NUM_GPUS=2), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "torchrun --standalone --nproc_per_node=2" in result.stdout and "--lr 5e-4" in result.stdout
    assert complete_steps(tmp_path) == [2]


@pytest.mark.parametrize("script", ["run.sh", "run_ddp_master.sh", "run_ddp_worker.sh", "run_sample.sh"])
def test_missing_settings_are_named(script, tmp_path):
    env = {"PATH": os.environ["PATH"]}
    result = subprocess.run([REPO / script], env=env, capture_output=True, text=True)
    assert result.returncode != 0 and "set " in result.stderr
    result = subprocess.run(["bash", "-n", REPO / script])
    assert result.returncode == 0


def test_run_sample_sh_draws_two_rounds_and_goes_on(checkpoint, tmp_path):
    env = environment(
        tmp_path, "", REFERENCE="", MODEL_PATH=checkpoint, OUT=tmp_path, NUM_GPUS=1, NUM_SAMPLES=5, NUM_SAMPLING_STEPS=2
    )
    for said in ("wrote", "nothing to draw"):
        result = subprocess.run([REPO / "run_sample.sh"], env=env, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0 and result.stdout.count(said) == 2, result.stderr
    assert "--cfg_cond True --cfg_scale 3.8 --scale_pow 4.0" in result.stdout and "--cfg_cond False" in result.stdout
    for folder in ("guided", "unguided"):
        assert (tmp_path / folder / "samples_5x8x8x3.npz").exists()


@pytest.mark.slow
def test_two_nodes_train_together_and_survive_a_killed_worker(images, tmp_path):
    nodes, port = [], free_port()
    for rank, script in enumerate(("run_ddp_master.sh", "run_ddp_worker.sh")):
        env = environment(
            tmp_path, images, NODE_RANK=rank, NUM_NODES=2, NUM_GPUS=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            LOCAL_ADDR="127.0.0.1",
        )  # fmt: skip
        command = [REPO / script, "--max_steps=400", "--save_interval=10", "--keep=2", "--log_interval=1"]
        nodes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    deadline = time.time() + 120
    while not complete_steps(tmp_path):
        time.sleep(0.1)
        assert time.time() < deadline and all(node.poll() is None for node in nodes)
    worker = subprocess.run(["pgrep", "-P", str(nodes[1].pid)], capture_output=True, text=True).stdout.split()[-1]
    subprocess.run(["kill", "-9", worker], check=True)
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("starting at step") == 2 and "starting at step 0, fresh weights" in log
    assert complete_steps(tmp_path)[-1] == 400


def test_mpiexec_starts_ranks(images, tmp_path):
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec here")
    flags = train_flags(images, tmp_path, batch_size=4, max_steps=2)
    command = [mpiexec, "-n", "2", sys.executable, REPO / "scripts" / "image_train.py", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "global batch 8" in result.stdout and result.stdout.count("step 2/2") == 1
