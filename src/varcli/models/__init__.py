"""The models: pure torch, no files, no printing."""
