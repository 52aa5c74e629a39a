"""What a process leaves behind when it dies: in `log.txt` if it is rank 0, else in `rank{r}.txt` beside it.

The files of the other ranks exist only where there is something to read.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import dist_util

_phase: str | None = None
_since = time.monotonic()


def enter(phase: str) -> None:
    """The process is in another phase of its work from now on."""
    global _phase, _since
    _phase, _since = phase, time.monotonic()


def current_phase() -> tuple[str | None, float]:
    """The phase that `enter` named last, and for how many seconds it has lasted."""
    return _phase, time.monotonic() - _since


def describe_rank() -> str:
    """The rank of this process and the name of its machine."""
    return f"rank {dist_util.get_rank()} on {socket.gethostname()}"


def path(log_dir: str | Path) -> Path:
    """The file for this rank's last words."""
    rank = dist_util.get_rank()
    return Path(log_dir, f"rank{rank}.txt" if rank else "log.txt")


def write(log_dir: str | Path | None, text: str, all_stacks: bool = False) -> None:
    """Append to this rank's file, with time, rank, host and phase. A disk that refuses is ignored: the process dies.

    :param log_dir: None: nothing is written.
    :param all_stacks: add the stacks of all threads.
    """
    if log_dir is None:
        return
    phase = f", {_phase}" if _phase else ""
    with suppress(OSError), path(log_dir).open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {describe_rank()}{phase}: {text.rstrip()}\n")
        file.flush()
        if all_stacks:
            faulthandler.dump_traceback(file)


def main_stack() -> str:
    """The stack of the main thread."""
    return "".join(traceback.format_stack(sys._current_frames().get(threading.main_thread().ident)))


# ---------------------------------------------------------------- signals


@contextmanager
def of_signals(log_dir: str | Path) -> Iterator[None]:
    """Within the block, a signal that ends the process leaves stacks in its file.

    A crash (SIGSEGV, SIGBUS, SIGABRT, ...) dumps all of them. SIGTERM, unless somebody else handles it, is written down
    with the stack of the main thread. Nothing can be written after SIGKILL.
    """
    try:
        file = path(log_dir).open("a")
    except OSError:  # the folder is not shared, or its disk can only be read: training says so in its own words
        yield
        return
    was_enabled = faulthandler.is_enabled()
    faulthandler.enable(file)
    # A handler written in Python would wait for a main thread that hangs in a library. This one does not: it writes
    # to a pipe, and a thread reads from there that the process has to end.
    receiver, sender = os.pipe()
    faulthandler.register(signal.SIGTERM, sender, all_threads=False)
    threading.Thread(target=_end_by_sigterm, args=(receiver, log_dir), name="SIGTERM", daemon=True).start()
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGTERM)
        os.close(sender)
        faulthandler.disable()
        if was_enabled:
            faulthandler.enable(sys.__stderr__)
        file.close()
        with suppress(OSError):
            if not path(log_dir).stat().st_size:
                path(log_dir).unlink()


def _end_by_sigterm(receiver: int, log_dir: str | Path) -> None:
    signaled = os.read(receiver, 1)  # nothing, when the sender is closed
    os.close(receiver)
    if signaled:
        write(log_dir, f"ended by SIGTERM; stack of the main thread:\n{main_stack()}")
        faulthandler.unregister(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


# A forked process must not tell its parent to end, not even by a signal that comes while it begins.
_before_fork = threading.local()


def _hold_sigterm() -> None:
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _release_sigterm_in_child() -> None:
    faulthandler.unregister(signal.SIGTERM)
    _release_sigterm()


os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=_release_sigterm_in_child)
