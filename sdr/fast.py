"""SDRModel on grouped kernels: same arguments, same state_dict, same output as :class:`sdr.model.SDRModel`.

All branches run in one pass of the ops in :mod:`sdr_kernels`: Triton kernels on a GPU, products of rows on a CPU. In
evaluation and without gradients batch norms are folded; in training, or where a gradient is asked for, statistics and
gradients are exact and most of what an eager network keeps for the backward pass is never in memory. The reference
runs for the control whose convolutions look sideways, for gradients of the views, and for norms that no kernel has.
"""

import copy
import logging
import operator
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdr import model as reference
from sdr.checkpoint import sdr_from_ftcn
from sdr.config import GroupedConfig, SDRConfig
from sdr.ftcn import FTCN, Backbone
from sdr.graphs import GraphCache
from sdr.grouped import GroupedPass, why_not_grouped
from sdr.model import SDROutput
from sdr.packing import PackedModel
from sdr.tpa import normalise

logger = logging.getLogger(__name__)


class SDRModel(reference.SDRModel):
    """:class:`sdr.model.SDRModel` through kernels, in inference and in training; a drop-in for it in every respect.

    The kernels run in the dtype of the parameters or of an enabled autocast. In training weights and gradients keep
    their own dtype, and batch norms are exact: by the batch, frozen where they are in evaluation, over all processes
    where they are :class:`sdr.sync_norm.SyncBatchNorm3d`. Hooks of a backbone's submodules run in the reference alone.

    For inference weights are packed at the first call, and anew when a parameter, buffer or module has changed; what is
    written through ``.data``, or to a tensor that was made in inference mode, cannot be seen: call :meth:`refresh`
    after that. On a GPU small inputs replay a CUDA graph per shape,
    from any thread and stream; a graph that a user captures of a call holds the weights of that time.

    Args:
        config: shapes and options; see :class:`sdr.config.SDRConfig` and the presets beside it.
        norm: makes a batch norm from its channels.
        grouped: how branches are trained; may be set anew at any time.
    """

    grouped = GroupedConfig()
    # clips times branches up to which launching takes longer than running, so that a graph pays for its memory
    graph_limit = 16

    def __init__(
        self,
        config: SDRConfig,
        norm: Callable[[int], nn.Module] = nn.BatchNorm3d,
        grouped: GroupedConfig = GroupedConfig(),  # noqa: B008, frozen
    ) -> None:
        super().__init__(config, norm)
        self.grouped = grouped
        self._runtime = _Runtime()

    @classmethod
    def from_reference(cls, model: reference.SDRModel) -> "SDRModel":
        """A fast model with a copy of ``model``'s weights, on its device and in its dtype and mode."""
        fast = cls.__new__(cls)  # no initialisation: it would be overwritten, and would move the random generator
        fast.__dict__.update(copy.deepcopy(vars(model)), _runtime=_Runtime())
        return fast

    def refresh(self) -> None:
        """Forget packed weights and graphs; the next call makes them anew."""
        self._runtime.finish()
        self._runtime = _Runtime()

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._runtime, replica.graph_limit = _Runtime(), 0  # its weights are copies, made anew for every call
        return replica

    def forward(self, views: Tensor) -> SDROutput:
        """Score clips; arguments, result and errors are those of :meth:`sdr.model.SDRModel.forward`.

        Raises:
            RuntimeError: ``grouped`` names an implementation that cannot train these branches; or a CUDA graph is being
                captured, and no call before has packed the weights as they are.
        """
        kind = views.device.type
        folds = kind in ("cpu", "cuda") and self.config.spatial_kernel == 1
        if not folds or self.training:
            return super().forward(views)
        if wants_gradient(self, views):
            self._runtime.log(
                logging.WARNING, "gradients are enabled, so nothing is folded: use torch.inference_mode()"
            )
            return super().forward(views)
        self.check_views(views)
        dtype = self._dtype(kind)
        # plain tensors, not those of an inference mode: packed weights and graphs serve later calls too
        plain, float_types = torch.inference_mode(False), torch.autocast(kind, enabled=False)
        with plain, float_types, torch.no_grad(), torch.cuda.device_of(views):
            output = self._run(views if views.dtype == torch.uint8 else normalise(views).to(dtype), dtype)
        return super().forward(views) if output is None else output

    def branch_tokens(self, views: Tensor) -> Tensor:
        """As :meth:`sdr.model.SDRModel.branch_tokens`: all branches in one pass, with exact batch statistics."""
        branches = self.branch_of_view()
        kind, impl = views.device.type, self.grouped.impl
        if reason := self._why_reference(views, branches):
            if impl not in ("auto", "reference"):
                raise RuntimeError(f"grouped.impl={impl!r} cannot run: {reason}")
            level = logging.WARNING if impl == "auto" and self.training else logging.INFO
            self._runtime.log(level, f"plain PyTorch runs the branches: {reason}")
            return super().branch_tokens(views)
        with torch.autocast(kind, enabled=False):
            return GroupedPass(branches, self.grouped).tokens(views.to(self._dtype(kind)))

    def _dtype(self, kind: str) -> torch.dtype:
        """Of the convolutions: that of an enabled autocast, or of the parameters."""
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.trfi.joint_head.weight.dtype

    def _why_reference(self, views: Tensor, branches: Sequence[Backbone]) -> str:
        """Empty where branches can go through the kernels, else the reason why the plain ones run."""
        if self.config.spatial_kernel != 1:
            return "the kernels are for spatial_kernel 1"
        if self.grouped.impl == "reference":
            return "impl is reference"
        if self.grouped.impl == "auto" and views.device.type == "cpu":
            return "on a CPU they take less time in training, and impl='cpu' less memory"
        if views.requires_grad:
            return "the kernels have no gradient for the views"
        if views.device.type not in ("cpu", "cuda"):
            return f"there are no kernels for {views.device.type}"
        return why_not_grouped(branches)

    def _run(self, views: Tensor, dtype: torch.dtype) -> SDROutput | None:
        """views: uint8, or normalised and of ``dtype``; None where a part of the model is in training."""
        capturing = views.is_cuda and torch.cuda.is_current_stream_capturing()
        replays = views.is_cuda and not capturing and 0 < len(views) * self.config.num_branches <= self.graph_limit
        snapshot = self._runtime.snapshot
        packed = snapshot and snapshot.packed.get(dtype)
        # the device works while the host looks whether the weights are still those that were packed
        output = packed.graphs(views) if packed and replays else None
        fits = snapshot is not None and snapshot.fits()
        if capturing and not (fits and packed):
            raise RuntimeError("the model must have been called with these weights, in this dtype, before its capture")
        if not fits:
            output, snapshot = None, self._runtime.renew(self)
        if snapshot.in_training:
            return None
        if output is None:
            packed = snapshot.pack(self, dtype)
            output = packed.graphs(views) if replays else packed.model(views)
        return SDROutput(*output)


