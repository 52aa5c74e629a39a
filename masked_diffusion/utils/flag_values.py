"""Values of flags that are more than a number: how their text is read, and what they must be.

A `read_*` makes the value of a text. A `check_*` returns what the value must be where it is not that, else None.
"""

import math
from collections.abc import Callable

MAX_SIGMA_REL = 12**-0.5  # of a power-function EMA: the plain average of all steps (Karras et al. 2024, eq. 123)


def split_numbers(text: str) -> tuple[float, ...]:
    """`0.9999,0.999` -> its numbers; "" has none.

    :raises ValueError: where a part is no number.
    """
    return tuple(float(part) for part in text.split(",")) if text else ()


def check_list(text: str, fits: Callable[[float], bool], requirement: str) -> str | None:
    try:
        numbers = split_numbers(text)
    except ValueError:
        return requirement
    return None if all(map(fits, numbers)) and len(set(numbers)) == len(numbers) else requirement


def check_ema_rates(text: str) -> str | None:
    requirement = "different numbers, at least 0 and below 1, separated by commas, such as 0.9999 or 0.999,0.9999"
    return requirement if not text else check_list(text, lambda rate: 0 <= rate < 1, requirement)


def check_phema_widths(text: str) -> str | None:
    requirement = f"different widths above 0 and below {MAX_SIGMA_REL:.4f}, with at most three decimals, or empty"
    return check_list(text, lambda width: 0 < width < MAX_SIGMA_REL and round(width, 3) == width, requirement)


def read_gamma(text: str) -> float | str | None:
    words = {"none": None, "auto": "auto"}
    return words[text.lower()] if text.lower() in words else float(text)


def check_gamma(value: float | str) -> str | None:
    requirement = "a number above 0, None (no weight) or auto (the default of the model's family)"
    return None if value == "auto" or (type(value) in (int, float) and 0 < value < math.inf) else requirement


def check_source(text: str) -> str | None:
    return None if text else "a checkpoint, a training folder or a hub id"


def check_steps(text: str) -> str | None:
    counts = text.removeprefix("ddim").split(",")
    fits = all(count.strip().isdecimal() and int(count) > 0 for count in counts)
    return None if fits else "a number of steps above 0, such as 250; for ddpm and ddim also 10,15,20 or ddim50"


def read_channels(text: str) -> int | None:
    return None if text.lower() in ("all", "none") else int(text)


def check_interval(interval: tuple[float, float]) -> str | None:
    return None if interval[0] <= interval[1] else "two timesteps of which the first is not above the second"


def check_words(words: tuple[str, ...]) -> str | None:
    return None if all(word.strip() for word in words) else "numbers or names, none of them empty"


def check_file(path: str) -> str | None:
    return None if path else "the path of a file"
