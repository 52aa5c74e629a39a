"""Ends a process that hangs, so that the launcher can restart the job."""

import faulthandler
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils import last_words

HANGS = 75  # exit code: a temporary failure, in the numbers of sysexits.h
CHECKS = 20  # of the clock within the time-out


class Watchdog:
    """Ends this process where one phase of training takes longer than a time-out.

    Before that it says on which rank, in which phase and for how long, with the stacks of all threads, on stderr and in
    the file of `last_words`.

    :param timeout: seconds; 0 never ends anything.
    """

    def __init__(self, timeout: float, log_dir: str | Path):
        self.timeout, self.log_dir = timeout, Path(log_dir)
        self._done = threading.Event()
        self.phase("starting")

    def phase(self, name: str) -> None:
        """Training is in another phase from now on: its time begins anew."""
        last_words.enter(name)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the block."""
        if not self.timeout:
            yield
            return
        self.phase("starting")
        self._done.clear()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(self.timeout / CHECKS):
            phase, seconds = last_words.current_phase()
            if seconds > self.timeout:
                self._end(f"hangs in {phase} since {seconds:.0f} s (--hang_timeout {self.timeout:g})")

    def _end(self, message: str) -> None:
        message += (
            "; where ranks wait for each other, the one that says nothing, or hangs in another phase, is the cause. "
            f"Stack of the main thread, then of all:\n{last_words.main_stack()}"
        )
        sys.stderr.write(f"{last_words.describe_rank()} {message}")
        faulthandler.dump_traceback(sys.__stderr__)
        last_words.write(self.log_dir, message, all_stacks=True)
        sys.stderr.flush()
        os._exit(HANGS)  # nothing else would end a thread that waits inside a library
