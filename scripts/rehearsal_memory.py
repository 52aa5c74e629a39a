"""The memory of this process and of all that it starts, together, as it changes."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

INTERVAL = 0.1  # seconds
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(root: int) -> int:
    """Resident memory of a process and its descendants, of Linux. Pages that several share count for each."""
    parents, pages = {}, {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with suppress(OSError):  # it has ended in between
                fields = (place / "stat").read_text().rpartition(")")[2].split()  # a name may hold spaces
                parents[int(place.name)] = int(fields[1])
                pages[int(place.name)] = int(fields[21])
    children = {}
    for process, parent in parents.items():
        children.setdefault(parent, []).append(process)
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        total += pages.get(process, 0) * PAGE
        waiting += children.get(process, [])
    return total


class MemoryWatch:
    """A context manager that looks at the memory of all processes ten times a second, stage by stage."""

    def __enter__(self) -> "MemoryWatch":
        self._stage, self._stopped, self._lock = 0, threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.start_stage()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        stage, found = self._stage, resident_bytes(os.getpid())
        with self._lock:
            if stage == self._stage:  # else it ended while this looked
                self._peak = max(self._peak, found)

    def start_stage(self) -> None:
        with self._lock:
            self._stage, self._peak, self._start = self._stage + 1, 0, time.perf_counter()

    def end_stage(self) -> tuple[float, float]:
        """Seconds since the stage began, and the peak memory in GiB."""
        self._look()
        return time.perf_counter() - self._start, self._peak / 2**30
