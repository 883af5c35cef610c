"""varcli: generate and evaluate images with visual autoregressive modeling (VAR)."""

__version__ = "0.1.0"
