"""The kernels for a GPU, without one: interpreted they do what torch's operations do, and they can be compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from varcli.models.fused_gpu import GpuBlock, gpu_block

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="this torch has no Triton")


@needs_triton
def test_interpreted_they_do_what_the_operations_of_torch_do():
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_they_compile_for_gpus_that_are_not_here(capability, half, tmp_path, monkeypatch):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from varcli.models import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    vectors = dict.fromkeys(("gamma", "factor", "shift"), "*fp32")
    sizes = dict.fromkeys(("length", "vector_stride", "row_stride", "head_stride"), "i32")
    types = {"x": "*fp32", "out": f"*{half}", "h": f"*{half}", **vectors, **sizes}
    types |= {"qkv": f"*{half}", "temperature": "*fp32", "keys": f"*{half}", "values": f"*{half}"}
    for kernel, constants in (
        (kernels._advance, {"width": 1920, "block": 2048, "adds": True}),
        (kernels._normalize, {"heads": 30, "block": 32, "channels": 64}),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = compile_kernel(source, GPUTarget("cuda", capability, 32), {"enable_fp_fusion": True})
        assert compiled.asm["cubin"] and compiled.metadata.shared < 48 * 1024
        assert ".local" not in compiled.asm["ptx"]  # all fits into registers


def test_without_triton_or_a_gpu_the_operations_of_torch_are_used(monkeypatch):
    gpu_block.cache_clear()
    assert gpu_block(torch.device("cpu"), torch.bfloat16) is GpuBlock  # compiled, they run on a GPU alone
    gpu_block.cache_clear()
    monkeypatch.setitem(sys.modules, "varcli.models.kernels", None)
    assert gpu_block(torch.device("cpu"), torch.bfloat16) is GpuBlock
    gpu_block.cache_clear()
