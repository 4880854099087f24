"""The interpreter that the other tests run on gives what Triton's own gives, and leaves the language as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("a GPU interprets nothing", allow_module_level=True)

import triton
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

SCALARS = [value for value in vars(tl).values() if isinstance(value, tl.dtype) and value.name != "void"]


@triton.jit
def larger_square(a, b):
    return tl.maximum(a * a, b * b)


@triton.jit
def halves(x):
    return tl.sum(x.to(tl.float16), 0) / 2 + tl.cdiv(7, 2)


@triton.jit
def kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Functions of ours and of Triton's, one of them in another, a reduction by a function, casts and a product."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at[:, None] * BLOCK + at[None, :])
    product = tl.dot(x, tl.trans(x)).to(tl.float16)
    most = tl.reduce(x, 0, larger_square)
    tl.store(out_ptr + at, tl.sum(product, 1).to(tl.float32) + tl.softmax(most) + halves(most))


@triton.jit
def broken(x_ptr):
    tl.store(x_ptr, halves(tl.load(x_ptr)))


def launched() -> bytes:
    x = torch.arange(256, dtype=torch.float32).reshape(16, 16).sin()
    out = torch.empty(16)
    kernel[(1,)](x, out, BLOCK=16)
    return out.numpy().tobytes()


def test_numbers_are_those_of_tritons_interpreter():
    code = "import sys, test_quick_interpreter as test; sys.stdout.buffer.write(test.launched())"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout == launched()


def test_the_language_is_itself_after_a_launch():
    launched()
    with pytest.raises(InterpreterError):
        broken[(1,)](torch.zeros(1))
    for name in ("load", "reduce", "static_range"):
        for module in (tl, tl.core):
            assert getattr(module, name).__module__ == "triton.language.core", (module, name)
    assert tl.core.is_builtin(tl.tensor.__add__)


@pytest.mark.parametrize("dtype", SCALARS, ids=str)
def test_dtypes_are_those_of_tritons_interpreter(dtype):
    found, expected = interpreter._get_np_dtype, interpreter._get_np_dtype.__wrapped__
    for kind in (dtype, tl.pointer_type(dtype), tl.block_type(dtype, [2]), tl.block_type(tl.pointer_type(dtype), [2])):
        assert found(kind) == expected(kind)
