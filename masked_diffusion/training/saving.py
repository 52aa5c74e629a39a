"""When checkpoints are written: while training waits, or while it goes on."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .. import dist_util, logger
from ..config import LogConfig
from ..weights.checkpoint import prune_checkpoints, sharded_name
from ..weights.sharded import Part, Section
from ..weights.sharded_writer import write_sharded
from .sharded import small_state, state_sections
from .state import TrainState


class Saver:
    """Writes checkpoints as the published files, while training waits.

    :param folder: the log directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: TrainState, keep: int) -> None:
        """Write a checkpoint and prune the older ones. All ranks call it together.

        :param keep: see `prune_checkpoints`.
        :raises UserError: on all ranks, when one could not write.
        """
        began = time.perf_counter()
        state.save(self.folder)
        dist_util.run_on_main(prune_checkpoints, self.folder, keep)
        logger.log(f"saved {state.model_path(self.folder)}: training stood still for {_seconds(began)}")

    def before_update(self) -> None:
        """Called before the state changes: copies of it that are on their way must be complete by then."""

    def has_failed(self) -> bool:
        """Whether a checkpoint that was being written could not be: `finish` raises why."""
        return False

    def finish(self) -> None:
        """Wait until nothing is being written any more.

        :raises UserError: on all ranks, when one could not write.
        """

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """`finish` at the end of a block. When the block fails, its error counts; a second Ctrl-C does not wait."""
        try:
            yield
        except Exception:
            with suppress(Exception):
                self.finish()
            raise
        self.finish()


class ShardedSaver(Saver):
    """Writes sharded checkpoints. All ranks create it together.

    :param in_background: write copies in host memory while training goes on. They keep their memory until the end.
    """

    def __init__(self, folder: Path, device: torch.device, in_background: bool) -> None:
        super().__init__(folder)
        self.group = dist_util.new_host_group()  # which training never uses: both may be busy at a time
        self.copies = HostCopies(device) if in_background else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, keep: int) -> None:
        began = time.perf_counter()
        state.check_finite()
        sections = state_sections(state)
        small, step, path = small_state(state), state.step, self.folder / sharded_name(state.step)
        if self.copies is None:
            write_sharded(self.folder, step, sections, small, self.group, keep)
            logger.log(f"saved {path}: training stood still for {_seconds(began)}")
            return
        waiting, pending = time.perf_counter(), self._thread is not None
        self.finish()
        waited = f", {_seconds(waiting)} of it to wait for the checkpoint before" if pending else ""
        copies = self.copies.copy(sections)

        def write() -> None:
            started = time.perf_counter()
            try:
                self.copies.wait()
                write_sharded(self.folder, step, copies, small, self.group, keep)
                self._done = f"saved {path}: written in {_seconds(started)}"
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name=f"writing step {step}", daemon=True)
        self._thread.start()
        logger.log(f"saving {path} in the background: training stood still for {_seconds(began)}{waited}")

    def before_update(self) -> None:
        if self.copies is not None:
            self.copies.before_update()

    def has_failed(self) -> bool:
        if self._thread is not None and not self._thread.is_alive() and self._error is None:
            self.finish()
        return self._error is not None

    def finish(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        logger.log(self._done)


class HostCopies:
    """Copies of parts in host memory, pinned for a GPU. The next copies take the same memory."""

    def __init__(self, device: torch.device) -> None:
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None

    def copy(self, sections: Mapping[str, Section]) -> dict[str, Section]:
        """Copy parts. From a GPU the copies are complete after `wait`; until `before_update` no part may change.

        What is in several sections is copied once.
        """
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        known: dict[tuple, torch.Tensor] = {}
        with torch.cuda.stream(self.stream):
            copies = {
                name: {key: part._replace(local=self._copy((name, key), part, known)) for key, part in section.items()}
                for name, section in sections.items()
            }
        if self.stream is not None:
            self._copied = self.stream.record_event()
        return copies

    def _copy(self, place: tuple[str, str], part: Part, known: dict[tuple, torch.Tensor]) -> torch.Tensor:
        local = part.local
        source = (local.data_ptr(), local.shape, local.stride(), part.dtype)
        if source not in known:
            buffer = self.buffers.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, part.dtype):
                buffer = torch.empty(local.shape, dtype=part.dtype, pin_memory=local.is_cuda)
                self.buffers[place] = buffer
            known[source] = buffer.copy_(local, non_blocking=True)
        return known[source]

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def before_update(self) -> None:
        """Let the GPU finish the copies before it does what follows. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self._copied)


def _seconds(began: float) -> str:
    return f"{time.perf_counter() - began:.2f} s"


def create_saver(config: LogConfig, folder: Path, device: torch.device) -> Saver:
    """What `--checkpoint_format` and `--async_save` ask for. All ranks call it together."""
    if config.checkpoint_format == "sharded":
        return ShardedSaver(folder, device, config.async_save)
    return Saver(folder)
