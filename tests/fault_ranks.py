"""Train as two ranks of which one has a fault at its third step, for each fault once; the imports are paid for once.

    python tests/fault_ranks.py FOLDER FLAGS...

Every life has the log directory FOLDER/FAULT-RANK, `stderr` in it and, in the end, `codes.json`: what the ranks ended
with. As a launcher does, it kills what is left when one rank has failed and the others had time to notice.
"""

import errno
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from unittest import mock

import fork_ranks

SECONDS_TO_NOTICE = 30


def at_the_third_step(do):
    loop_class = import_module("masked_diffusion.train_util").TrainLoop
    run_step = loop_class.run_step

    def faulty(self, *batch):
        if self.step == 2:
            do()
        run_step(self, *batch)

    loop_class.run_step = faulty


def fail(error):
    raise error


def never_load():
    """The third batch of two images, or the data loading process that makes it, does not come back."""
    dataset = import_module("masked_diffusion.image_datasets").ImageDataset
    read, count = dataset._read, 0

    def stuck(self, index):
        nonlocal count
        count += 1
        if count > 4:
            time.sleep(600)
        return read(self, index)

    dataset._read = stuck


def fill_disk():
    """From now on nothing can be written, not even last words."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    last_words = import_module("masked_diffusion.utils.last_words")
    checkpoint = import_module("masked_diffusion.weights.checkpoint")
    last_words.path = lambda log_dir: mock.Mock(open=full, stat=full)
    checkpoint.torch.save = full


FAULTS = {
    "bug": lambda: at_the_third_step(lambda: fail(ValueError("a bug"))),
    "memory": lambda: at_the_third_step(lambda: fail(MemoryError("no memory"))),
    "crash": lambda: at_the_third_step(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "stopped": lambda: at_the_third_step(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "stuck": never_load,
    "full": lambda: at_the_third_step(fill_disk),
    "full-bug": lambda: at_the_third_step(lambda: (fill_disk(), fail(ValueError("a bug")))),
}
LIVES = ["bug-1", "memory-1", "crash-1", "stopped-0", "stopped-1", "stuck-1", "full-0", "full-1", "full-bug-1"]


def live(name, folder, flags):
    fault, _, faulty_rank = name.rpartition("-")
    log_dir = folder / name
    log_dir.mkdir()

    def prepare(rank):
        error_file = os.open(log_dir / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(error_file, 1)
        os.dup2(error_file, 2)
        if rank == int(faulty_rank):
            FAULTS[fault]()

    children = fork_ranks.start("image_train.py", [*flags, f"--log_dir={log_dir}"], 2, prepare)
    codes, end = {}, None
    while len(codes) < len(children):
        for rank, child in enumerate(children):
            pid, status = os.waitpid(child, os.WNOHANG) if rank not in codes else (0, 0)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank] and end is None:
                    end = time.monotonic() + (SECONDS_TO_NOTICE if fault != "stopped" else 0)
        if end is not None and time.monotonic() > end:
            for rank, child in enumerate(children):
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.05)
    (log_dir / "codes.json").write_text(json.dumps([codes[rank] for rank in range(len(children))]))


if __name__ == "__main__":
    fork_ranks.import_all()
    for each in LIVES:
        live(each, Path(sys.argv[1]), sys.argv[2:])
