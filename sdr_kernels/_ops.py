"""How an op is registered with torch and which of its implementations runs.

An op's module holds its reference, its schemas and its public function; ``_triton/<op>.py``, ``_cuda/<op>.py`` and
``_cpu/<op>.py`` hold launchers of the same names, imported when the op first runs: schemas exist without Triton.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
# kernels for GPUs in the order in which "auto" tries them, fastest first as measured; Triton's alone where not named
GPU_ORDER = {
    "sdr_loss": ("triton", "cuda"),  # not measured yet
    "temporal_conv3d": ("triton", "cuda"),  # not measured yet
}
# ops that are made of those in ``_rows``, which have implementations of the CPU's own
COMPOSED = ("normed_bottleneck", "normed_stem")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)  # older GPUs have no bf16 tensor cores: Triton compiles the products to scalar code

logger = logging.getLogger(__name__)
library = torch.library.Library("sdr_kernels", "DEF")


def register(op: str, name: str, signature: str, fake: Callable) -> Callable:
    """Define ``sdr_kernels::name`` whose last argument ``str impl`` names the folder of its launcher.

    Args:
        op: the module under ``_triton/``, ``_cuda/`` or ``_cpu/``, or several, that defines ``name``.
        name: of the torch op and of its launchers.
        signature: arguments and result, in torch.library's language.
        fake: shapes and dtypes of the result; called without ``impl``.
    """

    def launch(*args) -> Tensor:
        *inputs, impl = args
        function = getattr(import_module(f"sdr_kernels._{impl}.{op}"), name)
        if impl != "cpu":
            return function(*inputs)
        with torch.autocast("cpu", enabled=False):  # it would round plain torch's float32 products
            return function(*inputs)

    library.define(name + signature)
    library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sdr_kernels::{name}", lambda *args: fake(*args[:-1]))
    return getattr(torch.ops.sdr_kernels, name)


@cache
def interpreted() -> bool:
    """Triton's interpreter is on: its kernels run on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not(kernels: str, device: torch.device) -> str:
    """Empty where "triton" or "cuda" kernels run on ``device``, else the reason why not."""
    return _why_not(kernels, device)


# what torch.compiler.assume_constant_result sets, which imports all of dynamo; tracing would warn of the cache
why_not._dynamo_marked_constant = True


@cache
def _why_not(kernels: str, device: torch.device) -> str:
    if kernels == "triton":
        problem = _triton_problem(device)
    else:
        problem = import_module("sdr_kernels._cuda.loader").why_not_cuda(device)
    if problem and device.type == "cuda":
        logger.warning("%s kernels cannot run on %s: %s", kernels, device, problem)
    return problem


def reference_instead(device: torch.device, reason: str) -> str:
    """The reference's name, after a line in the log, once for each reason, that "auto" found no kernel."""
    return _reference_instead(device, reason)


reference_instead._dynamo_marked_constant = True


@cache
def _reference_instead(device: torch.device, reason: str) -> str:
    logger.warning("impl='auto' takes the reference on %s: %s", device, reason)
    return "reference"


def _triton_problem(device: torch.device) -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    return "" if interpreted() else why_not_gpu(device)


def why_not_gpu(device: torch.device) -> str:
    """Empty where ``device`` is a GPU that kernels are written for, else the reason why not."""
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0, {device} has {major}.{minor}"
    return ""


def strict() -> bool:
    """SDR_STRICT=1: where "auto" would pass over a kernel on a GPU, it raises."""
    return os.environ.get("SDR_STRICT", "0") not in ("", "0")


def select_impl(
    impl: str,
    x: Tensor,
    *,
    op: str = "",
    has_cpu: bool = False,
    unfit: str = "",
    no_tile: str = "",
    no_cuda: str = "",
) -> str:
    """The implementation that runs: a named one, or raise; "auto" takes a GPU's or the CPU's kernels, then plain torch.

    Args:
        impl: what the caller asked for.
        x: its device decides.
        op: its name in ``GPU_ORDER``; without one it has Triton kernels alone.
        has_cpu: the op has an implementation for CPU tensors of its own.
        unfit: why no kernel takes these inputs, only the reference; empty where kernels do.
        no_tile: why these shapes have no Triton kernel; empty where they have one.
        no_cuda: the same of CUDA kernels.

    Raises:
        ValueError: ``impl`` is none of the names.
        RuntimeError: a named implementation cannot run on this device or on these shapes, or ``strict()`` and "auto"
            would pass over a kernel on a GPU.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    gpu_order = GPU_ORDER.get(op, ("triton",))

    def problem(name: str) -> str:
        if name == "reference":
            return ""
        if name == "cpu":
            if not has_cpu:
                return "this op has no implementation of its own for CPU tensors"
            return unfit if x.device.type == "cpu" else f"it needs CPU tensors, got {x.device}"
        if name not in gpu_order:
            return f"this op has no {name} kernel"
        return unfit or (no_tile if name == "triton" else no_cuda) or why_not(name, x.device)

    if impl != "auto":
        if reason := problem(impl):
            raise RuntimeError(f"impl={impl!r} cannot run: {reason}")
        return impl
    if x.device.type != "cuda":
        return "reference" if problem("cpu") else "cpu"
    reasons = []
    for name in gpu_order:
        reason = problem(name)
        if not reason:
            return name
        reasons.append(reason)
        if strict():
            raise RuntimeError(f"SDR_STRICT is set and impl='auto' would pass over {name} on {x.device}: {reason}")
    return reference_instead(x.device, "; ".join(dict.fromkeys(reasons)))


def differentiable_once(backward: Callable) -> Callable:
    """A backward that raises where its own derivative is asked for.

    torch's ``once_differentiable`` is silent where the output's gradient is a constant: the second derivative, of a
    gradient penalty say, would be left out.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("a kernel's gradient has no derivative (create_graph=True): impl='reference' has it")
        return once(ctx, *gradients)

    return checked


def check_floating(**tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor is float32, float16 or bfloat16, or float64, which the reference takes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], axes: str) -> None:
    """Raise ValueError unless ``tensor`` has this shape; ``axes`` names it in the message."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {list(shape)}, got {list(tensor.shape)}")


def check_same(what: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise TypeError or ValueError unless every tensor has the dtype (``what="dtype"``) or the device of ``x``."""
    for name, tensor in tensors.items():
        if tensor is not None and getattr(tensor, what) != getattr(x, what):
            error = TypeError if what == "dtype" else ValueError
            raise error(f"{name} must have x's {what}, {getattr(x, what)}, got {getattr(tensor, what)}")


def channels_last(x: Tensor) -> Tensor:
    """x: [..., C, T, H, W], the same values with the channels innermost in memory; a copy only where they are not."""
    return x.movedim(-4, -1).contiguous().movedim(-1, -4)


def empty_channels_last(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An unwritten tensor of ``shape``, [..., C, T, H, W], like ``x``, channels innermost in memory."""
    *outer, C, T, H, W = shape
    return x.new_empty((*outer, T, H, W, C)).movedim(-1, -4)


def needs_gradient(*tensors: Tensor | None) -> str:
    """Why a kernel without a backward cannot run on these tensors; empty where no gradient is asked for."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return "it has no gradients, and an input asks for one: call it under torch.inference_mode()"
    return ""
