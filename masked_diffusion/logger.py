"""Logging for people and for scripts, on rank 0 only: lines, `log.txt`, `progress.csv`, `progress.jsonl`, TensorBoard.

The function names are ADM's `logger`'s. Files are appended to, so a resumed run keeps its history.
"""

import csv
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import ModuleType

from tqdm.auto import tqdm

DEFAULT_DIR = "output"


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

    :param directory: where the files go; None writes no files.
    :param quiet: print and write nothing, as ranks other than 0 do.
    """

    def __init__(self, directory=None, quiet=False):
        self.directory, self.quiet = directory, quiet
        self.values, self.counts = defaultdict(float), defaultdict(int)
        self.table = self._board = self.purge_step = None
        if directory and not quiet:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.table = CSVTable(Path(directory, "progress.csv"))

    def log(self, *args):
        if self.quiet:
            return
        line = " ".join(map(str, args))
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        if self.directory:
            with Path(self.directory, "log.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def rewind(self, step):
        """Forget the rows after `step`: a run that resumes there will write them again."""
        if self.table is None:
            return
        self.table.rewind(step)
        path = Path(self.directory, "progress.jsonl")
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
            beside = path.with_suffix(".tmp")
            beside.write_text("".join(line + "\n" for line in kept))
            beside.replace(path)
        self.purge_step = step + 1

    @property
    def board(self):
        """TensorBoard's writer, made on first use: its import takes a second."""
        if self._board is None:
            # Where TensorFlow is installed, TensorBoard imports all of it for its file functions, unless this is found.
            sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self.directory, purge_step=self.purge_step)
        return self._board

    def image(self, name, pixels, step):
        """Show (H, W, 3) uint8 pixels on TensorBoard."""
        if self.table is not None:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def logkv(self, key, value):
        self.values[key], self.counts[key] = value, 1

    def logkv_mean(self, key, value):
        count = self.counts[key]
        self.values[key] = self.values[key] * count / (count + 1) + value / (count + 1)
        self.counts[key] += 1

    def dumpkvs(self):
        row = dict(self.values)
        self.values.clear()
        self.counts.clear()
        if self.table and row:
            self.table.write(row)
            with Path(self.directory, "progress.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            for key, value in row.items():
                self.board.add_scalar(key, value, row.get("step"))
        return row


_current = Logger()


def configure(directory=None, quiet=False):
    """Log to `directory`; by default to the environment's `OPENAI_LOGDIR`, else to `output`."""
    global _current
    _current = Logger(directory or os.environ.get("OPENAI_LOGDIR") or DEFAULT_DIR, quiet)


def get_dir():
    """The log directory, or None before `configure`."""
    return _current.directory


def log(*args):
    _current.log(*args)


def rewind(step):
    """Forget the logged rows after `step`: a run that resumes there will write them again."""
    _current.rewind(step)


def image(name, pixels, step):
    """Show (H, W, 3) uint8 pixels on TensorBoard."""
    _current.image(name, pixels, step)


def logkv(key, value):
    """Set a value of the row that `dumpkvs` writes."""
    _current.logkv(key, value)


def logkv_mean(key, value):
    """Add a value to the mean that `dumpkvs` writes."""
    _current.logkv_mean(key, value)


def dumpkvs():
    """Write the gathered row to `progress.csv` and `progress.jsonl`, and return it."""
    return _current.dumpkvs()
