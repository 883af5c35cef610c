"""The kernels for a GPU, without one: interpreted they do what torch's operations do, and they can be compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support import reference
from varcli.acceleration import dispatch
from varcli.acceleration.cuda_blocks import GpuBlock
from varcli.acceleration.dispatch import gpu_block, norm_kernel
from varcli.models.autoencoder import NormSilu

pytestmark = pytest.mark.slow

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="this torch has no Triton")


@needs_triton
def test_interpreted_they_do_what_the_operations_of_torch_do():
    script = Path(__file__).parent / "support" / "interpreted_kernels.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_they_compile_for_gpus_that_are_not_here(capability, half, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from varcli.acceleration import triton_kernels

    if capability == 100 and [int(part) for part in triton.__version__.split(".")[:2]] < [3, 3]:
        pytest.skip("this Triton knows no such GPU")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    vectors = dict.fromkeys(("gamma", "factor", "shift"), "*fp32")
    types = {"x": "*fp32", "out": f"*{half}", "h": f"*{half}", **vectors}
    types |= {"qkv": f"*{half}", "temperature": "*fp32", "keys": f"*{half}", "values": f"*{half}"}
    sizes = dict.fromkeys(("length", "vector_stride", "row_stride", "head_stride", "positions", "parts"), "i32")
    types |= sizes | {"weight": f"*{half}", "bias": f"*{half}", "sums": "*fp32", "factors": "*fp32"}
    for kernel, constants in (
        (triton_kernels._residual_norm, {"width": 1920, "block": 2048, "adds": True}),
        (triton_kernels._normalize, {"heads": 30, "block": 32, "channels": 64}),
        (triton_kernels._channel_sums, {"part": 512, "width": 160, "block": 256, "at_once": 16}),
        (triton_kernels._group_factors, {"width": 640, "size": 20, "block": 32, "parts_block": 512}),
        (triton_kernels._silu, {"width": 160, "block": 256, "at_once": 16}),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": True})
        assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024
        assert ".local" not in compiled.asm["ptx"]  # all fits into registers


def test_without_triton_or_a_gpu_the_operations_of_torch_are_used(monkeypatch):
    where = torch.device("cpu"), torch.bfloat16  # compiled, they run on a GPU alone
    assert gpu_block.__wrapped__(*where) is GpuBlock and norm_kernel.__wrapped__(*where) is None
    monkeypatch.setitem(sys.modules, "varcli.acceleration.triton_kernels", None)
    monkeypatch.setitem(sys.modules, "varcli.acceleration.triton_kernels", None)
    assert gpu_block.__wrapped__(*where) is GpuBlock and norm_kernel.__wrapped__(*where) is None


def test_models_on_a_gpu_in_16_bits_are_given_the_kernel_and_lose_it_elsewhere(monkeypatch):
    """The GPU is the meta device here, which says it is one."""

    class Gpu:
        type = "cuda"

    models = reference.load("mini")
    norms = [part for part in models.tokenizer.decoder.modules() if isinstance(part, NormSilu)]
    settings = {"tf32": torch.backends.cudnn.allow_tf32, "cudnn": torch.backends.cuda.cudnn_sdp_enabled()}
    monkeypatch.setattr(dispatch, "norm_kernel", lambda device, dtype: dtype)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *given, **named: self)
    try:
        for precision, kernel in {"bf16": torch.bfloat16, "fp32": None, "fp16": torch.float16}.items():
            dispatch.prepare(models.tokenizer, models.transformer, Gpu(), precision)
            assert {norm.kernel for norm in norms} == {kernel}
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cudnn.allow_tf32 = settings["tf32"]
        torch.backends.cuda.enable_cudnn_sdp(settings["cudnn"])
    dispatch.prepare(models.tokenizer, models.transformer, torch.device("cpu"), "fp32")
    assert {norm.kernel for norm in norms} == {None}


def test_the_decoder_takes_its_kernel_only_where_it_fits():
    norm, told = NormSilu(32), []
    norm.kernel = lambda itself, x_BCHW: told.append(itself is norm) or x_BCHW
    x_BCHW = torch.randn(1, 32, 4, 4)
    together = x_BCHW.to(memory_format=torch.channels_last)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x_BCHW, 32))
    torch.testing.assert_close(norm(together), expected, atol=1e-5, rtol=1e-4)  # a gradient may be asked for
    with torch.no_grad():
        torch.testing.assert_close(norm(x_BCHW), expected, atol=1e-5, rtol=1e-4)
        assert not told
        assert norm(together) is together and told == [True]
