"""A file that one process holds at a time."""

import errno
import fcntl
import os
import signal
import socket

import pytest

from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.locks import FileLock


def lock(path):
    return FileLock(path, "it is done", "wait")


def test_a_lock_names_its_holder_and_a_dead_process_leaves_none(tmp_path):
    path = tmp_path / "new" / "a.lock"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        held = lock(path)
        os.write(writing, b".")
        signal.pause()
    os.read(reading, 1)
    try:
        with pytest.raises(
            UserError, match=rf"^it is done already, by process {child} on host {socket.gethostname()}: wait$"
        ):
            lock(path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    held = lock(path)
    assert path.read_text() == f"process {os.getpid()} on host {socket.gethostname()}\n"
    with pytest.raises(UserError, match=f"by process {os.getpid()} on"):
        lock(path)
    held.release()
    held.release()
    assert not path.exists() and lock(path).is_held


def test_a_lock_is_of_the_file_that_others_see(tmp_path, monkeypatch):
    path, flock, calls = tmp_path / "a.lock", fcntl.flock, []

    def remove_first(file, how):
        calls.append(1)
        if len(calls) < 3:  # the holder of before lets go between opening and locking
            path.unlink()
            if len(calls) == 2:
                path.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    held = lock(path)
    assert held.is_held and len(calls) == 3
    with pytest.raises(UserError, match="it is done already"):
        lock(path)


def test_where_there_are_no_locks_none_is_held(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = lock(tmp_path / "a.lock"), lock(tmp_path / "a.lock")
    assert not first.is_held and not second.is_held
    first.release()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a\.lock could not be written \(Not a directory\)"):
        lock(tmp_path / "file" / "new" / "a.lock")
