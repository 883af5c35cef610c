"""Benchmarking: what an image costs here, stage by stage, beside other ways to make one."""
