"""How a command ends: what the user can mend is one sentence, and a fault of the program keeps its traceback."""

import os
import sys

from . import ranks
from .errors import UserError

INTERRUPTED = 130  # what a shell calls the exit status of a program that Ctrl-C ended


def run(main):
    """Run an entry point and exit with the status that it returns.

    A `UserError` is one sentence of rank 0, and status 2; Ctrl-C is status 130; every other exception passes.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if ranks.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if ranks.has_met():  # threads of the process group may abort an ordinary exit, with another status
            sys.stdout.flush()
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        if ranks.rank() == 0:
            print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
