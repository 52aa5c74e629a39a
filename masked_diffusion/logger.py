"""Logging for people and for scripts, on rank 0 only: lines, `log.txt`, `progress.csv`, `progress.jsonl`, TensorBoard.

The function names are ADM's `logger`'s. Files are appended to, so a resumed run keeps its history.
"""

import csv
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType

from tqdm.auto import tqdm

from .utils.errors import UserError
from .utils.files import disk_errors
from .utils.not_rebuilt import module_getattr

DEFAULT_DIR = "output"
FORMATS = ("stdout", "log", "csv", "json", "tensorboard")
DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # torchrun, MPICH and Intel MPI, Open MPI

__getattr__ = module_getattr(__name__)


class CSVTable:
    """A CSV file that takes new columns at any time: the file is then written anew beside itself and swapped in."""

    def __init__(self, path):
        self.path = Path(path)
        self.columns = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.columns = next(csv.reader(file), [])

    def rewind(self, step):
        """Drop the rows after `step`, and one that was cut short."""
        if self.columns:
            rows = [row for row in self._read() if row.get("step") and None not in row.values()]
            self._write_anew([row for row in rows if int(float(row["step"])) <= step])

    def write(self, row):
        if not set(row) <= set(self.columns):
            self._add_columns([key for key in row if key not in self.columns])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _add_columns(self, columns):
        rows = self._read()
        self.columns += columns
        self._write_anew(rows)

    def _read(self):
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write_anew(self, rows):
        beside = self.path.with_suffix(".tmp")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        beside.replace(self.path)


