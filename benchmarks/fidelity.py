"""What 16 and 8 bits cost: logits in each precision compared with float32, given the same tokens.

    python benchmarks/fidelity.py [--checkpoint NAME|FILE] [--images 4] [--device auto] [--json]

All precisions are teacher-forced on tokens sampled in float32, since free-running ones diverge after the first token
that is sampled differently. Without a checkpoint the models have the d16's shape and random weights.
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from models import Models, named_models
from sampling import CONFIG
from tables import print_rows
from torch import Tensor

from varcli.acceleration.devices import check_int8, pick_device
from varcli.acceleration.dispatch import prepare
from varcli.errors import UsageError
from varcli.sampling.sampler import ScaleModel, generate


def precisions(device: torch.device) -> list[str]:
    """Return the precisions to compare with float32."""
    try:
        check_int8(device)
    except UsageError:
        return ["bf16", "fp16"]
    return ["bf16", "fp16", "int8"]


@torch.inference_mode()
def logits(models: Models, row: int, tokens: Sequence[Tensor]) -> Tensor:
    """Return the guided logits (L, V) of all scales given these token maps, on the CPU."""
    model, quantizer = ScaleModel(models[1], [row], CONFIG), models[0].quantize
    given = quantizer.teacher_input([token_map.to(model.class_RD.device) for token_map in tokens])
    inputs = [None, *given.split([side * side for side in quantizer.sides[1:]], dim=1)]
    return torch.cat([model.logits(scale, each)[0].cpu() for scale, each in enumerate(inputs)])


def compare(plain: Models, images: int, device: torch.device) -> list[dict[str, object]]:
    """Return one row per precision: how far its logits are from those in float32."""
    exact = copy.deepcopy(plain)
    prepare(*exact, device, "fp32")
    rows = [seed * 7 % plain[1].config.class_count for seed in range(images)]
    tokens = [[r.tokens for r in generate(*exact, [row], [seed], CONFIG)] for seed, row in enumerate(rows)]
    high = torch.cat([logits(exact, row, maps) for row, maps in zip(rows, tokens, strict=True)])
    found: list[dict[str, object]] = []
    for precision in precisions(device):
        models = copy.deepcopy(plain)
        prepare(*models, device, precision)
        low = torch.cat([logits(models, row, maps) for row, maps in zip(rows, tokens, strict=True)])
        divergence = high.softmax(-1) * (high.log_softmax(-1) - low.log_softmax(-1))
        found.append(
            {
                "precision": precision,
                "mean difference": f"{(low - high).abs().mean():.2g}",
                "standard deviation of logits": f"{high.std():.3g}",
                "same most likely token": f"{100 * (low.argmax(-1) == high.argmax(-1)).float().mean():.1f} %",
                "KL, nats": f"{divergence.sum(-1).mean():.1g}",
            }
        )
    return found


def main() -> None:
    """Measure and print a Markdown table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="name or file; without it the d16's shape with random weights")
    parser.add_argument("--images", type=int, default=4, help="number of images")
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    given = parser.parse_args()
    name, models = named_models(given.checkpoint)
    rows = compare(models, given.images, pick_device(given.device))
    print_rows([{"model": name} | row for row in rows], as_json=given.json)


if __name__ == "__main__":
    main()
