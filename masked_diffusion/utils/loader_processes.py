"""Data loading processes: which signals end them, and how their errors reach the training process."""

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
_abandoned: list[Any] = []  # torch's iterators, which have no effect when they are freed as the interpreter ends
OTHER_CAUSE = "run with --num_workers 0 to see the cause, or lower --num_workers if memory is short"


class LoaderWorkerDied(UserError):
    """A data loading process was killed or has exited. Raised between steps, when a checkpoint can be saved."""


def init_loader_process(worker_id: int) -> None:
    """Let a data loading process live exactly as long as the training process (`worker_init_fn` of DataLoader).

    Schedulers (before the time limit) and terminals (at Ctrl-C) send a signal to the whole process group. The training
    process then finishes its step and saves a checkpoint, and needs its data loading processes until that is done.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "linux":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
        return
    # Without this, a data loading process whose parent was killed would wait on a full pipe for ever.
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    # SIGTERM cannot simply be ignored: multiprocessing ends its children with it and waits until they have ended.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_parents_sigterm, daemon=True).start()


def _end_on_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class LoaderIterator:
    """Iterates over a `DataLoader`. Errors in its processes are raised by `next()`, as one sentence.

    :raises LoaderWorkerDied: when a data loading process was killed or has exited.
    :raises UserError: when a data loading process raised one. The message is the same; torch's error, which has the
        traceback of that process, is its cause.
    """

    def __init__(self, loader: DataLoader) -> None:
        # The processes inherit the blocked signals, so that none ends them before `init_loader_process` has run.
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
            # Remove the frames: they refer to the loader in a reference cycle. If the garbage collector has to free
            # it, its processes are not told to end, and torch waits 5 s for each of them.
            raise type(error)(sentence.strip()) from error.with_traceback(None)
        except RuntimeError as error:
            sentence = _explain_death(str(error))
            if sentence is None:
                raise
            self._abandon()
            raise LoaderWorkerDied(sentence) from error.with_traceback(None)

    def _abandon(self) -> None:
        """End the other processes, and keep torch from ending them in its own way.

        torch first takes a lock that the processes share. One that was killed may have held it: this process would
        wait for it for ever.
        """
        for process in self._batches._workers:
            process.kill()
        _abandoned.append(self._batches)


def _explain_death(message: str) -> str | None:
    """Turn torch's message about a dead data loading process into one sentence; None for any other message."""
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)\.)?", message)
    if not found:
        return None
    pids, name = found.groups()
    code = re.search(r"exit code (\d+)", message)
    how = f"was killed by a signal ({name})" if name else "ended" + (f" with exit code {code[1]}" if code else "")
    return f"data loading process {pids} {how}: {CAUSES.get(name, OTHER_CAUSE)}"


class _Deaths:
    """Delays torch's error about a dead data loading process until the next batch is requested.

    torch raises this error from its SIGCHLD handler, wherever the main thread is. In the middle of an optimizer step
    it would leave some weights updated and others not.
    """

    def __init__(self) -> None:
        self.torch_handler, self.waiting, self.pending = None, False, False

    def hold_back(self) -> None:
        """Install our handler in front of torch's, which exists once the first data loading processes are started."""
        handler = signal.getsignal(signal.SIGCHLD)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and callable(handler) and handler != self.handle:
            self.torch_handler = handler
            signal.signal(signal.SIGCHLD, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        """The SIGCHLD handler: call torch's handler now if a batch is awaited, else later."""
        self.pending = True
        if self.waiting:
            self.pass_on(number, frame)

    def pass_on(self, number: int, frame: Any) -> None:
        """Call torch's handler, which raises if a data loading process has died."""
        self.pending = False
        self.torch_handler(number, frame)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within the block, errors are raised at once, those that were delayed before the block included."""
        self.waiting = True
        try:
            if self.pending:
                self.pass_on(signal.SIGCHLD, None)
            yield
        finally:
            self.waiting = False


_deaths = _Deaths()
