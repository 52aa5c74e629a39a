"""Four ranks on two pretended nodes train, save and resume with every kind of sharding, paying for the imports once.

    python tests/rank_checks.py FOLDER

On GPUs with NCCL if there are any, then at least four; else on CPUs. `test_parallel.py` looks at what they leave:
the checkpoints, and what each rank saw in `rank{r}.json`.
"""

import json
import os
import shutil
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("..", "../scripts", "data", ".")]
from fork_ranks import import_late  # noqa: E402
from helpers import Batches, make_loop, stream  # noqa: E402

from masked_diffusion import dist_util  # noqa: E402
from masked_diffusion.training.parallel import gather_full, shard_model  # noqa: E402
from masked_diffusion.utils.errors import UserError  # noqa: E402
from masked_diffusion.weights import checkpoint  # noqa: E402
from masked_diffusion.weights.torch_file import late_tensors  # noqa: E402

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
            zero = torch.zeros(1, dtype=torch.long, device=loop.device)
            loop.model(torch.zeros(1, 3, 8, 8, device=loop.device), zero, zero)
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
    seen = {"opened": {}, "exchanges": {}}
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
    # A disk that is full in the midst of the second file, on rank 0 alone.
    (folder / "full").mkdir(exist_ok=True)
    save_tensors, calls = checkpoint.save_tensors, []

    def full_disk(state, file):
        calls.append(1)
        if len(calls) == 2:
            for late in late_tensors(state)[:3]:
                late.make()
            raise OSError(28, "No space left on device")
        save_tensors(state, file)

    checkpoint.save_tensors = full_disk
    try:
        loop.state.save(folder / "full")
    except UserError as error:
        seen["full"] = str(error)
    checkpoint.save_tensors = save_tensors
    seen["left"] = [path.name for path in (folder / "full").iterdir()]
    loop.state.save(folder / "full")  # the ranks have not lost each other

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
    children = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        # On true nodes the local ranks begin anew; here they choose the GPUs.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"GROUP_RANK": str(rank // PER_NODE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)  # see fork_ranks.py
        code = 1
        try:
            dist_util.join_process_group()
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
    import_late()
    fork_ranks(Path(sys.argv[1]), RANKS, check, Path(sys.argv[1]))
