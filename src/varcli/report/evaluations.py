"""Results of `var eval`, read from files and given names."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varcli.errors import InputError
from varcli.evaluation.results import FORMAT, KIND
from varcli.report import formatting
from varcli.report.checks import FIELDS, RESULT

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one `var eval` measured."""

    facts: Facts
    """The result's JSON."""
    label: str
    """What to call it: the name of what was measured, and what tells it from others of that name."""
    number: int
    """Its place among all of a report."""

    @property
    def metrics(self) -> Facts:
        """Its figures by name."""
        return dict(self.facts["metrics"])

    @property
    def ground(self) -> tuple[str, ...]:
        """What two results must have in common for their distances to be comparable: reference, extractor, size."""
        reference = (self.facts["reference"] or {}).get("sha256", "")
        sizes = [str(self.facts["protocol"].get(key)) for key in ("pixels", "resize")]
        return reference, self.facts["extractor"]["sha256"], *sizes


def parse(content: bytes, origin: str) -> list[Facts]:
    """Return the results in a file's bytes: one JSON object, or several one after the other.

    Raises:
        InputError: it holds none, or something else; `origin` names it.
    """
    found: list[Facts] = []
    for line, value in _values(content, origin):
        where = f"{origin}, line {line}"
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise InputError(
                f"evaluation result: {where}; something else, where `var eval --out` or `--json` is needed"
            )
        if value.get("format") != FORMAT:
            raise InputError(f"evaluation result: {where} has format {value.get('format')}; this varcli reads {FORMAT}")
        RESULT(value, f"{where}: ")
        found.append(dict.fromkeys(FIELDS) | value)
    if not found:
        raise InputError(f"evaluation result: {origin}; nothing in it, where results of `var eval` are needed")
    return found


def _values(content: bytes, origin: str) -> Iterator[tuple[int, Any]]:
    """Yield each JSON value with the line it begins in."""
    decoder, position = json.JSONDecoder(), 0
    try:
        text = content.decode(json.detect_encoding(content)).rstrip()
        while position < len(text):
            position = re.compile(r"\s*").match(text, position).end()  # type: ignore[union-attr]
            line = text.count("\n", 0, position) + 1
            value, position = decoder.raw_decode(text, position)
            yield line, value
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"evaluation result: {origin}; no JSON{place}; a result of `var eval` is needed") from error


def named(found: Sequence[Facts]) -> list[Evaluation]:
    """Return results with labels that tell them apart, numbered where they say the same of themselves."""
    names = [name(facts) for facts in found]
    labels = [[each] for each in names]
    for path, text in TELLING:
        values = [_said(text, _inside(facts, path)) for facts in found]
        for i, value in enumerate(values):
            others = {values[j] for j in range(len(found)) if names[j] == names[i]}
            if value and len(others) > 1:
                labels[i].append(value)
        if len(set(map(tuple, labels))) == len(labels):
            break
    said = [", ".join(parts) for parts in labels]
    repeated = [said[:number].count(label) for number, label in enumerate(said)]
    return [
        Evaluation(facts, f"{label} ({before + 1})" if before else label, number)
        for number, (facts, label, before) in enumerate(zip(found, said, repeated, strict=True))
    ]


def name(facts: Facts) -> str:
    """Return what was measured: a checkpoint by name, or images by the end of their path."""
    if facts["checkpoint"]:
        return shortened(facts["checkpoint"]["name"])
    paths = facts["source"]["paths"] if facts["source"] else []
    return " + ".join(map(shortened, paths)) or "images"


def shortened(path: str) -> str:
    """Return the last two parts of a path, whichever system's."""
    return "/".join([part for part in re.split(r"[\\/]", path) if part][-2:]) or path


TELLING = (
    ("what", "{}"),
    ("checkpoint.cfg", "cfg {}"),
    ("checkpoint.top_k", "top-k {}"),
    ("checkpoint.top_p", "top-p {}"),
    ("checkpoint.smooth", "smooth {}"),
    ("checkpoint.approximate", "approximate {}"),
    ("checkpoint.dtype", "{}"),
    ("protocol.rejected", "rejected {}"),
    ("n", "n {}"),
    ("reference.name", "against {}"),
    ("checkpoint.seed", "seed {}"),
    ("checkpoint.sha256", "{:.8}"),
    ("date", "{}"),
)
"""What tells results of one name from each other, the most telling first, and how a label says it."""


def _said(text: str, value: Any) -> str:
    return "" if value is None else text.format(value if isinstance(value, str) else formatting.value_in_words(value))


def _inside(facts: Facts, path: str) -> Any:
    value: Any = facts
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
