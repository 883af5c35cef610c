"""Schedules, initial weights, moving average and optimizer, with state that is saved without pickle.

Random states need no saving: every step seeds torch from the run's seed and its own number.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from varcli.errors import UsageError
from varcli.models.transformer import Block, Transformer
from varcli.training.parallel import gather, is_shard, shard_like

WARM_UP = 0.02
"""Fraction of the steps in which the learning rate rises from WARM_UP_FROM to 1."""
WARM_UP_FROM = 0.005


def warm_up_or(step: int, steps: int, after: float) -> float:
    """Return the warm-up's factor while it lasts, then `after`."""
    length = WARM_UP * steps
    return WARM_UP_FROM + (1 - WARM_UP_FROM) * step / length if step < length else after


def progress_after_warm_up(step: int, steps: int) -> float:
    """Return p from 0 to 1 over the steps that follow the warm-up."""
    length = WARM_UP * steps
    return min(max(step - length, 0) / max(steps - 1 - length, 1), 1)


def linear_factor(step: int, steps: int, final: float) -> float:
    """Return the transformer's learning rate as a fraction of its peak.

    Source: "lin0" of the released recipe: 1 while p < 0.05, then linear to `final`.
    """
    p = progress_after_warm_up(step, steps)
    return warm_up_or(step, steps, 1 if p < 0.05 else final + (1 - final) * (1 - p) / 0.95)


def cosine_factor(step: int, steps: int, final: float) -> float:
    """Return the tokenizer's learning rate as a fraction of its peak: a half cosine down to `final`."""
    p = progress_after_warm_up(step, steps)
    return warm_up_or(step, steps, final + (1 - final) * (1 + math.cos(math.pi * p)) / 2)


def weight_decay(step: int, steps: int, first: float, last: float) -> float:
    """Return the weight decay of a step: a half cosine from `first` to `last` over all steps."""
    p = step / max(steps - 1, 1)
    return last + (first - last) * (1 + math.cos(math.pi * p)) / 2


HEAD_FACTOR = 0.02
ADA_FACTOR = 0.5


@torch.no_grad()
def initialize_transformer(model: Transformer, gamma: float) -> None:
    """Initialize all weights from torch's global generator.

    Args:
        model: the transformer.
        gamma: factor of the rows behind the gates γ1 and γ2.

    Source: released training recipe (SPEC of the checkpoints): truncated normals of standard deviation
    sqrt(1/(3 D)), what follows attention and feed-forward divided by sqrt(2 depth).
    """
    width, depth = model.config.width, model.config.depth
    std = math.sqrt(1 / (3 * width))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    nn.init.trunc_normal_(model.pos_start, std=std)
    nn.init.trunc_normal_(model.pos_1LC, std=std)
    for block in cast("Iterable[Block]", model.blocks):
        block.attn.proj.weight.div_(math.sqrt(2 * depth))
        block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
        if model.config.shared_adaln:
            block.ada_gss.normal_(std=width**-0.5)
            block.ada_gss[:, :, :2].mul_(gamma)
            block.ada_gss[:, :, 2:].mul_(ADA_FACTOR)
        else:
            _scale_modulation(block.ada_lin.linear, width, gamma)
    model.head_nm.ada_lin.linear.weight.mul_(ADA_FACTOR)
    model.head.weight.mul_(HEAD_FACTOR)


def _scale_modulation(linear: nn.Linear, width: int, gamma: float) -> None:
    linear.weight[: 2 * width].mul_(gamma)
    linear.weight[2 * width :].mul_(ADA_FACTOR)


Tensors = dict[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)


def mixed_seed(seed: int, number: int) -> int:
    """Return a seed of 32 bits, all that torch's CPU generator uses, for the n-th use of a run's seed."""
    return (number + seed * 2_654_435_761) % 2**32


