"""The processes that load data: which signals they obey, and how their errors reach the training process."""

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

from .errors import UserError

GROUP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
CAUSES = {
    "Killed": "most likely the machine or the job ran out of memory: lower --num_workers, or ask for more memory",
    "Bus error": "its shared memory (/dev/shm) is full: enlarge it (docker run --shm-size), or lower --num_workers",
}
OTHER_CAUSE = "run with --num_workers 0 to see the cause, or lower --num_workers if memory is short"


class LoaderWorkerDied(UserError):
    """A loader process was killed, or ended by itself. Raised between steps: the training state is whole."""


def init_loader_process(worker_id: int) -> None:
    """Make a loader process live exactly as long as the process that reads from it (`worker_init_fn` of DataLoader).

    A signal to the whole process group, which a scheduler sends before the time limit and a terminal at Ctrl-C, is for
    the training process: it finishes its step and saves, for which the loader processes must live on.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "linux":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        return
    # Without this a loader process whose parent was killed waits for ever on a full pipe.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # SIGTERM cannot be ignored altogether: it is what multiprocessing ends its children with, and waits for.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_parents_sigterm, daemon=True).start()


def _end_on_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class LoaderIterator:
    """Iterates over a `DataLoader`; what goes wrong in its processes is raised by `next()`, as one sentence.

    :raises LoaderWorkerDied: when a loader process was killed or ended by itself.
    :raises UserError: that a loader process raised, with its own message; torch's, with the traceback, is the cause.
    """

    def __init__(self, loader: DataLoader) -> None:
        # Processes inherit the mask: a signal that comes while they start waits for `init_loader_process`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        try:
            self._batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _deaths.hold_back()

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        try:
            with _deaths.raised():
                return next(self._batches)
        except UserError as error:
            if not str(error).startswith("Caught "):  # torch's heading over the traceback of a loader process
                raise
            sentence = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", str(error), flags=re.MULTILINE)[-1]
            # Without its frames, which hold the loader in a circle of references. Left to the garbage collector, its
            # processes are not told to end, and waited for 5 s each.
            raise type(error)(sentence.strip()) from error.with_traceback(None)
        except RuntimeError as error:
            sentence = _explain_death(str(error))
            if sentence is None:
                raise
            raise LoaderWorkerDied(sentence) from error.with_traceback(None)


def _explain_death(message: str) -> str | None:
    """The sentence for torch's message about a dead loader process; None for any other message."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)\.)?", message)
    if not found:
        return None
    pids, name = found.groups()
    code = re.search(r"exit code (\d+)", message)
    how = f"was killed by a signal ({name})" if name else "ended" + (f" with exit code {code[1]}" if code else "")
    return f"loader process {pids} {how}: {CAUSES.get(name, OTHER_CAUSE)}"


class _Deaths:
    """Holds torch's news of dead loader processes back until a batch is asked for.

    torch raises them from its SIGCHLD handler, wherever the main thread is: in the middle of an optimizer step, say,
    after which the weights are no longer those of any step.
    """

    def __init__(self) -> None:
        self.torch_handler, self.waiting, self.news = None, False, False

    def hold_back(self) -> None:
        """Stand before torch's handler, if it is there: it comes with the first loader processes."""
        handler = signal.getsignal(signal.SIGCHLD)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and callable(handler) and handler != self.handle:
            self.torch_handler = handler
            signal.signal(signal.SIGCHLD, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        self.news = True
        if self.waiting:
            self.pass_on(number, frame)

    def pass_on(self, number: int, frame: Any) -> None:
        self.news = False
        self.torch_handler(number, frame)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within the block news are raised, also of what happened since the last one."""
        self.waiting = True
        try:
            if self.news:
                self.pass_on(signal.SIGCHLD, None)
            yield
        finally:
            self.waiting = False


_deaths = _Deaths()
