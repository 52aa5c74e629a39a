"""A file that one process holds at a time, and that its death lets go."""

import fcntl
import os
import socket
from pathlib import Path

from .errors import UserError
from .files import disk_errors


class FileLock:
    """Hold a file until `release`, or until this process ends, however it ends. It says who holds it.

    The lock is `flock`'s. On a local disk it is exact. On NFS (version 4, or 3 with lockd), CephFS, GPFS, and Lustre
    mounted with `flock`, it counts between hosts too; after a host has died the server needs up to minutes to let go.
    Buckets mounted as folders keep it within a host only, if at all.

    :param path: the file; its folder is made.
    :param what, advice: for the message: `WHAT already, by process 7 on host a: ADVICE`.
    :raises UserError: when another process holds it; names its host and process, and says what to do.
    :raises DiskError: when the file cannot be made.
    """

    def __init__(self, path: str | Path, what: str, advice: str):
        self.path, self.is_held = Path(path), False
        while not self.is_held:
            with disk_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a+")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.seek(0)
                holder = self._file.read().strip() or "a process that has just begun"
                self._file.close()
                raise UserError(f"{what} already, by {holder}: {advice}") from error
            except OSError:  # this file system has no locks
                return
            # Who held it before may have removed the file after it was opened here: then nobody else will see this one.
            self.is_held = _is_same_file(self._file, self.path)
            if not self.is_held:
                self._file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Remove the file and let go of it; again is no fault."""
        if self.is_held:
            self.path.unlink(missing_ok=True)
        self.is_held = False
        self._file.close()


def _is_same_file(file, path):
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), found)
