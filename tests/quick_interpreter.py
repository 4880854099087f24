"""Triton's interpreter without work that it repeats at every call; most tests of kernels take half the time.

A kernel is interpreted while names of ``triton.language`` stand for the interpreter's own. Triton 3.7.1 looks through
the whole language for such names at every call of a function in a kernel too, where the launch has done it already,
and makes a table of all dtypes at every cast.
"""

import functools
from types import SimpleNamespace

from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


def quicken() -> None:
    """Changes the imported interpreter; no number changes."""
    patch_language, numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    sees_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # as the functions of a kernel together
    of_scalar = functools.cache(numpy_dtype)

    def call(self, *args, **kwargs):
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    @functools.wraps(numpy_dtype)
    def cached_dtype(dtype):
        # an address is a uint64; types of pointers and blocks have no hash
        return of_scalar(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)

    interpreter._patch_lang = lambda fn: patch_language(sees_all)
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = cached_dtype
