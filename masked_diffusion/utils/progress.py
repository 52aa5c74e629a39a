"""How far a long task of one process is: a bar on a terminal, and a line in the log now and then."""

import time
from datetime import timedelta

from tqdm.auto import tqdm

from .. import logger

SECONDS_PER_LINE = 30.0


class Progress:
    """A context manager that shows the progress of what happens in it.

    :param total: number of units; None: not known, so that there is no ETA.
    :param unit: plural, such as `image headers`.
    """

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.count = total, unit, 0

    def __enter__(self) -> "Progress":
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=self.total, unit=f" {self.unit}", unit_scale=True, delay=1, disable=None)
        return self

    def add(self, count: int) -> None:
        """So many units more are done."""
        self.count += count
        self._bar.update(count)
        now = time.monotonic()
        if now - self._last_line > SECONDS_PER_LINE:
            self._last_line = now
            speed = self.count / (now - self._start)
            line = f"{self.count}/{self.total}" if self.total else str(self.count)
            eta = f"  ETA {timedelta(seconds=round((self.total - self.count) / speed))}" if self.total else ""
            logger.log(f"{line} {self.unit}  {speed:.0f}/s{eta}")

    def __exit__(self, *error: object) -> None:
        self._bar.close()
