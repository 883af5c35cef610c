"""A GPU that is not there: tensors that say they are on CUDA and hold nothing, and what watches the operations on them.

It shows whether shapes, precisions and devices fit together, whether anything would make the host wait for the
GPU, and how much memory is taken, for models of any size.
"""

import weakref
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varcli.acceleration import dispatch
from varcli.acceleration.cuda_blocks import GpuBlock

CUDA = torch.device("cuda", 0)

WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
"""Operations that a CUDA graph cannot hold: their results would be needed on the host, or be equal in every batch.

Attention is one of the latter only with dropout."""


@contextmanager
def pretended(monkeypatch, *models):
    """Make tensors on CUDA possible, without values, and put models there that are on the meta device."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    # On a machine with a GPU kernels would be started on memory that is not there.
    monkeypatch.setattr(dispatch, "gpu_block", lambda device, dtype: GpuBlock)
    with FakeTensorMode():
        for model in models:
            _move(model)
        yield


def _move(model):
    """What `Module.to` cannot do here."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                    held[name] = torch.nn.Parameter(there, False) if held is module._parameters else there


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Sees every operation: fails at one that no graph could hold, and counts the bytes that are alive."""

    def __init__(self, graph_safe=True):
        super().__init__()
        self.graph_safe, self.count, self.alive, self.peak, self.known = graph_safe, 0, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors((args, kwargs)):
            self._watch(tensor, counted=False)  # made before
        made = func(*args, **(kwargs or {}))
        self.count += 1
        if self.graph_safe:
            assert "attention" in func.name() or not WAITING & set(func.tags), f"{func} has to wait, or draws numbers"
            given = [t for t in tensors((args, kwargs)) if t.ndim > 0]  # those without a dimension are plain numbers
            assert all(t.device == CUDA for t in (*given, *tensors(made))), f"{func} goes to the host and back"
        for tensor in tensors(made):
            self._watch(tensor, counted=True)
        return made

    def _watch(self, tensor, counted):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self.known.discard(key)
        self.alive -= size
