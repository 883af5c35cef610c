"""Benchmarking: what a picture costs here, stage by stage, beside other ways to make one."""
