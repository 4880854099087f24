"""Every test starts from the same seed, on one thread, with torch's deterministic algorithms."""

import os
import signal
import sys

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a shell's background, and our commands leave that as it is
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two test processes share two cores
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it on a GPU

import pytest
import torch
from promises import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: its kernels run on CPU tensors
    import quick_interpreter

    quick_interpreter.quicken()


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a reference in float32 is one
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN, so that an unwritten output shows
    if "torch._dynamo" in sys.modules:  # all compiled partial functions share one limit of recompilations
        torch.compiler.reset()


@pytest.fixture(scope="session")
def device():
    """Where kernels are tested: a GPU, else the CPU through Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Triton's interpreter computes bf16 products wrongly and says nothing, so there bf16 is left to GPUs
KERNEL_DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(params=KERNEL_DTYPES, ids=str)
def dtype(request):
    """Every dtype that kernels can be tested in on this machine."""
    return request.param


# the CPU's own implementations take CPU tensors, so where kernels are tested on a GPU there is nothing for them to do
@pytest.fixture(params=["triton"] if torch.cuda.is_available() else ["triton", "cpu"])
def impl(request):
    """Every implementation of the ops of training that can be tested on this machine."""
    return request.param
