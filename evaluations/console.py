"""What a command says when it goes wrong."""

import sys

import ranks


def run(main):
    """Run an entry point, which may return an exit status. Wrong input is one sentence, and status 2."""
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, MemoryError) as error:
        if ranks.rank() == 0:
            print(f"error: {error or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
