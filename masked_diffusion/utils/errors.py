"""The one kind of error that is shown as a sentence."""


class UserError(ValueError):
    """Something that the person who started the program can mend: a flag, a file, the disk, a diverged run.

    Its message is for that person: the offending value, what is required, and what to do. `script_util.run` prints it
    without a traceback, once. Every other exception is a fault of the program and keeps its traceback.
    """
