"""VAR, visual autoregressive image generation by next-scale prediction (arXiv 2404.02905).

    import varcli

    model = varcli.load("tiny64")
    images = model.sample(["golden retriever", 281], count=4, seed=0)
    images[0].save("dog.png")

Everything here is imported when it is first used, so `import varcli` itself takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varcli.images.image import Image as Image
    from varcli.pipelines.evaluate import evaluate as evaluate
    from varcli.pipelines.model import Model as Model
    from varcli.pipelines.model import load as load
    from varcli.pipelines.train import train_tokenizer as train_tokenizer
    from varcli.pipelines.train import train_transformer as train_transformer

__version__ = "0.1.0"

_HOMES = {
    "Image": "varcli.images.image",
    "Model": "varcli.pipelines.model",
    "evaluate": "varcli.pipelines.evaluate",
    "load": "varcli.pipelines.model",
    "train_tokenizer": "varcli.pipelines.train",
    "train_transformer": "varcli.pipelines.train",
}
__all__ = ["Image", "Model", "__version__", "evaluate", "load", "train_tokenizer", "train_transformer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'varcli' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
