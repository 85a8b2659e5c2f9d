"""Kernels that numba compiles when they are first used: bf16 on processors with AVX-512 BF16. Optional (see available.py)."""
