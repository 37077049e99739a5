"""Kernels for GPUs. Nothing here is imported before a call needs it: the modules import triton, which may be absent."""
