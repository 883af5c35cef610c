"""Which precision "auto" takes, and what it says of it."""

import platform

import pytest
import torch

from varcli.acceleration import devices
from varcli.acceleration.devices import cpu_computes_bf16, pick_dtype, precision_note

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_on_processors_made_for_it(monkeypatch, has, expected):
    monkeypatch.setattr(devices, "cpu_computes_bf16", lambda: has)
    assert pick_dtype("auto", CPU) == expected
    assert pick_dtype("fp32", CPU) == "fp32"
    assert pick_dtype("auto", torch.device("mps")) == "fp32"


@pytest.mark.parametrize(
    ("device", "precision", "told"), [("cpu", "bf16", 0), ("cuda", "fp32", 0), ("cuda", "bf16", 1)]
)
def test_a_precision_is_told_where_images_depend_on_the_batch(device, precision, told):
    note = precision_note(precision, torch.device(device))
    assert (note is not None) == told and (not told or note.endswith("--dtype fp32 avoids it"))


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "onednn", "expected"),
    [
        ("x86_64", True, False, True, True),
        ("x86_64", False, True, True, True),
        ("AMD64", False, False, True, False),  # AVX-512 alone emulates it
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_bf16_counts_where_the_processor_has_it(monkeypatch, machine, avx512, amx, onednn, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert cpu_computes_bf16() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_computes_bf16() is False
