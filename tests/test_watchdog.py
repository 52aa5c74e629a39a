"""A step that hangs: said where, with stacks, and ended."""

import time

import pytest
from helpers import make_loop

from masked_diffusion.training import watchdog
from masked_diffusion.training.watchdog import Watchdog


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of processes that would have ended."""
    codes = []
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (codes.append(code), time.sleep(60)))
    return codes


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_a_phase_that_hangs_is_named_with_its_stacks(tmp_path, ended, capfd):
    dog = Watchdog(0.3, tmp_path)
    with dog.watching():
        dog.phase("loading data")
        assert wait_for(lambda: ended)
    text = (tmp_path / "log.txt").read_text()
    assert ended == [watchdog.HANGS] and "rank 0 on " in text and "hangs in loading data since 0 s" in text
    assert "loading data: hangs" in text and "Thread 0x" in text, "its phase, and the stacks of all threads"
    assert "wait_for" in text and "(--hang_timeout 0.3)" in text
    assert "hangs in loading data since 0 s" in capfd.readouterr().err


def test_progress_keeps_the_process_alive(tmp_path, ended):
    dog = Watchdog(0.3, tmp_path)
    with dog.watching():
        for i in range(30):
            dog.phase(f"step {i}")
            time.sleep(0.03)
    time.sleep(0.5)
    assert not ended and not (tmp_path / "log.txt").exists()


def test_no_time_out_watches_nothing(tmp_path, ended):
    with Watchdog(0, tmp_path).watching():
        time.sleep(0.1)
    assert not ended


def test_training_says_in_which_phase_it_hangs(tmp_path, ended):
    loop = make_loop(tmp_path, hang_timeout=3)
    batches = loop.data

    def stuck_at_the_third():
        yield next(batches)
        yield next(batches)
        wait_for(lambda: ended)
        yield from batches

    loop.data = stuck_at_the_third()
    loop.run_loop()
    assert ended == [watchdog.HANGS] and "hangs in loading the data of step 2" in (tmp_path / "log.txt").read_text()
