"""Runs that are stopped and go on with other ranks and another kind of sharding, in both formats of checkpoints.

    python tests/sharded_checks.py FOLDER RUN...

RUN is a name of `RUNS`, or full. It pays for the imports once. `test_sharded.py` compares the checkpoints.
"""

import resource
import sys
from functools import partial
from pathlib import Path

import torch
from fork_ranks import import_late
from rank_checks import OwnRows, fork_ranks, make_loop

from masked_diffusion import dist_util
from masked_diffusion.utils.errors import UserError

GLOBAL_BATCH = 12
# Kind of sharding and number of ranks: before the stop, and after it. Two ranks are on a node.
RUNS = {
    "fsdp_zero1": (("fsdp", 2), ("zero1", 3), "adamw"),
    "zero1_none": (("zero1", 3), ("none", 1), "adan-pytorch"),
    "none_hsdp": (("none", 1), ("hsdp", 4), "adamw"),
    "hsdp_fsdp": (("hsdp", 4), ("fsdp", 2), "adamw"),
    "many_few": (("none", 4), ("zero1", 2), "adamw"),
}
FORMATS = {"whole": {}, "sharded": {"checkpoint_format": "sharded", "async_save": True}}


def train(folder, shard, steps, **flags):
    flags |= {"batch_size": GLOBAL_BATCH // dist_util.get_world_size(), "phema": "0.05", "log_interval": 1}
    make_loop(folder, data=OwnRows(GLOBAL_BATCH), meta=True, shard=shard, max_steps=steps, **flags).run_loop()


def fill_disk(folder, shard, steps, **flags):
    """Rank 1 can write no large file. Every rank returns the error that ends it."""
    if dist_util.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        train(folder, shard, steps, **flags)
    except UserError as error:
        return str(error)


def check_full_disk(top):
    flags = FORMATS["sharded"] | {"save_interval": 3}
    fork_ranks(top, 2, partial(train, **flags), top / "full", "fsdp", 2)
    fork_ranks(top, 2, partial(fill_disk, **flags), top / "full", "fsdp", 100_000)


def check_run(top, name):
    first, second, optimizer = RUNS[name]
    for kind, flags in FORMATS.items():
        for steps, (shard, ranks) in ((2, first), (4, second)):
            fork_ranks(top, ranks, partial(train, optimizer=optimizer, **flags), top / kind / name, shard, steps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_late()
    for run in sys.argv[2:]:
        check_full_disk(Path(sys.argv[1])) if run == "full" else check_run(Path(sys.argv[1]), run)
