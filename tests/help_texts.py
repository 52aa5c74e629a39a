"""Print what each script says to --help, as JSON: in forked processes, so that the imports are paid for once.

python tests/help_texts.py SCRIPT...
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO

import masked_diffusion.models
import masked_diffusion.train_util  # noqa: F401


def run_script(script: str, out: IO[str]) -> None:
    """Run `script --help`, and leave at once: the usual end of a process with all these modules takes seconds."""
    os.dup2(out.fileno(), 1)
    sys.argv, sys.path[0] = [script, "--help"], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(1 if end.code else 0)
    except Exception:
        traceback.print_exc()
    os._exit(1)  # --help ends a script


def help_text(script: str) -> str:
    """:raises RuntimeError: when the script does not end with 0."""
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if not child:
            run_script(script, out)
        if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise RuntimeError(f"{script} --help ended with {code}")
        out.seek(0)
        return out.read()


if __name__ == "__main__":
    texts = {script: help_text(script) for script in sys.argv[1:]}
    print(json.dumps(texts))
