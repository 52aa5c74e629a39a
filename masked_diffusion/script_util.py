"""Shared by the scripts: making flags from configurations, and running an entry point with its error messages."""

import argparse
import atexit
import difflib
import gc
import hashlib
import re
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any, NoReturn, TypeVar

from . import dist_util, logger
from .published import (  # noqa: F401  (ADM's and MDT's scripts import them from here)
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    model_and_diffusion_defaults,
    str2bool,
)
from .published import adm_diffusion_defaults as diffusion_defaults  # noqa: F401  (MDT's script_util has none)
from .respace import create_gaussian_diffusion  # noqa: F401  (so do ADM's users)
from .utils import last_words
from .utils.errors import UserError
from .utils.not_rebuilt import module_getattr
from .utils.options import Config, check_value, is_optional

__getattr__ = module_getattr(__name__)
C = TypeVar("C", bound=Config)
INTERRUPTED = 130  # the usual exit code of a program that was ended by Ctrl-C
_MISSING = object()

# ---------------------------------------------------------------- flags


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults, accepts no abbreviations, and raises `UserError` with the most similar flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags of {self.prog})")

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            shown = [name for name, each in self._option_string_actions.items() if each.help != argparse.SUPPRESS]
            near = difflib.get_close_matches(flag, shown, n=1)
            self.error(f"{flag} is not a flag of {self.prog}" + (f": did you mean {near[0]}?" if near else ""))
        return found


def parse_flags(config_class: type[C], description: str, argv: Sequence[str] | None = None, **defaults: Any) -> C:
    """Read a configuration from the command line, and check that every value is in its range.

    Each field is a flag. Booleans work alone (`--compile`) or with a value (`--compile True`), optional values accept
    `None`, and DiT's spelling with hyphens works too.

    :param description: the text at the top of `--help`.
    :param argv: the command line without the program's name; None: that of this process.
    :param defaults: by field name, for fields whose default in this script differs from that of the class.
    :raises UserError: for an unknown flag, and for a value that is not allowed.
    """
    parser = Parser(description=description)
    # For torch.distributed.launch and commands of MDT; ignored, since torchrun sets environment variables instead.
    for name in ("local_rank", "rank", "world_size", "dist_url", "dist_on_itp"):
        parser.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)
    groups = {}
    for owner, field in config_class.flags():
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__doc__.splitlines()[0])
        _add_flag(
            groups[owner], field, typing.get_type_hints(owner)[field.name], defaults.get(field.name, field.default)
        )
    argv = sys.argv[1:] if argv is None else argv
    flags = {field.name: field for _, field in config_class.flags()}
    # argparse sets no default where a value is present, so what is still missing afterwards was not given.
    missing = argparse.Namespace(**dict.fromkeys(flags, _MISSING))
    found = vars(parser.parse_args([_with_underscores(word) for word in argv], missing))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    given = {name: given[name] for name in flags if given[name] is not _MISSING}
    values = {name: field.default for name, field in flags.items()} | defaults | _preset_values(flags, given) | given
    return config_class.from_values(values).check()


def _preset_values(flags: dict[str, Field], given: dict[str, Any]) -> dict[str, Any]:
    """The values of the presets that were given, without those that exclude a flag that was given beside them.

    :raises UserError: for two given flags that exclude each other.
    """
    chosen = {}
    for name, field in flags.items():
        presets = field.metadata["presets"]
        if presets and given.get(name) is not None:
            check_value(field, given[name])
            chosen |= presets[given[name]]
    for name, field in flags.items():
        other = field.metadata["excludes"]
        if other in given and given.get(name) is not None:
            raise UserError(
                f"--{name} {given[name]} and --{other} {given[other]} exclude each other: leave one of them out"
            )
        if other in given:
            chosen.pop(name, None)
    return chosen


def _with_underscores(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if re.match(r"--[a-z]", name) else word


def _add_flag(group: argparse._ArgumentGroup, field: Field, annotation: Any, default: Any) -> None:
    meta = field.metadata
    options = {"default": default, "help": meta["help"].replace("%", "%%")}
    may_be_none = is_optional(annotation) and not meta["read"]
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] if may_be_none else [annotation]
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        of, *rest = typing.get_args(kind)
        options |= {"nargs": "+" if rest == [Ellipsis] else 1 + len(rest), "metavar": meta["metavar"]}
        kind, may_be_none = of, False  # in a list, None is a word like any other
    if kind is bool:
        options |= {"nargs": "?", "const": True}
    read = meta["read"] or {bool: str2bool}.get(kind, kind)
    options["type"] = _optional(read) if may_be_none else read
    if meta["choices"]:  # checked by `check_value`, like all ranges
        options["metavar"] = "{" + ",".join(meta["choices"]) + "}"
    group.add_argument(f"--{field.name}", **options)


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def read_optional(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    read_optional.__name__ = getattr(read, "__name__", "value")  # shown in argparse's `invalid int value: 'x'`
    return read_optional


# ---------------------------------------------------------------- how a script ends


def run(main: Callable[[], None]) -> None:
    """Run an entry point, and report errors.

    A `UserError`, which the user can fix, is printed as one sentence, once for all ranks, with exit code 2; torchrun
    does not restart the job after it. Ctrl-C ends with exit code 130 and without a traceback. Any other exception is a
    bug of the program, and its traceback is printed; but a rank that ends only because another one has died says so in
    one sentence. All but Ctrl-C are written down with tracebacks; see `utils.last_words`.
    """
    atexit.register(gc.freeze)  # or the interpreter looks for cycles among all that torch holds: more than a second
    try:
        main()
    except UserError as error:
        _write_down(error)
        key = "error " + hashlib.sha256(str(error).encode()).hexdigest()
        if dist_util.is_first_of_node(key):
            if dist_util.is_first(key):
                print(f"error: {str(error) or type(error).__name__}", file=sys.stderr, flush=True)
            dist_util.end_restarts()  # after the message, because torchrun then ends the other ranks
        sys.exit(2)
    except KeyboardInterrupt:
        if dist_util.is_main():
            print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        _write_down(error)
        if not (logger.get_dir() and dist_util.is_lost_peer(error)):
            raise
        if dist_util.is_first("lost"):
            print(
                f"error: {last_words.describe_rank()} ends, because another rank has ended; what it said last is in "
                f"log.txt (rank 0) or rank*.txt of {logger.get_dir()}",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(1)
    finally:
        dist_util.cleanup()


def _write_down(error: Exception) -> None:
    if not dist_util.is_repeated(error):  # the rank that raised it first has written it
        last_words.write(logger.get_dir(), "".join(traceback.format_exception(error)))
