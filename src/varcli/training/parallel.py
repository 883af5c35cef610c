"""Data parallelism: each rank computes the gradients of its rows of every batch, and torch's DDP averages them.

What a step draws at random it draws for all rows of the batch, and each part takes its own rows. So the number of
ranks, like the number of parts a batch is computed in, changes nothing but rounding.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from varcli.distributed import ProcessGroup
from varcli.errors import UsageError
from varcli.models.transformer import StochasticDepth


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of a batch a part of it holds."""

    first: int
    count: int
    total: int
    """Rows of the whole batch."""

    def of(self, drawn: Tensor, dim: int = 0) -> Tensor:
        """The part's share of what was drawn for the whole batch along a dimension."""
        return drawn.narrow(dim, self.first, self.count)


def rows_of_part(batch: int, accumulate: int, part: int, group: ProcessGroup) -> Rows:
    """The rows of a rank's n-th part: ranks hold rows in order, and parts within them."""
    count = batch // accumulate // group.world_size
    return Rows((group.rank * accumulate + part) * count, count, batch)


def check_batch(batch: int, accumulate: int, group: ProcessGroup) -> None:
    """Check that a batch comes out even.

    Raises:
        UsageError: it does not.
    """
    if batch % (accumulate * group.world_size):
        raise UsageError(
            f"--batch-size must be a multiple of {group.world_size} processes times --grad-accum {accumulate} "
            f"(got {batch})"
        )


def share_rows(model: nn.Module, rows: Rows) -> None:
    """Tell the layers that draw per row which rows come next."""
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.rows = (rows.first, rows.total)


def data_parallel(module: nn.Module, group: ProcessGroup, device: torch.device, *, unused: bool = False) -> nn.Module:
    """Return what is to be called in training: the module, or DDP around it where there are several ranks.

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
    """Keep gradients on their rank until the last part of a batch, when DDP averages what all parts added up to."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


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
