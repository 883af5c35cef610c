"""What a killed run needs to go on: weights, their average, optimizer moments, all without pickle.

Randomness needs no saving: every update seeds torch from the run's seed and its own number.
"""

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


def mixed_seed(seed: int, number: int) -> int:
    """Return a seed of 32 bits, all that torch's generator on the CPU heeds, for the n-th use of a run's seed."""
    return (number + seed * 2_654_435_761) % 2**32


def make_deterministic(device: torch.device) -> None:
    """Have CUDA take its deterministic kernels, without which no two runs are equal; a CPU always does.

    Operations that have none only warn, save masked attention, whose memory-efficient form is left out.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling memory that nothing reads would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_mem_efficient_sdp(False)


def seed_step(seed: int, step: int) -> None:
    """Make all of torch's random draws of one update a function of the run's seed and the update's number."""
    torch.manual_seed(mixed_seed(seed, step))


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the same tensors under `prefix.name`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors under `prefix.`, their names shortened by it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


class MovingAverage(Generic[Model]):
    """A copy of a model whose weights trail the trained ones, which evens out the last updates."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model`, fast at first: a constant decay would remember the random beginning."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)


def adamw(model: nn.Module, betas: tuple[float, float], exempt: Iterable[str] = ()) -> torch.optim.AdamW:
    """Return AdamW whose first group decays and whose second does not.

    Without decay go biases, tensors of one dimension, and those whose name contains a part in `exempt`.
    """
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in exempt)
        (rest if free else decayed).append(parameter)
    return torch.optim.AdamW([{"params": decayed}, {"params": rest}], betas=betas, fused=True)


def set_rates(optimizer: torch.optim.AdamW, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all weights and the decay of the first group."""
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group["lr"], group["weight_decay"] = lr, decay


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """Return the optimizer's moments by the name of the parameter they belong to."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Set the moments that `optimizer_tensors` returned."""
    for name, parameter in model.named_parameters():
        for key, value in tensors.items():
            if key.rpartition(".")[0] == name:
                # The fused kernel walks memory, so a moment must lie as its parameter does, channels last or not.
                # Its kernel also wants the count of steps on the parameter's device.
                of_weight = value.shape == parameter.shape
                like = torch.empty_like(parameter if of_weight else value, device=parameter.device)
                optimizer.state[parameter][key.rpartition(".")[2]] = like.copy_(value)


def identity(pictures: str, device: torch.device, half: bool, **configs: Any) -> dict[str, Any]:
    """Return all that shapes a run's result, by name, for a resumed run to compare.

    Args:
        pictures: fingerprint of the training pictures.
        device: where it trains, since devices round differently.
        half: whether the network runs in bf16.
        configs: configurations, or anything JSON holds.
    """
    found: dict[str, Any] = {"pictures": pictures, "device": device.type, "bf16": half}
    for kind, config in configs.items():
        found |= (
            dataclasses.asdict(config)
            if dataclasses.is_dataclass(config) and not isinstance(config, type)
            else {kind: config}
        )
    return found
