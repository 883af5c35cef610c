"""Each trap on the way to a comparable figure has its warning, and a right run has none."""

import pytest

from varcli.evaluation import comparability

NAMES = ["tench", "goldfish", "shark"]
PRESET = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False, "approximate": ""}


@pytest.mark.parametrize(
    ("warnings", "wanted"),
    [
        (comparability.few_images(2000, 12.34), "only 2000 images: FID is biased upwards, by at most about 12.3"),
        (comparability.few_images(6000, 2.345), "only 6000 images: FID is biased upwards, by about 2.35"),
        (comparability.few_images(9999, None), "only 9999 images: figures of so few are biased"),
        (comparability.imbalance([0, 0, 1, 2], NAMES), "not balanced: 2 images of tench, 1 of goldfish"),
        (comparability.imbalance([0, 1], NAMES), "1 of 3 classes have no image"),
        (comparability.lossy(3, 10), "3 of 10 images are JPEG"),
        (comparability.other_size(64, 256), "images of 64 pixels per side against a reference of 256"),
        (
            comparability.other_settings(PRESET | {"cfg": 4.0}, PRESET),
            "cfg 4.0 instead of 1.5: not the settings for measuring",
        ),
        (comparability.other_settings(PRESET | {"top_k": 0}, PRESET), "top-k 0 instead of 900"),
        (comparability.other_settings(PRESET | {"smooth": True}, PRESET), "smooth True instead of False"),
        (comparability.other_settings(PRESET | {"approximate": "cache"}, PRESET), "approximate cache instead of"),
        (comparability.several_series({"cfg 4": 3, "cfg 2": 1}), "together: 1 by cfg 2; 3 by cfg 4"),
        (comparability.other_precision("int8"), "int8: an approximation"),
        (comparability.small_reference(2000), "a reference of only 2000 images: it biases FID too"),
        (comparability.rejection("resnet101"), "images chosen by resnet101: to be compared with"),
        (
            comparability.other_reference("mine.npz", "imagenet-256"),
            "measured against mine.npz; published figures are against",
        ),
        (
            comparability.skipped(["a", "b", "c", "d"]),
            "left out as unreadable: 4 images: a, b, c and 1 more",
        ),
    ],
)
def test_a_trap_has_its_warning(warnings, wanted):
    (warning,) = warnings
    assert wanted in warning


@pytest.mark.parametrize(
    "warnings",
    [
        comparability.few_images(10_000, 1.0),
        comparability.imbalance([0, 1, 2, 0, 1, 2], NAMES),
        comparability.imbalance([-1, -1], NAMES),
        comparability.lossy(0, 10),
        comparability.other_size(256, 256),
        comparability.other_size(256, None),
        comparability.other_settings(PRESET, PRESET),
        comparability.several_series({"cfg 4": 3}),
        comparability.other_precision("bf16"),
        comparability.other_reference("imagenet-256", "imagenet-256"),
        comparability.small_reference(10_000),
        comparability.small_reference(None),
        comparability.skipped([]),
    ],
)
def test_what_is_right_has_none(warnings):
    assert list(warnings) == []
