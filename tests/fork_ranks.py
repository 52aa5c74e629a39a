"""Run a script of the project as several ranks, and again after each kill, paying for the imports once.

    python tests/fork_ranks.py [--ranks=N] [--kills=K] [--kill_seed=S] SCRIPT FLAGS...

Every life forks anew from a process that has imported all and computed nothing. Killed lives end by SIGKILL at random
moments; the last one runs to its end.
"""

import os
import random
import signal
import socket
import sys
import time
import traceback
from importlib import import_module

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


def main():
    arguments = sys.argv[1:]
    options = {"ranks": 1, "kills": 0, "kill_seed": 0, "first": 0.2, "last": 2.0}
    while arguments[0].startswith("--"):
        key, value = arguments.pop(0)[2:].split("=")
        options[key] = type(options[key])(value)
    script, *flags = arguments
    rng = random.Random(options["kill_seed"])
    for _ in range(options["kills"]):
        children = start(script, flags, options["ranks"])
        time.sleep(rng.uniform(options["first"], options["last"]))
        for child in children:
            os.kill(child, signal.SIGKILL)
        wait(children)
    sys.exit(max(wait(start(script, flags, options["ranks"])), key=abs))


def import_all():
    global SCRIPT_UTIL
    torch.set_num_threads(1)
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "scripts"))
    SCRIPT_UTIL = import_module("masked_diffusion.script_util")
    import_module("image_train")
    import_module("image_sample")


if __name__ == "__main__":
    import_all()
    main()
