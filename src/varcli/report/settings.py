"""All settings of evaluations and training runs, and which of them differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from varcli.report import formatting
from varcli.report.evaluations import Facts
from varcli.report.formatting import NONE
from varcli.report.tables import Cell, Row, Table, table

NAMES = {
    "what": "what was measured",
    "source.paths": "images from",
    "source.kind": "kind of images",
    "n": "number of images",
    "classes": "classes",
    "checkpoint.name": "checkpoint",
    "checkpoint.sha256": "sha256 of the checkpoint",
    "checkpoint.cfg": "guidance (cfg)",
    "checkpoint.top_k": "top-k",
    "checkpoint.top_p": "top-p",
    "checkpoint.smooth": "smooth",
    "checkpoint.approximate": "approximate",
    "checkpoint.seed": "seed",
    "checkpoint.device": "device",
    "checkpoint.dtype": "precision of numbers",
    "reference.name": "reference",
    "reference.sha256": "sha256 of the reference",
    "reference.n": "images in the reference",
    "reference.pixels": "their pixels a side",
    "extractor.name": "extractor",
    "extractor.sha256": "sha256 of the extractor",
    "protocol.is_splits": "splits (IS)",
    "protocol.is_shuffle_seed": "seed of the shuffle (IS)",
    "protocol.kid_subsets": "subsets (KID)",
    "protocol.kid_subset_size": "images a subset (KID)",
    "protocol.prc_k": "neighbours (precision, recall)",
    "protocol.pixels": "pixels a side",
    "protocol.resize": "resized",
    "protocol.rejected": "rejected",
    "seconds.total": "time",
    "seconds.images": "time for images",
    "seconds.features": "time for features",
    "version": "varcli",
    "date": "date",
}
"""What settings are called in a report; others go by the names that they have in the result."""
TOLD = (
    "checkpoint",
    "source",
    "n",
    "what",
    "classes",
    "reference",
    "extractor",
    "protocol",
    "version",
    "date",
    "seconds",
)
"""Parts of a result that are settings, in the order in which a report shows them."""


def of_evaluation(facts: Facts) -> dict[str, str]:
    """Return all settings of a result by their path, in words."""
    found: dict[str, str] = {}
    for part in TOLD:
        if (value := facts.get(part)) is None:
            continue
        inside = {f"{part}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {part: value}
        found |= {path: _setting(path, each) for path, each in inside.items()}
    return found


def _setting(path: str, value: Any) -> str:
    if path == "date":
        return formatting.moment(value)
    if path.startswith("seconds.") and isinstance(value, int | float):
        return formatting.duration(value)
    return str(value) if path.endswith("seed") else formatting.value_in_words(value)


def common_and_differing(caption: str, labels: Sequence[str], given: Sequence[Mapping[str, str]]) -> list[Table]:
    """Return a table of what tells several apart, the narrower way round, and one of what they have in common."""
    paths = list(dict.fromkeys(path for each in given for path in each))
    differing = [path for path in paths if len({each.get(path, NONE) for each in given}) > 1]
    headings = [NAMES.get(path, _plain(path)) for path in differing]
    shared = [
        Row(NAMES.get(path, _plain(path)), (Cell(given[0].get(path, NONE)),)) for path in paths if path not in differing
    ]
    values = [[Cell(formatting.shortened(each.get(path, NONE))) for path in differing] for each in given]
    if len(differing) > len(labels):
        labels, headings, values = headings, list(labels), [list(row) for row in zip(*values, strict=True)]
    apart = [Row(label, tuple(cells)) for label, cells in zip(labels, values, strict=True)]
    tables = [
        table(f"{caption}: where they differ", ("", *headings), [apart]) if differing else None,
        table(caption if len(given) == 1 else f"{caption}: the same for all", ("Setting", "Value"), [shared]),
    ]
    return [each for each in tables if each and each.groups[0] and len(each.headings) > 1]


def of_run(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a training run in words."""
    return {key: str(value) if key == "seed" else formatting.value_in_words(value) for key, value in settings.items()}


def _plain(path: str) -> str:
    return path.rpartition(".")[2].replace("_", " ")
