"""Numbers, dates and settings as a report writes them."""

import re
from collections.abc import Mapping
from typing import Any

NARROW = "\N{NARROW NO-BREAK SPACE}"
FIGURE_SPACE = "\N{FIGURE SPACE}"
"""As wide as a digit: lines up numbers of fewer decimals."""
NONE = "–"


def fixed(value: float | None, digits: int) -> str:
    """A figure with this number of digits after the decimal point, never -0.00; a dash for None."""
    if value is None:
        return NONE
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def as_published(value: float) -> str:
    """Write one of the paper's figures as the paper does."""
    return f"{value:.{1 if value >= 100 else 2}f}"


def grouped(count: float) -> str:
    """Write a whole number in groups of three digits, from five digits on."""
    return f"{count:,.0f}".replace(",", NARROW) if abs(count) >= 10_000 else f"{count:.0f}"


def decimals(value: float) -> str:
    """Write a figure of unknown size to four digits."""
    return f"{value:.4g}"


def heading(title: str) -> str:
    """Begin a title with a capital, unless it has capitals of its own (rFID)."""
    return title if any(map(str.isupper, title)) else title.capitalize()


def shortened_path(path: str) -> str:
    """The last two parts of a path, of any operating system."""
    return "/".join([part for part in re.split(r"[\\/]", path) if part][-2:]) or path


def shortened_hash(text: str) -> str:
    """The beginning of a sha256; any other text as it is."""
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def date_and_time(date: str) -> str:
    """Write a date of ISO 8601 to the minute; any other text as it is."""
    day, _, time = date.partition("T")
    return f"{day} {time[:5]} UTC" if len(day) == 10 and len(time) >= 5 else date


def duration(seconds: float) -> str:
    """Write a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def setting(name: str, value: Any) -> str:
    """Write the value of a setting; seeds are numbers without groups."""
    if value is None or value in ("", [], {}):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting(key, inside)}" for key, inside in value.items())
    if isinstance(value, list):
        return ", ".join(setting(name, inside) for inside in value)
    if isinstance(value, int) and not name.endswith("seed"):
        return grouped(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
