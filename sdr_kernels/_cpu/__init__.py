"""Launchers for CPU tensors, one module an op; imported when an op first runs."""
