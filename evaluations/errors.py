"""The one kind of error that is shown as a sentence."""

from importlib.util import find_spec


class UserError(ValueError):
    """Something that the person who started the command can mend: a flag, a file, the disk, a missing package."""


def check_packages(*packages, reason):
    """:raises UserError: when one of the packages, by the names that pip has for them, is not installed."""
    for package in packages:
        if find_spec(package.replace("-", "_")) is None:
            raise UserError(f"{package} is not installed, which {reason} needs: pip install {package}")