def make_deterministic(device: torch.device) -> None:
    """Make CUDA use its deterministic kernels, without which no two runs are equal; a CPU always does.

    Operations without one only warn, except masked attention, whose memory-efficient form is switched off.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling memory that nothing reads would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.enable_mem_efficient_sdp(False)


def seed_step(seed: int, step: int) -> None:
    """Make all of torch's random draws of one step a function of the run's seed and the step's number."""
    torch.manual_seed(mixed_seed(seed, step))


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the same tensors under `prefix.name`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors under `prefix.`, their names shortened by it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


class MovingAverage(Generic[Model]):
    """A copy of a model whose weights trail the trained ones, which evens out the last steps."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model`, fast at first: a constant decay would keep too much of the random start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        # One kernel launch on a GPU for all weights, not one each.
        get_ema_multi_avg_fn(decay)(list(self.model.parameters()), list(model.parameters()), 0)

    def shard_like(self, model: nn.Module) -> None:
        """Shard the average like `model`, which was sharded after it was copied."""
        named = zip(self.model.named_parameters(), model.parameters(), strict=True)
        _replace_parameters(self.model, {name: shard_like(own, parameter) for (name, own), parameter in named})

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the shards meanwhile, so that the model can be used. To be called by all ranks."""
        shards = {name: weight for name, weight in self.model.named_parameters() if is_shard(weight)}
        _replace_parameters(self.model, {name: gather(weight) for name, weight in shards.items()})
        try:
            yield
        finally:
            _replace_parameters(self.model, shards)


def _replace_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace weights by other tensors, by name."""
    for name, tensor in tensors.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, nn.Parameter(tensor, requires_grad=False))


def freeze(model: nn.Module, patterns: str) -> None:
    """Freeze the weights whose names match one of the patterns, such as "encoder.*" (comma-separated).

    Raises:
        UsageError: a pattern matches no name, or no weight is left to train.
    """
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matching = [weight for name, weight in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matching:
            raise UsageError(f"--freeze {pattern} matches no weight; names are such as {_some_names(model)}")
        for weight in matching:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UsageError(f"--freeze {patterns} leaves no weight to train")


def _some_names(model: nn.Module) -> str:
    """A few names of weights, spread over the model."""
    names = [name for name, _ in model.named_parameters()]
    return ", ".join(names[:: max(len(names) // 4, 1)])


def adamw(model: nn.Module, betas: tuple[float, float], exempt: Iterable[str] = ()) -> torch.optim.AdamW:
    """Return AdamW whose first group decays and whose second does not.

    Biases, tensors of one dimension, and those whose name contains a part in `exempt` do not decay.
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


def learning_rate(optimizer: torch.optim.AdamW) -> Tensor:
    """Return the learning rate of the last step, 0-dimensional."""
    return torch.tensor(float(optimizer.param_groups[0]["lr"]))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """Return the optimizer's moments by the name of the parameter they belong to."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Set the moments that `optimizer_tensors` returned.

    Raises:
        ValueError: some of a parameter are missing, or of another shape.
    """
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        for key, value in tensors.items():
            if key.rpartition(".")[0] == name:
                # The fused kernel needs moments with the memory layout of their parameter, channels last or not.
                # It also needs the count of steps on the parameter's device.
                of_weight = value.shape == parameter.shape
                like = torch.empty_like(parameter if of_weight else value, device=parameter.device)
                moment = like.copy_(shard_like(value, parameter) if of_weight else value)
                optimizer.state[parameter][key.rpartition(".")[2]] = moment
        shapes = {key: value.shape for key, value in optimizer.state.get(parameter, {}).items()}
        if shapes and shapes != {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise ValueError(f"the moments of {name} are not whole")


def identity(images: str, device: torch.device, bf16: bool, **configs: Any) -> dict[str, Any]:
    """Return all that a run's result depends on, by name, for a resumed run to compare.

    Args:
        images: fingerprint of the training images.
        device: where it trains, since devices round differently.
        bf16: whether the network runs in bf16.
        configs: configurations, or anything JSON holds.
    """
    found: dict[str, Any] = {"pictures": images, "device": device.type, "bf16": bf16}
    for kind, config in configs.items():
        found |= (
            dataclasses.asdict(config)
            if dataclasses.is_dataclass(config) and not isinstance(config, type)
            else {kind: config}
        )
    return found
