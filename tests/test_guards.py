"""Each trap on the way to a comparable figure has its warning, and a right run has none."""

import pytest

from varcli.evaluation import guards

NAMES = ["tench", "goldfish", "shark"]
PRESET = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False, "draft": ""}


@pytest.mark.parametrize(
    ("warnings", "wanted"),
    [
        (guards.few_pictures(2000, 12.34), "only 2000 pictures: FID is biased upwards, by at most about 12.3"),
        (guards.few_pictures(6000, 2.345), "only 6000 pictures: FID is biased upwards, by about 2.35"),
        (guards.few_pictures(9999, None), "only 9999 pictures: figures of so few are biased"),
        (guards.imbalance([0, 0, 1, 2], NAMES), "not balanced: 2 pictures of tench, 1 of goldfish"),
        (guards.imbalance([0, 1], NAMES), "1 of 3 classes have no picture"),
        (guards.lossy(3, 10), "3 of 10 pictures are JPEG"),
        (guards.other_size(64, 256), "pictures of 64 pixels a side against a reference of 256"),
        (
            guards.other_settings(PRESET | {"cfg": 4.0}, PRESET),
            "cfg 4.0 instead of 1.5: not the settings for measuring",
        ),
        (guards.other_settings(PRESET | {"top_k": 0}, PRESET), "top-k 0 instead of 900"),
        (guards.other_settings(PRESET | {"smooth": True}, PRESET), "smooth True instead of False"),
        (guards.other_settings(PRESET | {"draft": "cache"}, PRESET), "draft cache instead of"),
        (guards.other_precision("int8"), "int8: an approximation"),
        (guards.small_reference(2000), "a reference of only 2000 pictures: that biases FID too"),
        (guards.rejection("resnet101"), "pictures chosen by resnet101: to be compared with"),
        (
            guards.other_reference("mine.npz", "imagenet-256"),
            "measured against mine.npz; published figures are against",
        ),
        (guards.skipped(["a", "b", "c", "d"]), "4 pictures could not be read and are left out: a, b, c and 1 more"),
    ],
)
def test_a_trap_has_its_warning(warnings, wanted):
    (warning,) = warnings
    assert wanted in warning


@pytest.mark.parametrize(
    "warnings",
    [
        guards.few_pictures(10_000, 1.0),
        guards.imbalance([0, 1, 2, 0, 1, 2], NAMES),
        guards.imbalance([-1, -1], NAMES),
        guards.lossy(0, 10),
        guards.other_size(256, 256),
        guards.other_size(256, None),
        guards.other_settings(PRESET, PRESET),
        guards.other_precision("bf16"),
        guards.other_reference("imagenet-256", "imagenet-256"),
        guards.small_reference(10_000),
        guards.small_reference(None),
        guards.skipped([]),
    ],
)
def test_what_is_right_has_none(warnings):
    assert list(warnings) == []
