"""Logging for people and for scripts: lines, `log.txt`, `progress.csv` and `progress.jsonl`, on rank 0 only.

The function names are ADM's `logger`'s. Files are appended to, so a resumed run keeps its history.
"""

import csv
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

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

    def write(self, row):
        if not set(row) <= set(self.columns):
            self._add_columns([key for key in row if key not in self.columns])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _add_columns(self, columns):
        rows = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self.columns += columns
        beside = self.path.with_suffix(".tmp")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
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
        self.table = None
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


def logkv(key, value):
    """Set a value of the row that `dumpkvs` writes."""
    _current.logkv(key, value)


def logkv_mean(key, value):
    """Add a value to the mean that `dumpkvs` writes."""
    _current.logkv_mean(key, value)


def dumpkvs():
    """Write the gathered row to `progress.csv` and `progress.jsonl`, and return it."""
    return _current.dumpkvs()
