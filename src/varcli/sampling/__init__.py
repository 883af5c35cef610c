"""Sampling: the next-scale loop, its draws, its batches and where it runs."""