class Logger:
    """Key-value pairs gathered until `dumpkvs`, and lines of text.

    :param dir: where the files go; None writes no files.
    :param output_formats: some of `FORMATS`; None is all of them. Rows are also written as lines of text where the
        formats are named, as in ADM; training says them in lines of its own.
    :param comm: None; see `configure`.
    :param quiet: print and write nothing, as ranks other than 0 do.
    :param log_suffix: goes into the names of the files.
    :raises UserError: for an unknown format, for a `comm`, and for a directory that cannot be made.
    """

    def __init__(self, dir=None, output_formats=None, comm=None, quiet=False, log_suffix=""):
        formats = FORMATS if output_formats is None else tuple(output_formats)
        if not set(formats) <= set(FORMATS):
            raise UserError(f"output formats {output_formats!r} are not all known: choose some of {', '.join(FORMATS)}")
        if comm is not None:
            raise UserError("the logger takes no MPI communicator (comm): average with dist_util.mean_over_ranks first")
        self.dir, self.quiet, self.log_suffix, self.level = dir, quiet, log_suffix, INFO
        self.rows_as_lines = output_formats is not None
        self.values, self.counts = defaultdict(float), defaultdict(int)
        self.table = self._board = self.purge_step = None
        in_files = () if quiet or not dir else formats
        self.lines_path = self._path("log", "txt") if "log" in in_files else None
        self.json_path = self._path("progress", "jsonl") if "json" in in_files else None
        self.has_board, self.prints = "tensorboard" in in_files, "stdout" in formats
        if in_files:
            with disk_errors(dir):
                Path(dir).mkdir(parents=True, exist_ok=True)
        if "csv" in in_files:
            self.table = CSVTable(self._path("progress", "csv"))

    def _path(self, name, ending):
        return Path(self.dir, f"{name}{self.log_suffix}.{ending}")

    def log(self, *args, level=INFO):
        if self.quiet or level < self.level:
            return
        line = " ".join(map(str, args))
        if self.prints:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        if self.lines_path:
            with disk_errors(self.lines_path), self.lines_path.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def set_level(self, level):
        self.level = level

    def get_dir(self):
        return self.dir

    def rewind(self, step):
        """Forget the rows after `step`: a run that resumes there will write them again."""
        if self.table is not None:
            with disk_errors(self.table.path):
                self.table.rewind(step)
        if self.json_path and self.json_path.exists():
            lines = [line for line in self.json_path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
            beside = self.json_path.with_suffix(".tmp")
            with disk_errors(self.json_path):
                beside.write_text("".join(line + "\n" for line in kept))
                beside.replace(self.json_path)
        self.purge_step = step + 1

    @property
    def board(self):
        """TensorBoard's writer, made on first use: its import takes a second."""
        if self._board is None:
            # Where TensorFlow is installed, TensorBoard imports all of it for its file functions, unless this is found.
            sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(self.dir):
                self._board = SummaryWriter(self.dir, purge_step=self.purge_step, filename_suffix=self.log_suffix)
        return self._board

    def image(self, name, pixels, step):
        """Show (H, W, 3) uint8 pixels on TensorBoard."""
        if self.has_board:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def logkv(self, key, val):
        self.values[key], self.counts[key] = val, 1

    def logkv_mean(self, key, val):
        count = self.counts[key]
        self.values[key] = self.values[key] * count / (count + 1) + val / (count + 1)
        self.counts[key] += 1

    def dumpkvs(self):
        # Tensors and numpy numbers become Python's, which JSON knows.
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
        for key, value in row.items() if self.has_board else ():
            if _is_number(value):
                self.board.add_scalar(key, value, row.get("step"))
        return row

    def close(self):
        if self._board is not None:
            self._board.close()
            self._board = None


def _is_number(value):
    return isinstance(value, (int, float))


_current = Logger()


def configure(dir=None, format_strs=None, comm=None, log_suffix="", quiet=None):
    """Log to `dir`; by default to the environment's `OPENAI_LOGDIR`, else to `output`.

    :param dir: a folder of this machine. Data and weights may be read from the addresses that blobfile knows (`gs://`,
        `az://`, Azure's `https://`), but logs, checkpoints and images are written to folders: a bucket must be mounted.
    :param format_strs: some of `FORMATS`; None is all of them.
    :param comm: None: values are not averaged over MPI ranks.
    :param log_suffix: goes into the names of the files.
    :param quiet: print and write nothing; None does so on all ranks but 0.
    :raises UserError: for a remote `dir`, and as `Logger`.
    """
    global _current
    dir = os.path.expanduser(dir or os.environ.get("OPENAI_LOGDIR") or DEFAULT_DIR)
    if "://" in dir:
        raise UserError(
            f"--log_dir (or $OPENAI_LOGDIR) is {dir}, a remote address: data and weights can be read from gs:// and "
            "az://, but logs, checkpoints and images are written to a folder; name a local one, or mount the bucket "
            "and name the path where it is mounted"
        )
    quiet = get_rank_without_mpi_import() != 0 if quiet is None else quiet
    _current = Logger(dir, format_strs, comm, quiet, log_suffix)


def get_rank_without_mpi_import():
    """The rank that the launcher wrote into the environment; 0 without a launcher."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def reset():
    """Back to the logger before `configure`, which prints and writes no files."""
    global _current
    _current.close()
    _current = Logger()


@contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """`configure` within a block; afterwards the logger of before is used again."""
    global _current
    before = _current
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        _current.close()
        _current = before


def get_current():
    """The `Logger` that the functions of this module use."""
    return _current


def get_dir():
    """The log directory, or None before `configure`."""
    return _current.dir


def log(*args, level=INFO):
    """Print and write a line, if its level is that of `set_level` or above."""
    _current.log(*args, level=level)


def debug(*args):
    log(*args, level=DEBUG)


def info(*args):
    log(*args, level=INFO)


def warn(*args):
    log(*args, level=WARN)


def error(*args):
    log(*args, level=ERROR)


def set_level(level):
    """Leave out lines below a level: `DEBUG`, `INFO` (the default), `WARN`, `ERROR`, `DISABLED`."""
    _current.set_level(level)


def rewind(step):
    """Forget the logged rows after `step`: a run that resumes there will write them again."""
    _current.rewind(step)


def image(name, pixels, step):
    """Show (H, W, 3) uint8 pixels on TensorBoard."""
    _current.image(name, pixels, step)


def logkv(key, val):
    """Set a value of the row that `dumpkvs` writes."""
    _current.logkv(key, val)


def logkv_mean(key, val):
    """Add a value to the mean that `dumpkvs` writes."""
    _current.logkv_mean(key, val)


def logkvs(d):
    """Set several values of the row that `dumpkvs` writes."""
    for key, val in d.items():
        logkv(key, val)


def getkvs():
    """The values gathered since the last `dumpkvs`."""
    return _current.values


def dumpkvs():
    """Write the gathered row to `progress.csv` and `progress.jsonl`, and return it."""
    return _current.dumpkvs()


record_tabular, dump_tabular = logkv, dumpkvs


@contextmanager
def profile_kv(scopename):
    """Add the seconds that a block takes to the value `wait_{scopename}`."""
    start = time.time()
    try:
        yield
    finally:
        _current.values[f"wait_{scopename}"] += time.time() - start


def profile(n):
    """A decorator: the seconds of every call are added to the value `wait_{n}`."""

    def decorate(function):
        @wraps(function)
        def timed(*args, **kwargs):
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
