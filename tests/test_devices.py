"""Which precision "auto" takes, and what it says of it."""

import pytest
import torch

from varcli.acceleration import devices
from varcli.acceleration.devices import cpu_computes_bf16, pick_dtype, precision_reason

CPU = torch.device("cpu")


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_on_processors_made_for_it(monkeypatch, has, expected):
    monkeypatch.setattr(devices, "cpu_computes_bf16", lambda: has)
    assert pick_dtype("auto", CPU) == expected
    assert pick_dtype("fp32", CPU) == "fp32"
    assert pick_dtype("auto", torch.device("mps")) == "fp32"
    assert precision_reason(expected, CPU) == (
        f"computing on cpu in {expected}: this processor has {'' if has else 'no '}instructions for bf16"
    )


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
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert cpu_computes_bf16() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_computes_bf16() is False
