"""Compiled kernels: what is done to memory, and nothing else."""
