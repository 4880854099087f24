"""Every test starts from the same seed, on one thread, with torch's deterministic algorithms."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two test processes share two cores

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN, so that an unwritten output shows
