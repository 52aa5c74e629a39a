"""Class names: what the classes of a model are called, and which label a name means."""

import re
from collections.abc import Sequence

from ..utils.errors import UserError

IMAGENET_CLASSES = 1000


def class_names(classes: Sequence[str] | None, num_classes: int) -> list[str]:
    """The names of a model's classes, in the order of their labels; [] where they are not known.

    :param classes: what training wrote down: the first parts of its file names. ImageNet's WNIDs become words. Without
        them, 1000 classes are taken for ImageNet's. Classes beyond them are called by their numbers.
    :raises UserError: for more names than the model has classes.
    """
    if classes and len(classes) > num_classes:
        raise UserError(
            f"the configuration beside the weights names {len(classes)} classes, but the model has {num_classes}: "
            "it belongs to other weights"
        )
    if not classes and num_classes == IMAGENET_CLASSES:
        from timm.data import ImageNetInfo

        return ImageNetInfo("imagenet-1k").label_descriptions()
    if classes and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        from timm.data import ImageNetInfo

        info = ImageNetInfo("imagenet-22k")
        words = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
        classes = [words.get(name, name) for name in classes]
    # A label table may be larger than the data that it was trained on (--num_classes).
    return [*classes, *map(str, range(len(classes), num_classes))] if classes else []


def find_label(text: str | int, names: Sequence[str], num_classes: int) -> int:
    """The label that a number or a name means.

    :param text: `207`, or a name out of `names`: the whole of it, one of its synonyms ("Arctic fox"), or a part that
        occurs in one name alone.
    :param names: see `class_names`. A name that is a number is read as the label.
    :raises UserError: for a number that is no label, and for a name that means no class or several.
    """
    text = str(text).strip()
    if not text:
        raise UserError("a class is '': give its number, or its name or a part of it")
    if text.isdecimal():
        if int(text) >= max(num_classes, 1):
            raise UserError(f"class {text} does not exist: the model has {num_classes} classes, from 0 on")
        return int(text)
    wanted, folded = text.casefold(), [name.casefold() for name in names]
    whole = [i for i, name in enumerate(folded) if name == wanted]
    synonym = [i for i, name in enumerate(folded) if wanted in re.split(", *", name)]
    found = whole or synonym or [i for i, name in enumerate(folded) if wanted in name]
    if len(found) == 1:
        return found[0]
    if not names:
        raise UserError(f"class {text!r} is a name, but the classes of this model have none: give its number")
    if not found:
        raise UserError(f"class {text!r} is none of the model's {len(names)} classes: try a part of its name")
    some = ", ".join(f"{i} ({names[i]})" for i in found[:8])
    raise UserError(f"class {text!r} may be any of {len(found)} classes: give the number of one, {some}")