class _Packed(NamedTuple):
    model: PackedModel
    graphs: GraphCache


class _Snapshot:
    """The tensors and modules of a model as they were when it was packed, and what was packed of them."""

    def __init__(self, model: SDRModel) -> None:
        modules = list(model.modules())
        self.packed: dict[torch.dtype, _Packed] = {}
        self.in_training = any(module.training for module in modules)
        self._lock = threading.Lock()
        self._modules = modules
        self._holders = [held for m in modules for held in (m._parameters, m._buffers, m._modules) if held]
        self._held = self._now_held()
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._storages = [tensor.detach() for tensor in self._tensors]  # alive, or another could take their addresses
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # these have no versions
        self._state = self._now()

    def _now_held(self) -> list[Tensor | nn.Module | None]:
        return [value for holder in self._holders for value in holder.values()]

    def _now(self) -> tuple[int, list[int], list[bool]]:
        # versions only grow, so their sum changes when any does; batch norms bump num_batches_tracked's
        version = sum(map(attrgetter("_version"), self._counted))
        return version, [t.data_ptr() for t in self._tensors], [m.training for m in self._modules]

    def fits(self) -> bool:
        """Nothing has been written to, replaced, moved or switched between training and evaluation."""
        held = self._now_held()
        same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        return same and self._now() == self._state

    def pack(self, model: SDRModel, dtype: torch.dtype) -> _Packed:
        """The weights in one dtype, packed at the first call."""
        with self._lock:
            if dtype not in self.packed:
                packed = PackedModel(model, dtype)
                if self._storages[0].is_cuda:
                    torch.cuda.current_stream().synchronize()  # other streams may use the weights at once
                self.packed[dtype] = _Packed(packed, GraphCache(packed))
            return self.packed[dtype]

    def finish(self) -> None:
        """Wait for whatever uses the packed weights: they are about to be freed."""
        if self.packed and self._storages[0].is_cuda:
            torch.cuda.synchronize(self._storages[0].device)


class _Runtime:
    """What a fast model keeps beside its weights; a copy or an unpickled model starts with an empty one."""

    def __init__(self) -> None:
        self.snapshot: _Snapshot | None = None
        self._lock = threading.Lock()
        self._logged: set[str] = set()

    def __reduce__(self):
        return _Runtime, ()

    def renew(self, model: SDRModel) -> _Snapshot:
        """A snapshot of the model as it is now."""
        with self._lock:
            if self.snapshot is None or not self.snapshot.fits():
                self.finish()
                self.snapshot = _Snapshot(model)
            return self.snapshot

    def finish(self) -> None:
        if self.snapshot is not None:
            self.snapshot.finish()

    def log(self, level: int, message: str) -> None:
        """Log a message once."""
        if message not in self._logged:
            self._logged.add(message)
            logger.log(level, message)


def wants_gradient(model: nn.Module, x: Tensor) -> bool:
    """A gradient would flow to the input or to a parameter."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters()))


def accelerate(model: FTCN | reference.SDRModel) -> SDRModel:
    """A fast model with a copy of these weights; an FTCN becomes the SDRModel of one branch, with the same logits."""
    if isinstance(model, FTCN):
        parameter = next(model.parameters())
        model = sdr_from_ftcn(model, num_branches=1).to(parameter.device, parameter.dtype)
    return model if isinstance(model, SDRModel) else SDRModel.from_reference(model)
