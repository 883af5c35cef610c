"""Numbers, dates and settings as a report writes them."""

import math
import re
from collections.abc import Mapping
from typing import Any

NARROW = "\N{NARROW NO-BREAK SPACE}"
FIGURE_SPACE = "\N{FIGURE SPACE}"
"""As wide as a digit: lines up numbers of fewer decimals."""
NONE = "–"
LARGEST = 1e15
"""No figure is as large; larger numbers are a mistake."""


def fixed(value: float | None, digits: int, scale: float = 1) -> str:
    """Return a figure with so many digits after the point, never -0.00; a dash for none."""
    if value is None:
        return NONE
    return f"{round(value * scale, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def grouped(count: float | None) -> str:
    """Return a whole number in groups of three digits, from five digits on."""
    if count is None:
        return NONE
    return f"{count:,.0f}".replace(",", NARROW) if abs(count) >= 10_000 else f"{count:.0f}"


def decimals(value: float) -> str:
    """Return a figure of unknown size to four digits."""
    return f"{value:.4g}"


def rounded(value: float, step: float) -> str:
    """Return a tick's text: as many decimals as the step between ticks needs, and k or M for thousands and millions."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size and step >= size / 1000 and abs(value) >= 10 * 1e3:
            return f"{value / size:g}{NARROW}{unit}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def shortened_hash(digest: str) -> str:
    """Return the beginning of a hash, enough to tell it from others."""
    return digest[:12]


def shortened(text: str) -> str:
    """Return a setting so that it fits into a narrow column: of a hash the beginning."""
    return shortened_hash(text) if re.fullmatch(r"[0-9a-f]{64}", text) else text


def moment(date: str) -> str:
    """Return a date of ISO 8601 to the minute, any other text as it is."""
    day, _, time = date.partition("T")
    return f"{day} {time[:5]} UTC" if len(day) == 10 and len(time) >= 5 else date


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def value_in_words(value: Any) -> str:
    """Return the value of a setting."""
    if value is None or value in ("", [], {}):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_in_words(inside)}" for name, inside in value.items())
    if isinstance(value, list):
        return ", ".join(map(value_in_words, value))
    return f"{value:g}" if isinstance(value, float) else grouped(value) if isinstance(value, int) else str(value)
