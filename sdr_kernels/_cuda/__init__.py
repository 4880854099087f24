"""Launchers of the CUDA kernels in ``csrc/``: ``<op>.py`` launches ``csrc/<op>.cu`` through ``loader.py``."""
