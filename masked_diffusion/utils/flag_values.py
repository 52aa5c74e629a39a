"""Flags whose values are more than a number: how their text is read, and which values are allowed.

A `read_*` function turns the text into a value. A `check_*` function returns None if the value is allowed, else the
requirement, for the message "--NAME is VALUE: it must be REQUIREMENT".
"""

import math
from collections.abc import Callable

from .trackers import TRACKERS

MAX_SIGMA_REL = 12**-0.5  # relative width of the plain average of all steps (Karras et al. 2024, eq. 123)


def split_numbers(text: str) -> tuple[float, ...]:
    """The numbers in a text such as `0.9999,0.999`; "" holds none.

    :raises ValueError: when a part is not a number.
    """
    return tuple(float(part) for part in text.split(",")) if text else ()


def read_list(text: str) -> str:
    """For numbers separated by commas, which may be followed by spaces: the text without the spaces."""
    return ",".join(part.strip() for part in text.split(","))


def check_list(text: str, fits: Callable[[float], bool], requirement: str) -> str | None:
    """For numbers separated by commas: all must be different and fit."""
    try:
        numbers = split_numbers(text)
    except ValueError:
        return requirement
    return None if all(map(fits, numbers)) and len(set(numbers)) == len(numbers) else requirement


def check_ema_rates(text: str) -> str | None:
    """For `--ema_rate`."""
    requirement = "different numbers, at least 0 and below 1, separated by commas, such as 0.9999 or 0.999,0.9999"
    return requirement if not text else check_list(text, lambda rate: 0 <= rate < 1, requirement)


def check_phema_widths(text: str) -> str | None:
    """For `--phema`."""
    requirement = f"different widths above 0 and below {MAX_SIGMA_REL:.4f}, with at most three decimals, or empty"
    return check_list(text, lambda width: 0 < width < MAX_SIGMA_REL and round(width, 3) == width, requirement)


def check_loggers(text: str) -> str | None:
    """For `--loggers`."""
    names = text.split(",") if text else []
    fits = set(names) <= set(TRACKERS) and len(set(names)) == len(names)
    return None if fits else f"some of {', '.join(TRACKERS)}, separated by commas, or empty"


def read_gamma(text: str) -> float | str | None:
    """For `--snr_gamma`: a number, None or auto."""
    words = {"none": None, "auto": "auto"}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text  # `check_gamma` refuses it in a sentence


def check_gamma(value: float | str) -> str | None:
    """For `--snr_gamma`."""
    requirement = "a number above 0, None (no weight) or auto (the default of the model's family)"
    return None if value == "auto" or (type(value) in (int, float) and 0 < value < math.inf) else requirement


def read_microbatch(text: str) -> int | str:
    """For `--microbatch`: a number or auto."""
    try:
        return int(text)
    except ValueError:
        return text  # `check_microbatch` refuses it in a sentence


def check_microbatch(value: int | str) -> str | None:
    """For `--microbatch`."""
    fits = value == "auto" or (type(value) is int and value >= -1)
    return None if fits else "a whole number of images, -1 (all of batch_size) or auto"


def check_source(text: str) -> str | None:
    """For `--model_path`."""
    return None if text else "a checkpoint, a training folder or a hub id"


def check_steps(text: str) -> str | None:
    """For `--num_sampling_steps`."""
    counts = text.removeprefix("ddim").split(",")
    fits = all(count.strip().isdecimal() and int(count) > 0 for count in counts)
    return None if fits else "a number of steps above 0, such as 250; for ddpm and ddim also 10,15,20 or ddim50"


def check_no_respacing(text: str) -> str | None:
    """For `--timestep_respacing` of training."""
    return "empty, since training draws from all of --diffusion_steps" if text else None


def read_channels(text: str) -> int | str | None:
    """For `--guided_channels`: a number, None for all channels, or auto."""
    words = {"all": None, "none": None, "auto": "auto"}
    return words[text.lower()] if text.lower() in words else int(text)


def check_channels(value: int | str) -> str | None:
    """For `--guided_channels`."""
    return None if value == "auto" or (type(value) is int and value >= 1) else "at least 1, all (None) or auto"


def check_interval(interval: tuple[float, float]) -> str | None:
    """For `--guidance_interval`."""
    return None if interval[0] <= interval[1] else "two timesteps, the smaller one first"


def check_words(words: tuple[str, ...]) -> str | None:
    """For lists of classes, which are numbers or names."""
    return None if all(word.strip() for word in words) else "numbers or names, none of them empty"


def check_file(path: str) -> str | None:
    """For the names of files to write."""
    return None if path else "the path of a file"
