"""The Python API behind the commands: models, samples, edits, evaluations, training."""
