"""Triton's interpreter in half the time, with the same numbers.

A kernel is interpreted while names of ``triton.language`` are replaced by the interpreter's. Triton 3.7 looks through
the whole language for them anew at every call of a function in a kernel, and once a launch is enough; and it builds a
table of all dtypes at every cast.
"""

import functools

from triton import language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Changes the imported interpreter; to be called once."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    patched: set[str] = set()

    @functools.cache
    def languages(fn) -> frozenset[str]:
        """Modules of the language that a function can name."""
        return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)

    def patch_once(fn):
        if not patched.issuperset(languages(fn)):
            patched.update(languages(fn))
            return patch(fn)

    def launch_anew(*args, **kwargs):
        patched.clear()
        try:
            launch(*args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    # types that are no scalars have no hash
    interpreter._get_np_dtype = lambda dtype: numpy_dtype(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)
