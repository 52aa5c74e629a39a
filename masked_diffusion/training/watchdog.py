"""Ends a process that hangs, so that the launcher can restart the job."""

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import dist_util

HANGS = 75  # exit code: a temporary failure, in the numbers of sysexits.h
CHECKS = 20  # of the clock within the time-out


class Watchdog:
    """Ends this process where one phase of training takes longer than a time-out.

    Before that it says on which rank, in which phase and for how long, with the stacks of all threads, on stderr and in
    `rank{r}.txt` of the log directory.

    :param timeout: seconds; 0 never ends anything.
    """

    def __init__(self, timeout: float, log_dir: str | Path):
        self.timeout, self.log_dir = timeout, Path(log_dir)
        self._phase, self._since = "starting", time.monotonic()
        self._done = threading.Event()

    def phase(self, name: str) -> None:
        """Training is in another phase from now on: its time begins anew."""
        self._phase, self._since = name, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the block."""
        if not self.timeout:
            yield
            return
        self.phase(self._phase)
        self._done.clear()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(self.timeout / CHECKS):
            phase, seconds = self._phase, time.monotonic() - self._since
            if seconds > self.timeout:
                self._end(
                    f"rank {dist_util.get_rank()} on {socket.gethostname()} hangs in {phase} since {seconds:.0f} s"
                )

    def _end(self, message: str) -> None:
        main = sys._current_frames().get(threading.main_thread().ident)
        message = f"{message} (--hang_timeout {self.timeout:g}); stack of the main thread, then of all:\n"
        message += "".join(traceback.format_stack(main))
        sys.stderr.write(message)
        faulthandler.dump_traceback(sys.__stderr__)
        with suppress(OSError), Path(self.log_dir, f"rank{dist_util.get_rank()}.txt").open("a") as file:
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file)
        sys.stderr.flush()
        os._exit(HANGS)  # nothing else would end a thread that waits inside a library
