"""The kind of error that the user can fix, shown as one sentence."""


class UserError(ValueError):
    """A problem that the person who started the program can fix: a flag, a file, the disk, a diverged run.

    The message is written for that person: the wrong value, what is required, and what to do. `script_util.run` prints
    it once, without a traceback. Every other exception is a bug of the program and keeps its traceback.
    """
