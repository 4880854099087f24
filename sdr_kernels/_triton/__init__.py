"""Triton kernels and their launchers, one module an op; imported when an op first runs."""
