"""Four ranks on two pretended nodes train, save and resume with every kind of sharding, paying for the imports once.

    python tests/rank_checks.py FOLDER

`test_parallel.py` looks at what they leave: the checkpoints, and what each rank saw in `rank{r}.json`.
"""

import json
import os
import shutil
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("..", "../scripts", "data", ".")]
from helpers import Batches, make_loop, stream  # noqa: E402

from masked_diffusion import dist_util  # noqa: E402
from masked_diffusion.training.parallel import gather_full, shard_model  # noqa: E402
from masked_diffusion.utils.errors import UserError  # noqa: E402

RANKS, PER_NODE, ROWS = 4, 2, 4
KINDS = ("none", "zero1", "fsdp", "hsdp")


class OwnRows(Batches):
    """Other rows on each rank."""

    def __init__(self, global_batch=RANKS * ROWS):
        self.global_batch = global_batch

    def stream(self, start_step, seed, first_stage):
        rows = self.global_batch // dist_util.get_world_size()
        for images, cond in stream(start_step, seed, self.global_batch):
            own = slice(dist_util.get_rank() * rows, (dist_util.get_rank() + 1) * rows)
            yield images[own], {"y": cond["y"][own]}


class Look:
    """Runs the EMA weights after every step, as evaluation does."""

    def after_step(self, loop):
        with loop.state.ema_weights():
            loop.model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        return True


make = partial(make_loop, data=OwnRows(), meta=True, batch_size=ROWS, microbatch=2, log_interval=1, phema="0.05")
make = partial(make, save_interval=3, hooks=[Look()])


def counting(module, name, of):
    """Count the calls of a function for which `of` is true, in a list of one number."""
    function, count = getattr(module, name), [0]

    def counted(*arguments, **options):
        count[0] += bool(of(*arguments, **options))
        return function(*arguments, **options)

    setattr(module, name, counted)
    return count


def between_nodes(*arguments, group=None, **options):
    return group is not None and dist.get_process_group_ranks(group) in ([0, 2], [1, 3])


def check(folder):
    seen = {"groups": {}, "opened": {}, "exchanges": {}}
    for kind in KINDS:
        make(folder / kind, shard=kind, max_steps=3).run_loop()
    opened = counting(torch, "load", lambda *_, **__: True)
    for kind in KINDS:
        if dist_util.is_main():
            shutil.copytree(folder / "none", folder / f"{kind}_again")
        dist.barrier()
        opened[0] = 0
        loop = make(folder / f"{kind}_again", shard=kind, max_steps=5)
        seen["opened"][kind] = opened[0]
        (folder / f"{kind}_copy").mkdir(exist_ok=True)
        loop.state.save(folder / f"{kind}_copy")
        loop.run_loop()
    exchanged = counting(dist, "all_reduce", between_nodes)
    for microbatch in (ROWS, 1):
        loop = make(folder / f"micro{microbatch}", shard="hsdp", microbatch=microbatch)
        exchanged[0] = 0
        loop.run_step(*next(loop.data))
        seen["exchanges"][microbatch] = exchanged[0]
    weights = folder / "none" / "model000003.pt"
    for kind in ("none", "hsdp"):
        other = make(folder / f"tuned_{kind}", shard=kind, resume_checkpoint=str(weights), num_classes=4)
        seen[f"tuned_{kind}"] = {
            key: gather_full(value).double().sum().item() for key, value in other.model.state_dict().items()
        }
    seen["local"] = sum(p.to_local().numel() for p in other.model.parameters())
    seen["all"] = sum(p.numel() for p in other.model.parameters())
    os.environ["GROUP_RANK"] = str(int(dist_util.get_rank() > 2))
    try:
        shard_model(other.model, "hsdp")
    except UserError as error:
        seen["uneven"] = str(error)
    return seen


def fork_ranks(folder, ranks, function, *arguments):
    """Run a function on ranks of pretended nodes, and write what each returns to `rank{r}.json` of a folder."""
    children, store = [], tempfile.mktemp(dir=folder)
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % PER_NODE)}
        os.environ |= {"GROUP_RANK": str(rank // PER_NODE), "LOCAL_WORLD_SIZE": str(PER_NODE)}
        code = 1
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
            Path(folder, f"rank{rank}.json").write_text(json.dumps(function(*arguments)))
            dist.barrier()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_ranks(Path(sys.argv[1]), RANKS, check, Path(sys.argv[1]))
