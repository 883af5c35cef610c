"""Data parallelism: each rank computes the gradients of its rows of every batch, and torch's DDP averages them.

A transformer that does not fit is sharded besides (FSDP2): each rank has a part of each weight, and of its gradient,
moments and moving average; a block's weights are gathered while it is computed.

A step draws its random numbers for all rows of the batch, and each part takes its own rows. So the number of ranks,
like the number of parts that a batch is computed in, changes nothing but rounding. One thing is each part's own: the
weight of the tokenizer's adversarial loss, which needs the gradients of a part before they are added.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.models.transformer import Block, StochasticDepth, Transformer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a batch a part of it holds."""

    first: int
    count: int
    total: int
    """Rows of the whole batch."""

    def of(self, drawn: Tensor, dim: int = 0) -> Tensor:
        """The part's share of random numbers for the whole batch, along a dimension."""
        return drawn.narrow(dim, self.first, self.count)


def rows_of_part(batch: int, accumulate: int, part: int, group: ProcessGroup) -> Rows:
    """The rows of a rank's n-th part: ranks hold rows in order, and parts within them."""
    count = batch // accumulate // group.world_size
    return Rows((group.rank * accumulate + part) * count, count, batch)


def check_batch(batch: int, accumulate: int, group: ProcessGroup) -> None:
    """Check that a batch can be divided evenly.

    Raises:
        UsageError: it cannot.
    """
    if batch % (accumulate * group.world_size):
        raise UsageError(
            f"--batch-size must be a multiple of {group.world_size} processes times --grad-accum {accumulate} "
            f"(got {batch})"
        )


def share_rows(model: nn.Module, rows: Rows) -> None:
    """Tell layers with random numbers per row which rows come next."""
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.rows = (rows.first, rows.total)


def data_parallel(module: nn.Module, group: ProcessGroup, device: torch.device, *, unused: bool = False) -> nn.Module:
    """Return the module to call in training: the module itself, or DDP around it with several ranks.

    Args:
        module: on its device.
        group: the ranks.
        device: of the module.
        unused: whether some weights get no gradient in some steps.
    """
    if group.world_size == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch renames broadcast_buffers, which older ones need
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # they follow from the weights and from sums over all ranks
            gradient_as_bucket_view=True,
            find_unused_parameters=unused,
        )


def without_averaging(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Keep gradients on their rank until the last part of a batch, when DDP averages the sum of all parts."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


# --- shards ------------------------------------------------------------------------------------------


def shard(model: Transformer, group: ProcessGroup, device: torch.device, *, bf16: bool) -> None:
    """Shard each weight over the ranks; the model is called as before.

    Args:
        model: a plain transformer; its weights become DTensors.
        group: the ranks.
        device: where the shards go.
        bf16: gather weights in bf16. Gradients are summed in float32 all the same.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (group.world_size,))
    # What enters a block stays as it is: the residual stream of bf16 autocast is float32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing of ours changes it in place
    for block in cast("Iterable[Block]", model.blocks):
        # The modulations of all blocks are computed before the first block.
        if not model.config.shared_adaln:
            fully_shard(block.ada_lin, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if model.config.shared_adaln:
            register_fsdp_forward_method(block, "modulate")
    fully_shard(model, mesh=mesh, mp_policy=policy)


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's part of a weight, a DTensor."""
    # Told by its method: to import the class takes half a second, and most runs have none.
    return hasattr(tensor, "full_tensor")


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a tensor, as a weight has it; the tensor itself if the weight is whole."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    weight = cast("DTensor", like)
    return distribute_tensor(tensor.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def gather(tensor: Tensor) -> Tensor:
    """Return a tensor whole. To be called by all ranks."""
    return cast("DTensor", tensor).full_tensor() if is_shard(tensor) else tensor


def gather_on_main(tensors: Mapping[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Return tensors whole and in main memory on the main rank, none on the others. To be called by all ranks."""
    found = {}
    for name, tensor in tensors.items():
        whole = gather(tensor)
        if group.is_main:
            found[name] = whole.cpu()  # all of them may be more than a GPU holds
    return found


def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a model, sharded or not.

    Raises:
        RuntimeError: it is not that of the model.
    """
    own = model.state_dict()
    model.load_state_dict({name: shard_like(tensor, own.get(name, tensor)) for name, tensor in tensors.items()})


# --- what ranks exchange -----------------------------------------------------------------------------


def mean_over_ranks(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return the means of tensors over all ranks, in one exchange."""
    if group.world_size == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    parts = (flat / group.world_size).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def sum_over_ranks(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if group.world_size > 1:
        dist.all_reduce(tensor)
    return tensor


def rows_of_all(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the rows of all ranks, one rank's after the other's."""
    if group.world_size == 1:
        return tensor
    found = [torch.empty_like(tensor) for _ in range(group.world_size)]
    dist.all_gather(found, tensor.contiguous())
    return torch.cat(found)
