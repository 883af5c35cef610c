"""What the JSON of an evaluation must hold, down to the last field that a report uses."""

import base64
import json
from collections.abc import Callable
from typing import Any, NoReturn

from varcli.errors import InputError
from varcli.report import formatting

Check = Callable[[Any, str], None]
"""Raises InputError unless a value is of some kind; the text says where the value stands."""
PNG = b"\x89PNG\r\n\x1a\n"
"""What every PNG file begins with."""


def _wrong(value: Any, where: str, wanted: str) -> NoReturn:
    shown = "missing" if value is None else json.dumps(value)[:40]
    raise InputError(f"evaluation result: {where} {shown}; {wanted}")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        _wrong(value, where, "a text")


def _number(value: Any, where: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < formatting.LARGEST:
        _wrong(value, where, "a number")


def _count(value: Any, where: str) -> None:
    _number(value, where)
    if not isinstance(value, int) or value < 0:
        _wrong(value, where, "a whole number, 0 or more")


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _wrong(value, where, "true or false")


def _band(value: Any, where: str) -> None:
    _listing(_number)(value, where)
    if len(value) != 2:
        _wrong(value, where, "the lowest and the highest")


def _setting(value: Any, where: str) -> None:
    """Check a value that is shown as it is."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, int | float) and not isinstance(part, bool):
            _number(part, where)
        elif isinstance(part, list | dict):
            _wrong(value, where, "a text, a number, yes or no, or a list of them")


def _image(value: Any, where: str) -> None:
    _text(value, where)
    try:
        if base64.b64decode(value, validate=True).startswith(PNG):
            return
    except ValueError:
        pass
    _wrong(value, where, "a PNG in base64")


def _optional(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _listing(check: Check) -> Check:
    def items(value: Any, where: str) -> None:
        if not isinstance(value, list):
            _wrong(value, where, "a list")
        for number, item in enumerate(value):
            check(item, f"{where}[{number}]")

    return items


def _record(**checks: Check) -> Check:
    """Return the check of an object with these fields; others are left alone."""

    def fields(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _wrong(value, where, "an object")
        dot = "" if where.endswith(" ") else "."
        for field, check in checks.items():
            check(value.get(field), f"{where}{dot}{field}")

    return fields


def _settings(**checks: Check) -> Check:
    """Return the check of an object with these fields, all of which are shown, and so are others."""

    def fields(value: Any, where: str) -> None:
        _record(**checks)(value, where)
        for field, each in value.items():
            _setting(each, f"{where}.{field}")

    return fields


METRICS = (
    *("fid", "fid_infinity", "inception_score", "inception_score_std", "kid", "kid_std", "precision", "recall"),
    *("rfid", "rfid_infinity", "psnr", "ssim", "lpips"),
)
FIELDS = "checkpoint", "source", "classes", "reference", "published", "per_class", "warnings", "seconds", "pictures"
"""Of a result, those that may be missing, which says the same as null."""
RESULT = _record(
    version=_text,
    date=_text,
    what=_text,
    checkpoint=_optional(_settings(name=_text, sha256=_text)),
    source=_optional(_settings(paths=_listing(_text))),
    n=_count,
    classes=_optional(_count),
    reference=_optional(_settings(name=_text, sha256=_text)),
    extractor=_settings(name=_text, sha256=_text),
    protocol=_settings(),
    metrics=_record(**dict.fromkeys(METRICS, _optional(_number)), codebook_usage=_optional(_listing(_number))),
    published=_optional(
        _record(
            fid=_optional(_number),
            inception_score=_optional(_number),
            band=_optional(_band),
            inside=_optional(_flag),
        )
    ),
    per_class=_optional(_listing(_record(name=_text, n=_count, spread=_optional(_number)))),
    warnings=_optional(_listing(_text)),
    seconds=_optional(_settings()),
    images=_optional(_listing(_image)),
)
"""The check of a whole result; what a report does not use may be anything."""
