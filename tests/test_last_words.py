"""What dying ranks leave behind, and how the others and the launcher get to know."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import REPO, pack, run_train, train_flags, write_images

from masked_diffusion import dist_util, image_datasets, logger, script_util
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.utils import last_words
from masked_diffusion.utils.errors import UserError
from masked_diffusion.weights.checkpoint import complete_steps

# ---------------------------------------------------------------- exceptions


def die(error, rank, tmp_path, monkeypatch):
    """A script fails as some rank. Returns its exit code and the files it leaves."""
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(last_words, "_phase", "saving step 4")

    def main():
        logger.configure(str(tmp_path / "log"), quiet=rank != 0)
        (tmp_path / "log").mkdir(exist_ok=True)
        raise error

    code = 1
    try:
        script_util.run(main)
    except SystemExit as stop:
        code = stop.code
    except type(error):
        pass
    return code, {path.name: path.read_text() for path in (tmp_path / "log").iterdir()}


@pytest.mark.parametrize("rank, name", [(0, "log.txt"), (3, "rank3.txt")])
@pytest.mark.parametrize(
    "error, code", [(UserError("--lr is 0"), 2), (MemoryError("no memory"), 1), (KeyError("a bug"), 1)], ids=repr
)
def test_every_rank_writes_its_error_down(error, code, rank, name, tmp_path, monkeypatch):
    ended, files = die(error, rank, tmp_path, monkeypatch)
    assert ended == code and files.keys() == {name}
    assert re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d rank {rank} on \S+, saving step 4: Traceback", files[name])
    assert str(error) in files[name].splitlines()[-1]


def test_what_another_rank_has_said_is_not_repeated(tmp_path, monkeypatch):
    for failure in ((True, "wrong"), (False, "a bug")):
        with pytest.raises((UserError, RuntimeError)) as caught:
            dist_util._raise_failure(failure)
        assert die(caught.value, 3, tmp_path, monkeypatch)[1] == {}


def test_a_lost_peer_is_one_sentence_and_a_traceback_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dist_util.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist_util, "is_first", lambda key: True)
    monkeypatch.setattr(dist_util, "cleanup", lambda: None)
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    code, files = die(lost, 3, tmp_path, monkeypatch)
    assert code == 1 and "Traceback" in files["rank3.txt"] and "pair.cc" in files["rank3.txt"]
    error = capsys.readouterr().err
    assert error.startswith("error: rank 3 on ") and "another rank has ended" in error and error.count("\n") == 1


def test_a_disk_that_refuses_hides_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(last_words, "path", lambda log_dir: tmp_path / "nowhere" / "log.txt")
    assert die(UserError("--lr is 0"), 0, tmp_path, monkeypatch)[0] == 2
    assert capsys.readouterr().err == "error: --lr is 0\n"


# ---------------------------------------------------------------- signals


def die_in_a_fork(log_dir, do, monkeypatch):
    """What a process ends with that calls a function within `of_signals`, as rank 2."""
    monkeypatch.setattr(dist_util, "get_rank", lambda: 2)
    monkeypatch.setattr(last_words, "_phase", "step 7")
    child = os.fork()
    if not child:
        try:
            with last_words.of_signals(log_dir):
                do()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_leaves_stacks(number, tmp_path, monkeypatch):
    assert die_in_a_fork(tmp_path, lambda: os.kill(os.getpid(), number), monkeypatch) == -number
    text = (tmp_path / "rank2.txt").read_text()
    assert text.startswith("Fatal Python error: ") and "in die_in_a_fork" in text


def test_sigterm_is_written_down_even_where_the_main_thread_hangs(tmp_path, monkeypatch):
    def hang():
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        time.sleep(60)

    assert die_in_a_fork(tmp_path, hang, monkeypatch) == -signal.SIGTERM
    text = (tmp_path / "rank2.txt").read_text()
    assert (
        "rank 2 on " in text and ", step 7: ended by SIGTERM; stack of the main thread:" in text and "in hang" in text
    )


def test_a_child_that_gets_sigterm_does_not_end_its_parent(tmp_path, monkeypatch):
    def fork_and_kill():
        for _ in range(20):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(1)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.5)
        os._exit(7)

    assert die_in_a_fork(tmp_path, fork_and_kill, monkeypatch) == 7


def test_there_is_no_file_without_words(tmp_path, monkeypatch):
    assert die_in_a_fork(tmp_path, lambda: None, monkeypatch) == 0 and list(tmp_path.iterdir()) == []
    before = signal.getsignal(signal.SIGTERM)
    with last_words.of_signals(tmp_path / "nowhere"):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------- data that is gone


def train_until_the_data_are_spoilt(spoil, data, log_dir, monkeypatch, **flags):
    """Train, and spoil the data after the second step."""
    run_step = TrainLoop.run_step

    def spoiling(self, *batch):
        run_step(self, *batch)
        if self.step == 2:
            spoil()

    monkeypatch.setattr(TrainLoop, "run_step", spoiling)
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, train_flags(data, log_dir, max_steps=1000, batch_size=4, **flags))
    return stop.value.code


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_that_vanishes_ends_in_a_sentence_and_a_checkpoint(
    tmp_path, monkeypatch, capsys, on_bad_image, num_workers
):
    data = tmp_path / "data"
    write_images(data, [f"{'abc'[i % 3]}_{i}.png" for i in range(12)], size=(8, 8))
    monkeypatch.setattr(image_datasets, "MOST_SKIPPED", 3)
    flags = {"on_bad_image": on_bad_image, "num_workers": num_workers}
    assert train_until_the_data_are_spoilt(lambda: shutil.rmtree(data), data, tmp_path, monkeypatch, **flags) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    said = f"its folder is gone: put or mount {data} again" if on_bad_image == "error" else "and the 2 images after it"
    assert said in error
    (step,) = complete_steps(tmp_path)
    assert step >= 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_truncated_in_mid_run_is_named_and_a_checkpoint_saved(
    tmp_path, monkeypatch, capsys, num_workers
):
    write_images(tmp_path / "data", [f"{'abc'[i % 3]}_{i}.png" for i in range(12)], size=(8, 8))
    out = pack(tmp_path / "data", tmp_path / "packed")
    shard = tmp_path / "packed" / "images-000001.tar"
    code = train_until_the_data_are_spoilt(
        lambda: os.truncate(shard, 600), out, tmp_path / "log", monkeypatch, num_workers=num_workers
    )
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"(in {shard.name}) is damaged" in error
    (step,) = complete_steps(tmp_path / "log")
    assert step >= 2


# ---------------------------------------------------------------- two ranks, one with a fault


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """For each fault: what the ranks ended with, what they printed, and the text files in the log directory."""
    folder = tmp_path_factory.mktemp("lives")
    images = folder / "images"
    write_images(images, [f"{'abc'[i % 3]}_{i}.png" for i in range(24)], size=(8, 8))
    flags = train_flags(images, "-", batch_size=2, max_steps=6, save_interval=4, hang_timeout=6)
    command = [sys.executable, REPO / "tests" / "fault_ranks.py", folder, *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return {
        path.parent.name: (
            json.loads(path.read_text()),
            (path.parent / "stderr").read_text(),
            {file.name: file.read_text() for file in path.parent.glob("*.txt")},
        )
        for path in folder.glob("*/codes.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name, error", [("bug-1", "ValueError: a bug"), ("memory-1", "MemoryError: no memory")])
def test_a_rank_that_fails_is_heard_of_once(lives, name, error):
    codes, printed, files = lives[name]
    assert codes == [1, 1] and printed.count("Traceback") == 1 and printed.count("error: ") == 1
    assert "error: rank 0 on " in printed and "because another rank has ended" in printed
    assert re.search(rf"rank 1 on \S+, step 2: Traceback[\s\S]*{error}\n$", files["rank1.txt"])
    assert re.search(r"rank 0 on \S+, [^\n]*: Traceback[\s\S]*peer", files["log.txt"])


@pytest.mark.slow
def test_a_rank_that_crashes_leaves_its_stacks(lives):
    codes, printed, files = lives["crash-1"]
    assert codes == [1, -signal.SIGSEGV] and "because another rank has ended" in printed
    assert files["rank1.txt"].startswith("Fatal Python error: Segmentation fault") and "run_step" in files["rank1.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_ranks_that_wait_for_a_stopped_one_end_the_job(lives, stopped):
    codes, printed, files = lives[f"stopped-{stopped}"]
    other = 1 - stopped
    assert codes[other] == 75 and codes[stopped] == -signal.SIGKILL
    said = rf"rank {other} on \S+ hangs in [^\n]*step 2[^\n]* since \d+ s \(--hang_timeout 6\)"
    assert re.search(said, printed) and "Thread 0x" in files[f"rank{other}.txt" if other else "log.txt"]
    assert f"rank {stopped} on" not in printed, "who says nothing is the cause"


@pytest.mark.slow
def test_a_loader_that_never_returns_ends_the_job(lives):
    codes, printed, files = lives["stuck-1"]
    assert codes[1] == 75 and codes[0] in (1, 75)
    assert re.search(r"hangs in loading the data of step 2 since \d+ s", files["rank1.txt"])
    assert re.search(r"rank 0 on \S+, waiting for the other ranks before step 2: ", files["log.txt"])
    assert "rank 1 on " in printed and "Thread 0x" in files["rank1.txt"]


@pytest.mark.slow
def test_a_full_disk_of_rank_0_ends_all_in_one_sentence(lives):
    codes, printed, files = lives["full-0"]
    assert codes == [2, 2] and printed.count("error: ") == 1 and "Traceback" not in printed
    assert re.search(r"error: \S+000004\.pt could not be written \(No space left on device\): free some disk", printed)
    assert "rank1.txt" not in files


@pytest.mark.slow
def test_a_full_disk_of_another_rank_stops_nothing(lives):
    codes, printed, _ = lives["full-1"]
    assert codes == [0, 0] and "error" not in printed
    codes, printed, files = lives["full-bug-1"]
    assert codes == [1, 1] and printed.count("ValueError: a bug") == 1 and files.get("rank1.txt", "") == ""
