"""Logging on rank 0: text on the screen and in `log.txt`; values in `progress.csv`, `progress.jsonl` and trackers.

The functions are those of ADM's `logger`. Files are appended to, so a resumed run keeps what it logged before.
"""

import csv
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .utils.errors import UserError
from .utils.files import disk_errors
from .utils.not_rebuilt import module_getattr
from .utils.trackers import Tracker, check_installed, start_trackers

DEFAULT_DIR = "output"
FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # torchrun, MPICH and Intel MPI, Open MPI

__getattr__ = module_getattr(__name__)


class CSVTable:
    """A CSV file that takes rows with new columns at any time.

    For a new column the whole file is rewritten, under another name that replaces it at the end.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.columns = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.columns = next(csv.reader(file), [])

    def rewind(self, step: int) -> None:
        """Remove the rows after `step`, and a row that was only partly written."""
        if self.columns:
            rows = [row for row in self._read() if row.get("step") and None not in row.values()]
            self._rewrite([row for row in rows if int(float(row["step"])) <= step])

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row: values by their column."""
        if not set(row) <= set(self.columns):
            self._add_columns([key for key in row if key not in self.columns])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _add_columns(self, columns: list[str]) -> None:
        rows = self._read()
        self.columns += columns
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


class Logger:
    """Logs lines of text, and values that are collected in a row until `dumpkvs` writes it.

    :param dir: directory of the files; None writes no files.
    :param output_formats: some of `FORMATS`; None is all. If they are given, every row is also logged as a line of
        text, as in ADM; training gives none, and logs lines of its own.
    :param comm: ADM's MPI communicator; must be None.
    :param quiet: print and write nothing, as ranks other than 0 do.
    :param log_suffix: added to the names of the files.
    :param loggers: some of `utils.trackers.TRACKERS`, in the place of TensorBoard among the formats.
    :raises UserError: for an unknown format, a `comm`, a tracker whose package is missing, and a directory that cannot
        be created.
    """

    def __init__(
        self,
        dir: str | None = None,
        output_formats: Iterable[str] | None = None,
        comm: None = None,
        quiet: bool = False,
        log_suffix: str = "",
        loggers: Iterable[str] = ("tensorboard",),
    ):
        formats = FORMATS if output_formats is None else tuple(output_formats)
        if not set(formats) <= set(FORMATS):
            raise UserError(f"output formats {output_formats!r} are not all known: choose some of {', '.join(FORMATS)}")
        if comm is not None:
            raise UserError("the logger takes no MPI communicator (comm): average with dist_util.mean_over_ranks first")
        self.dir, self.quiet, self.log_suffix, self.level = dir, quiet, log_suffix, INFO
        self.rows_as_lines = output_formats is not None
        self.values, self.counts = defaultdict(float), defaultdict(int)
        self.table = self.resumed_step = None
        self.config: dict[str, Any] = {}
        self._trackers: list[Tracker] | None = None
        in_files = () if quiet or not dir else formats
        self.lines_path = self._path("log", "txt") if "log" in in_files else None
        self.json_path = self._path("progress", "jsonl") if "json" in in_files else None
        self.tracker_names = tuple(loggers) if "tensorboard" in in_files else ()
        self.prints = "stdout" in formats
        check_installed(loggers)
        if in_files:
            with disk_errors(dir):
                Path(dir).mkdir(parents=True, exist_ok=True)
        if "csv" in in_files:
            self.table = CSVTable(self._path("progress", "csv"))

    def _path(self, name: str, ending: str) -> Path:
        return Path(self.dir, f"{name}{self.log_suffix}.{ending}")

    def log(self, *args: object, level: int = INFO) -> None:
        """Print and write a line of text, unless its level is below that of `set_level`."""
        if self.quiet or level < self.level:
            return
        line = " ".join(map(str, args))
        if self.prints:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        if self.lines_path:
            with disk_errors(self.lines_path), self.lines_path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def set_level(self, level: int) -> None:
        """Skip lines below a level: `DEBUG`, `INFO` (the default), `WARN`, `ERROR` or `DISABLED`."""
        self.level = level

    def get_dir(self) -> str | None:
        """The log directory, or None."""
        return self.dir

    def rewind(self, step: int) -> None:
        """Remove the logged rows after `step`: a run that resumes at `step` logs them again."""
        if self.table is not None:
            with disk_errors(self.table.path):
                self.table.rewind(step)
        if self.json_path and self.json_path.exists():
            lines = [line for line in self.json_path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
            temporary = self.json_path.with_suffix(".tmp")
            with disk_errors(self.json_path):
                temporary.write_text("".join(line + "\n" for line in kept))
                temporary.replace(self.json_path)
        self.resumed_step = step

    @property
    def trackers(self) -> list[Tracker]:
        """The trackers, started at first use: importing one takes a second, and they must know `resumed_step`."""
        if self._trackers is None:
            start = (self.tracker_names, self.dir, self.log_suffix, self.resumed_step, self.config)
            self._trackers = start_trackers(*start) if self.tracker_names else []
        return self._trackers

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Give the trackers the settings of the run, by name. They are started now."""
        self.config = dict(config)
        _ = self.trackers

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add an image to the trackers: (H, W, 3) uint8 pixels."""
        for tracker in self.trackers:
            tracker.image(name, pixels, step)

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the row."""
        self.values[key], self.counts[key] = val, 1

    def logkv_mean(self, key: str, val: Any) -> None:
        """Set a value of the row to the mean of all values that were given for it."""
        count = self.counts[key]
        self.values[key] = self.values[key] * count / (count + 1) + val / (count + 1)
        self.counts[key] += 1

    def dumpkvs(self) -> dict[str, Any]:
        """Write the row, return it, and start a new one."""
        # JSON takes Python's numbers, not tensors or numpy's.
        row = {key: value.item() if hasattr(value, "item") else value for key, value in self.values.items()}
        self.values.clear()
        self.counts.clear()
        if not row or self.quiet:
            return row
        if self.rows_as_lines:
            self.log(
                ", ".join(f"{key} {value:.5g}" if _is_number(value) else f"{key} {value}" for key, value in row.items())
            )
        if self.table is not None:
            with disk_errors(self.table.path):
                self.table.write(row)
        if self.json_path:
            with disk_errors(self.json_path), self.json_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.row({key: value for key, value in row.items() if _is_number(value)}, row.get("step"))
        return row

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


_current = Logger()


def configure(
    dir: str | None = None,
    format_strs: Iterable[str] | None = None,
    comm: None = None,
    log_suffix: str = "",
    quiet: bool | None = None,
    loggers: Iterable[str] = ("tensorboard",),
) -> None:
    """Log to a directory from now on.

    :param dir: the log directory, a folder of this machine; None is the environment variable `OPENAI_LOGDIR`, or
        `output` if it is not set. Data and weights may be read from the addresses that blobfile knows (`gs://`,
        `az://`, Azure's `https://`), but logs, checkpoints and images are written to folders: mount a bucket.
    :param format_strs: some of `FORMATS`; None is those of the environment variable `OPENAI_LOG_FORMAT`, such as
        `stdout,log,csv`, or all if it is not set.
    :param comm: must be None: values are not averaged over MPI ranks.
    :param log_suffix: added to the names of the files.
    :param quiet: print and write nothing; None means on all ranks except rank 0.
    :param loggers: see `Logger`.
    :raises UserError: for a remote `dir`, and as `Logger`.
    """
    global _current
    dir = os.path.expanduser(dir or os.environ.get("OPENAI_LOGDIR") or DEFAULT_DIR)
    if "://" in dir:
        raise UserError(
            f"nothing can be written to {dir}, a remote address: data can be read from gs:// and az://, but "
            "logs, checkpoints and images need a local folder; set --log_dir (or OPENAI_LOGDIR) to one, or mount the "
            "bucket and give the path where it is mounted"
        )
    quiet = get_rank_without_mpi_import() != 0 if quiet is None else quiet
    if format_strs is None and os.environ.get("OPENAI_LOG_FORMAT"):
        format_strs = os.environ["OPENAI_LOG_FORMAT"].split(",")
    _current = Logger(dir, format_strs, comm, quiet, log_suffix, loggers)


def get_rank_without_mpi_import() -> int:
    """The rank of this process in the launcher's environment variables; 0 without a launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def reset() -> None:
    """Undo `configure`: lines are printed, and no files are written."""
    global _current
    _current.close()
    _current = Logger()


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: None = None
) -> Iterator[None]:
    """`configure` for a `with` block; after it, the logger from before the block is used again."""
    global _current
    before = _current
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        _current.close()
        _current = before


def get_current() -> Logger:
    """The `Logger` that the functions of this module use."""
    return _current


def get_dir() -> str | None:
    """The log directory, or None before `configure`."""
    return _current.dir


def log(*args: object, level: int = INFO) -> None:
    """Print and write a line of text, unless its level is below that of `set_level`."""
    _current.log(*args, level=level)


def debug(*args: object) -> None:
    """`log` with the level `DEBUG`."""
    log(*args, level=DEBUG)


def info(*args: object) -> None:
    """`log` with the level `INFO`."""
    log(*args, level=INFO)


def warn(*args: object) -> None:
    """`log` with the level `WARN`."""
    log(*args, level=WARN)


def error(*args: object) -> None:
    """`log` with the level `ERROR`."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Skip lines below a level: `DEBUG`, `INFO` (the default), `WARN`, `ERROR` or `DISABLED`."""
    _current.set_level(level)


def rewind(step: int) -> None:
    """Remove the logged rows after `step`: a run that resumes at `step` logs them again."""
    _current.rewind(step)


def log_config(config: Mapping[str, Any]) -> None:
    """Give the trackers the settings of the run, by name."""
    _current.log_config(config)


def image(name: str, pixels: np.ndarray, step: int) -> None:
    """Add an image to the trackers: (H, W, 3) uint8 pixels."""
    _current.image(name, pixels, step)


def logkv(key: str, val: Any) -> None:
    """Set a value of the row that `dumpkvs` writes."""
    _current.logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Set a value of the row that `dumpkvs` writes to the mean of all values that were given for it."""
    _current.logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Set several values of the row that `dumpkvs` writes."""
    for key, val in d.items():
        logkv(key, val)


def getkvs() -> dict[str, Any]:
    """The values logged since the last `dumpkvs`."""
    return _current.values


def dumpkvs() -> dict[str, Any]:
    """Write the row of logged values to `progress.csv`, `progress.jsonl` and the trackers, and return it."""
    return _current.dumpkvs()


record_tabular, dump_tabular = logkv, dumpkvs


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the duration of a `with` block in seconds to the value `wait_{scopename}`."""
    start = time.time()
    try:
        yield
    finally:
        _current.values[f"wait_{scopename}"] += time.time() - start


def profile(n: str) -> Callable[[Callable], Callable]:
    """A decorator that adds the duration of every call in seconds to the value `wait_{n}`."""

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
