"""Run scripts of the project as several ranks, and again after each kill, paying for the imports once.

Every life forks anew from a process that has imported all and computed nothing. Killed lives end by SIGKILL at random
moments; the last one runs to its end. `helpers.fork` starts this file once, and asks it for all that it runs.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from importlib import import_module
from types import ModuleType

import torch


def start(script, flags, ranks, prepare=lambda rank: None):
    """Fork the ranks of one life, each of which calls `prepare` first. Returns their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # The first call after a fork renews PyTorch's thread pool: without this one the threads of the autograd engine
        # make it together, and now and then one of them finds no pool and aborts.
        torch.set_num_threads(1)
        code = 1
        try:
            sys.argv = [script, *flags]
            prepare(rank)
            SCRIPT_UTIL.run(import_module(script.removesuffix(".py")).main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def wait(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(script, flags, ranks=1, kills=0, kill_seed=0, first=0.2, last=2.0):
    """Lives of a script, of which the first `kills` end within `first` to `last` seconds. Returns the exit code."""
    rng = random.Random(kill_seed)
    for _ in range(kills):
        children = start(script, flags, ranks)
        time.sleep(rng.uniform(first, last))
        for child in children:
            os.kill(child, signal.SIGKILL)
        wait(children)
    return max(wait(start(script, flags, ranks)), key=abs)


def import_late():
    """Import what torch and the logger would import in every life; the logger keeps TensorFlow out like this."""
    sys.modules["tensorboard.compat.notf"] = ModuleType("notf")
    for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard"):
        import_module(name)


def import_all():
    global SCRIPT_UTIL
    torch.set_num_threads(1)
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "scripts"))
    SCRIPT_UTIL = import_module("masked_diffusion.script_util")
    import_module("image_train")
    import_module("image_sample")
    import_late()


def answer(request):
    """Run a request in this process, which a request of its own was made for."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environ"])
    for number, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os._exit(run(request["script"], request["flags"], **request["options"]) & 255)


def serve():
    """Answer requests, a line of JSON each: the id of the process, which leads a group, then its exit code."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answer(json.loads(line))
        print(child, flush=True)
        print(*wait([child]), flush=True)


if __name__ == "__main__":
    import_all()
    serve()
