"""The shell scripts and mpiexec, for real, with CPU processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO, free_port, train_flags

from masked_diffusion.weights.checkpoint import complete_steps


def environment(folder, data, **settings):
    """The settings of a small run, and nothing of the caller's own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = {"MODEL": "MDTv2_Nano_2", "IMAGE_SIZE": 8, "DECODE_LAYER": 2, "BATCH_SIZE": 4, "VAE": "identity"}
    settings = {"DATA_DIR": data, "OPENAI_LOGDIR": folder, "OMP_NUM_THREADS": 1, "PATH": path} | small | settings
    return {**os.environ, **{key: str(value) for key, value in settings.items()}}


def test_run_sh_trains(images, tmp_path):
    (tmp_path / "start").symlink_to(REPO / "run.sh")
    command = [tmp_path / "start", "--max_steps=2", "--ema_rate=0.9"]
    result = subprocess.run(
        command, env=environment(tmp_path, images, NUM_GPUS=2), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "torchrun --standalone --nproc_per_node=2" in result.stdout and "--lr 0.0005" in result.stdout
    assert "preset mdtv2-s2: " in result.stdout and "--vae identity (not ema)" in result.stdout
    assert "global batch 8 per step" in result.stdout
    assert complete_steps(tmp_path) == [2]


@pytest.mark.parametrize("script", ["run.sh", "run_ddp_master.sh", "run_ddp_worker.sh", "run_sample.sh"])
def test_missing_settings_are_named(script, tmp_path):
    env = {"PATH": os.environ["PATH"]}
    result = subprocess.run([REPO / script], env=env, capture_output=True, text=True)
    setting = {"run_sample.sh": "REFERENCE", "run_ddp_worker.sh": "NODE_RANK"}.get(script, "DATA_DIR")
    assert result.returncode != 0 and f"{setting}: set {setting} to " in result.stderr
    result = subprocess.run(["bash", "-n", REPO / script])
    assert result.returncode == 0


@pytest.fixture
def programs(tmp_path):
    """A folder for PATH with what the shell scripts themselves need, and torchrun and python that only repeat."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "dirname", "readlink"):
        (folder / name).symlink_to(shutil.which(name))
    for name in ("torchrun", "python"):
        (folder / name).write_text('#!/usr/bin/env bash\necho "ran in $PWD: $*"\n')
        (folder / name).chmod(0o755)
    return folder


def run_shell(script, folder, programs, *words, **settings):
    env = {"PATH": str(programs), "OPENAI_LOGDIR": "log"} | {key: str(value) for key, value in settings.items()}
    return subprocess.run([REPO / script, *words], cwd=folder, env=env, capture_output=True, text=True)


def test_relative_paths_are_those_of_the_caller(programs, tmp_path):
    cluster = {"DATA_DIR": "images", "MASTER_ADDR": "node0", "NODE_RANK": 1}
    for script in ("run.sh", "run_ddp_master.sh", "run_ddp_worker.sh"):
        result = run_shell(script, tmp_path, programs, "--keep", "2", **cluster)
        ran = result.stdout.splitlines()[-1]
        assert ran.startswith(f"ran in {tmp_path}: ") and ran.endswith(" --keep 2"), result.stderr
        assert f" {REPO}/scripts/image_train.py --data_dir images --preset mdtv2-" in ran
    (tmp_path / "out" / "guided").mkdir(parents=True)
    result = run_shell("run_sample.sh", tmp_path, programs, REFERENCE="ref.npz", MODEL_PATH="m.pt", OUT="out")
    ran = [line for line in result.stdout.splitlines() if line.startswith(f"ran in {tmp_path}: ")]
    assert f"{REPO}/scripts/image_sample.py --log_dir out/guided --preset mdtv2-xl2-fid --model_path m.pt " in ran[0], (
        result.stderr
    )
    assert f"{REPO}/evaluations/evaluator.py ref.npz out/guided/samples_50000x*.npz" in ran[1] and len(ran) == 4


def test_flags_of_guidance_do_not_guide_the_unguided_round(programs, tmp_path):
    result = run_shell("run_sample.sh", tmp_path, programs, "--guidance", "constant", REFERENCE="")
    guided, unguided = (line for line in result.stdout.splitlines() if line.startswith("ran in "))
    assert guided.endswith("--batch_size 32 --guidance constant")
    assert unguided.endswith("--guidance constant --cfg_scale None --scale_pow None --cfg_cond False --guidance none")


def test_settings_override_the_preset(programs, tmp_path):
    result = run_shell("run.sh", tmp_path, programs, DATA_DIR="images", LR="1e-4", BATCH_SIZE=64, PRESET="dit-xl2")
    assert result.stdout.splitlines()[-1].endswith("--data_dir images --preset dit-xl2 --lr 1e-4 --batch_size 64")
    result = run_shell("run_sample.sh", tmp_path, programs, REFERENCE="", CFG_SCALE=1.5, SCALE_POW=1, SEED=3)
    guided, unguided = (line for line in result.stdout.splitlines() if line.startswith("ran in "))
    assert guided.endswith("--num_samples 50000 --batch_size 32 --seed 3 --cfg_scale 1.5 --scale_pow 1")
    assert "--seed 3" in unguided and "1.5" not in unguided


def test_a_missing_torchrun_is_said(programs, tmp_path):
    (programs / "torchrun").unlink()
    settings = {"DATA_DIR": "images", "MASTER_ADDR": "node0", "REFERENCE": ""}
    for script in ("run.sh", "run_ddp_master.sh", "run_sample.sh"):
        result = run_shell(script, tmp_path, programs, **settings)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr == (
            "error: torchrun is not on the PATH: activate the environment that PyTorch is installed in\n"
        )


def test_what_the_user_must_mend_is_said_once_and_not_restarted(tmp_path):
    (tmp_path / "empty").mkdir()
    env = environment(tmp_path / "log", "empty", NUM_GPUS=2, MAX_RESTARTS=3)
    result = subprocess.run([REPO / "run.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode != 0 and result.stderr.count("error: empty and its subfolders hold no image") == 1
    assert result.stderr.count("torchrun is told to end the job") == 1
    assert "restart" not in result.stderr.lower().replace("torchrun is told to end the job", "")


def test_run_sample_sh_draws_two_rounds(checkpoint, tmp_path):
    env = environment(
        tmp_path, "", REFERENCE="", MODEL_PATH=checkpoint, OUT=tmp_path, NUM_GPUS=1, NUM_SAMPLES=5, NUM_SAMPLING_STEPS=2
    )
    result = subprocess.run([REPO / "run_sample.sh"], env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and result.stdout.count("wrote") == 2, result.stderr
    for folder, rule in (("guided", "power-cosine"), ("unguided", "none")):
        with np.load(tmp_path / folder / "samples_5x8x8x3.npz", allow_pickle=False) as arrays:
            assert json.loads(str(arrays["settings"]))["guidance"]["rule"] == rule


@pytest.mark.slow
def test_two_nodes_train_together_and_survive_a_killed_worker(images, tmp_path):
    nodes, port = [], free_port()
    for rank, script in enumerate(("run_ddp_master.sh", "run_ddp_worker.sh")):
        env = environment(
            tmp_path, images, NODE_RANK=rank, NUM_NODES=2, NUM_GPUS=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            LOCAL_ADDR="127.0.0.1",
        )  # fmt: skip
        command = [REPO / script, "--max_steps=200", "--save_interval=10", "--keep=2", "--log_interval=1"]
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
    assert complete_steps(tmp_path)[-1] == 200


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


MEETING = """
import os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from masked_diffusion import dist_util
port, late = sys.argv[1:]
child = os.fork()
rank = 0 if child else 1
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
dist_util._join("gloo", timeout=timedelta(seconds=2))
if rank:  # minutes later than the others, where two seconds are a time-out
    time.sleep(3)
    if late == "never":
        os.kill(os.getpid(), signal.SIGKILL)
count = 0
def poll():
    global count
    count += 1
try:
    dist_util.add_to_count("images", 3 + rank)
    dist_util.host_barrier(None if rank else poll)
    total, word = dist_util.add_to_count("images", 0), dist_util.broadcast_object("word")
    sys.stdout.write(f"{rank} {total} {count > 5 or rank} {word}\\n")  # in one piece, also where nothing is buffered
except RuntimeError:
    print("the other rank is dead")
if child:
    os.waitpid(child, 0)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize(
    "late, said", [("late", ["0 7 True word", "1 7 1 word"]), ("never", ["the other rank is dead"])]
)
def test_ranks_wait_on_their_hosts_beyond_any_time_out(late, said):
    command = [sys.executable, "-c", MEETING, str(free_port()), late]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert sorted(result.stdout.splitlines()) == said, result.stderr
