"""The Python API behind the commands: models, samples, edits, evaluations, training."""

import torch  # noqa: F401  # all of them need it, and the collector waits for it

from varcli import collector

collector.resume()
