"""The one kind of error that is shown as a sentence."""


class UserError(ValueError):
    """Something that the person who started the command can mend: a flag, a file, the disk, a missing package."""
