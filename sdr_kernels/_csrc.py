"""Names what ``sdr_kernels._C`` is built from, for setup.py and for ``_cuda/loader.py``: it needs Python alone."""

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".txt")  # sources, headers and flags


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all that is compiled in ``folder``."""
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    return hashlib.sha256(repr([(path.name, path.read_bytes()) for path in files]).encode()).hexdigest()
