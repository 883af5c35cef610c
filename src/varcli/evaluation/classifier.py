"""Classifiers for rejection sampling: the confidence that an image shows its class.

Of several images of a class those of highest confidence are kept, as for the paper's best figures (table 1, the rows
marked "re"; the idea is VQ-VAE-2's, Razavi et al. 2019).

Shapes: B images of P × P pixels, N classes the classifier knows.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from varcli.acceleration.devices import out_of_memory
from varcli.checkpoints.safetensors_io import checkpoint_sha256, load_tensors
from varcli.classes import ClassTable, imagenet
from varcli.errors import CheckpointError, UsageError
from varcli.models.efficientnet import EfficientNetLite0


class Classifier:
    """A network's confidence that images show given classes."""

    def __init__(
        self,
        name: str,
        table: ClassTable,
        device: torch.device,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Load a network.

        Args:
            name: efficientnet-lite0, whose weights are a package; one of torchvision's ImageNet models, whose
                weights are downloaded at the first use; such a model and a safetensors file with its weights, as
                in resnet50:FILE; or a TorchScript file. The last takes images in [0, 1], (B, 3, P, P), at their
                own size. It is a program, which can read and write files. Networks of files return logits (B, N):
                either ImageNet's 1 000 classes or those of `table`, in its order.
            table: classes of the checkpoint, to find the logit of a label.
            device: where to compute.
            note: takes remarks for the user.

        Raises:
            UsageError: there is no such model or file.
            CheckpointError: its weights cannot be downloaded, or the file cannot be used.
        """
        self.name, self.table, self.device = name, table, device
        architecture, separator, weights = name.partition(":")
        if Path(name).suffix == ".safetensors" and not weights:
            raise UsageError(f"--classifier must name the torchvision model too, such as resnet50:{name} (got {name})")
        if Path(name).is_file():
            note(f"the classifier {name} is a program, which can read and write files here: use one that you trust")
            network, self.sha256 = _torchscript(Path(name))
        elif name == "efficientnet-lite0":
            network, self.sha256 = _efficientnet()
        else:
            network, self.sha256 = _torchvision(architecture, Path(weights) if separator else None)
        self.network = network.to(device).eval()

    @torch.inference_mode()
    def confidence(self, pixels_BPP3: NDArray[np.uint8], labels: Sequence[int]) -> NDArray[np.float64]:
        """Return the probability of each image's label, (B,).

        Raises:
            CheckpointError: the network does not answer with finite logits of known classes.
        """
        image_B3PP = torch.from_numpy(pixels_BPP3).to(self.device).permute(0, 3, 1, 2).float() / 255
        try:
            logits_BN = self.network(image_B3PP)
        except Exception as error:  # a program of the user may raise anything
            if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]  # TorchScript ends with the reason
            raise CheckpointError(f"the classifier {self.name} failed on an image: {why}") from error
        if not isinstance(logits_BN, Tensor) or logits_BN.ndim != 2 or len(logits_BN) != len(labels):
            raise CheckpointError(f"the classifier {self.name} must turn images (B, 3, P, P) into logits (B, classes)")
        if not logits_BN.isfinite().all():
            raise CheckpointError(f"the classifier {self.name} returns logits that are not finite")
        probability_BN = logits_BN.double().softmax(1).cpu().numpy()
        columns = [self._column(label, logits_BN.shape[1]) for label in labels]
        return probability_BN[np.arange(len(labels)), columns]

    def _column(self, label: int, count: int) -> int:
        """Which of `count` logits belongs to a label."""
        if count == len(self.table):
            return label
        entry = self.table.entries[label]
        if count == len(imagenet()) and entry in imagenet().entries:
            return entry.id
        raise CheckpointError(
            f"the classifier {self.name} knows {count} classes, but the checkpoint has {len(self.table)}; "
            "use a classifier trained on the same classes"
        )


def _torchscript(path: Path) -> tuple[nn.Module, str]:
    """Return the network in a file, and the sha256 of the file."""
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):  # torch means to retire TorchScript; users have the files
                warnings.simplefilter("ignore", kind)
            network: nn.Module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the classifier {path} is not a TorchScript file of torch.jit.save; weights alone are given as "
            "safetensors and with their model: resnet50:FILE.safetensors"
        ) from error
    return network, checkpoint_sha256(path)


def _efficientnet() -> tuple[nn.Module, str]:
    """Return EfficientNet-lite0 behind its own normalization, and its weights' sha256."""
    from torchvision.transforms import Normalize

    network = EfficientNetLite0()
    return nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), network), network.sha256


def _torchvision(name: str, path: Path | None) -> tuple[nn.Module, str]:
    """Return one of torchvision's classifiers behind its own resizing and normalization, and its weights' sha256.

    Its weights are those of a safetensors file, or torchvision's own.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UsageError(
            f"--classifier {name} is neither a file nor a name: self, efficientnet-lite0, a torchvision model such as "
            "resnet101, or one with its weights such as resnet50:FILE.safetensors"
        )
    weights = models.get_model_weights(name).DEFAULT
    state, sha256 = (load_tensors(path)[0], checkpoint_sha256(path)) if path else _downloaded(name, weights)
    inception = {"transform_input": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, **inception)
    last = list(network.state_dict())[-1]  # of the layer with a row for each class
    if last in state and state[last].ndim and len(state[last]) != len(imagenet()):
        network = models.get_model(name, weights=None, num_classes=len(state[last]), **inception)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the weights {path} are not those of torchvision's {name}") from error
    return nn.Sequential(weights.transforms(), network.float()), sha256


def _downloaded(name: str, weights: Any) -> tuple[dict[str, Tensor], str]:
    """Return torchvision's own weights of a classifier, and the sha256 of their file."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        with redirect_stdout(sys.stderr):  # torch prints that it downloads; stdout is for results
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a damaged file: torch raises many kinds
        raise CheckpointError(
            f"the weights of {name} cannot be downloaded; put {weights.url} at {file}, or use --classifier self, which "
            "needs none"
        ) from error
    sha256 = checkpoint_sha256(file)
    if not sha256.startswith(file.stem.rpartition("-")[2]):
        raise CheckpointError(f"the classifier's weights {file} are damaged; delete the file to download it again")
    return state, sha256
