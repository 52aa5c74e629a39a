"""What a command says when it goes wrong."""

import sys


def run(main):
    """Run an entry point. What is wrong with its input is one sentence, and exit status 2."""
    try:
        sys.exit(main())
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        sys.exit(2)
