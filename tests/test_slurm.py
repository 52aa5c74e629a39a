"""run_slurm.sh, with programs that stand for Slurm's: `srun` starts every node's task on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, free_port

from masked_diffusion.weights.checkpoint import complete_steps

PROGRAMS = {
    "sbatch": 'echo "submitted from $MDT_HOME: $*"',
    "scontrol": """
        case $1 in
          show) for name in ${3//,/ }; do echo "$name"; done ;;
          requeue) echo "back in the queue: $2" ;;
        esac""",
    # Signals go on to the tasks and to all that they started, as under Slurm's cgroups.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        tasks=()
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
          SLURM_NODEID=$node setsid "$@" &
          tasks+=($!)
        done
        trap 'for task in "${tasks[@]}"; do kill -USR1 -- -"$task" || true; done 2> /dev/null' USR1
        code=0
        for task in "${tasks[@]}"; do
          status=138
          while [ "$status" = 138 ]; do wait "$task" && status=0 || status=$?; done
          ((status > code)) && code=$status
        done
        exit "$code"
        """,
}


@pytest.fixture
def slurm(tmp_path):
    """A PATH on which Slurm's programs, and what stands for them, come first."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def job(path, data, log, **settings):
    """The environment of a job of one node."""
    slurm = {"SLURM_JOB_ID": 1234, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2"}
    slurm |= {"SLURM_SUBMIT_DIR": REPO, "SLURM_GPUS_ON_NODE": 1, "MASTER_PORT": free_port(), "LOCAL_ADDR": "127.0.0.1"}
    small = {"MODEL": "MDTv2_Nano_2", "IMAGE_SIZE": 8, "DECODE_LAYER": 2, "BATCH_SIZE": 4, "VAE": "identity"}
    settings = {"PATH": path, "DATA_DIR": data, "OPENAI_LOGDIR": log, "OMP_NUM_THREADS": 1} | slurm | small | settings
    return {**os.environ, **{key: str(value) for key, value in settings.items()}}


def test_it_submits_itself(slurm, tmp_path):
    command = [REPO / "run_slurm.sh", "--keep", "2"]
    env = {"PATH": slurm, "DATA_DIR": "images"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.stdout == f"submitted from {REPO}: {REPO}/run_slurm.sh --keep 2\n", result.stderr
    result = subprocess.run(command, env={"PATH": slurm}, capture_output=True, text=True)
    assert result.returncode != 0 and "DATA_DIR: set DATA_DIR to a folder" in result.stderr
    shutil.rmtree(slurm.split(":")[0])
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "") and "error: sbatch is not on the PATH" in result.stderr


def test_a_copy_that_slurm_made_finds_the_repository(slurm, tmp_path):
    copy = tmp_path / "slurm_script"
    shutil.copy(REPO / "run_slurm.sh", copy)
    result = subprocess.run(
        [copy], env=job(slurm, "images", tmp_path, SLURM_SUBMIT_DIR=tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 2 and f"error: {tmp_path} holds no run_ddp_master.sh: submit from" in result.stderr
    torchrun = Path(slurm.split(":")[0], "torchrun")
    torchrun.write_text('#!/usr/bin/env bash\necho "node $NODE_RANK: $*"; exit "$NODE_RANK"\n')
    torchrun.chmod(0o755)
    env = job(slurm, "images", tmp_path, SLURM_JOB_NUM_NODES=2, MASTER_PORT="")
    result = subprocess.run([copy, "--keep", "2"], env=env, capture_output=True, text=True)
    ran = sorted(line for line in result.stdout.splitlines() if line.startswith("node ") and "OPENAI" not in line)
    assert result.returncode == 1, result.stderr  # the second node's
    for rank, line in enumerate(ran):
        assert line.startswith(f"node {rank}: --nnodes=2 --nproc_per_node=1 ") and line.endswith(" --keep 2")
        assert "--rdzv_id=1234 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:21234 " in line
        assert f"--rdzv_conf=is_host={1 - rank} " in line
        assert f" {REPO}/scripts/image_train.py --data_dir images" in line


def last_saved(folder):
    return max(complete_steps(folder), default=0)


@pytest.mark.slow
def test_the_signal_before_the_time_limit_saves_and_requeues(slurm, images, tmp_path):
    env = job(slurm, images, tmp_path / "log", SLURM_JOB_NUM_NODES=2)
    command = ["bash", REPO / "run_slurm.sh", "--save_interval=100000", "--log_interval=1"]
    with open(tmp_path / "output", "w") as output:
        running = subprocess.Popen([*command, "--max_steps=100000"], env=env, stdout=output, stderr=output)
        try:
            log, deadline = tmp_path / "log" / "log.txt", time.time() + 120
            while not (log.exists() and "step 3/" in log.read_text()):
                time.sleep(0.1)
                assert time.time() < deadline and running.poll() is None, (tmp_path / "output").read_text()
            running.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B:USR1 asks for
            assert running.wait(timeout=120) == 0, (tmp_path / "output").read_text()
        finally:
            running.kill()
    said = (tmp_path / "output").read_text()
    assert "saving a checkpoint, then back into the queue" in said and "back in the queue: 1234" in said
    saved = last_saved(tmp_path / "log")
    assert saved >= 3
    command.append(f"--max_steps={saved + 2}")
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and "back in the queue" not in result.stdout, result.stderr
    assert last_saved(tmp_path / "log") == saved + 2 and f"starting at step {saved}" in log.read_text()
