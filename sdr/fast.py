"""SDRModel on grouped kernels: same arguments, same state_dict, same output as :class:`sdr.model.SDRModel`.

In evaluation and without gradients all branches run in one pass of the ops in :mod:`sdr_kernels`, batch norms folded:
Triton kernels on a GPU, oneDNN on a CPU. In training, or where a gradient is asked for, the reference runs.
"""

import copy
import logging
import threading
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor, nn

from sdr import model as reference
from sdr.checkpoint import sdr_from_ftcn
from sdr.config import SDRConfig
from sdr.ftcn import FTCN
from sdr.graphs import GraphCache
from sdr.model import SDROutput
from sdr.packing import PackedModel
from sdr.tpa import normalise

logger = logging.getLogger(__name__)


class SDRModel(reference.SDRModel):
    """:class:`sdr.model.SDRModel` with fast inference; a drop-in for it in every other respect.

    The kernels run in the dtype of the parameters or of an enabled autocast. Packed weights are made at the first call
    and again when a parameter or buffer has changed; only changes made through ``.data`` cannot be seen: call
    :meth:`refresh` after those. On a GPU small inputs replay a CUDA graph per shape, from any thread and stream.

    Args:
        config: shapes and options; see :class:`sdr.config.SDRConfig` and the presets beside it.
    """

    # clips times branches up to which launching takes longer than running, so that a graph pays for its memory
    graph_limit = 16

    def __init__(self, config: SDRConfig) -> None:
        super().__init__(config)
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

    def _apply(self, *args, **options):
        self.refresh()  # a move to another device or dtype may replace tensors without a trace in the old ones
        return super()._apply(*args, **options)

    def load_state_dict(self, *args, **options):
        self.refresh()  # assign=True replaces parameters
        return super().load_state_dict(*args, **options)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._runtime = _Runtime()  # its tensors are copies on another device, made anew for every call
        return replica

    def forward(self, views: Tensor) -> SDROutput:
        """Score clips; arguments, result and errors are those of :meth:`sdr.model.SDRModel.forward`."""
        kind = views.device.type
        if self.training or wants_gradient(self, views):
            self._runtime.explain_reference(training=self.training)
            return super().forward(views)
        if kind not in ("cpu", "cuda"):
            return super().forward(views)
        self.check_views(views)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.trfi.joint_head.weight.dtype
        # plain tensors, not those of an inference mode: packed weights and graphs serve later calls too
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            if views.dtype != torch.uint8:
                views = normalise(views).to(dtype)
            packed, graphs = self._runtime.packed(self, dtype)
            small = len(views) * self.config.num_branches <= self.graph_limit
            if kind == "cuda" and small and not torch.cuda.is_current_stream_capturing():
                return SDROutput(*graphs(views))
            return packed(views)


class _Runtime:
    """What a fast model keeps beside its weights; a copy or an unpickled model starts with an empty one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tensors: list[Tensor] | None = None
        self._stamp = -1
        self._packed: dict[torch.dtype, tuple[PackedModel, GraphCache]] = {}
        self._explained: set[bool] = set()

    def __reduce__(self):
        return _Runtime, ()

    def packed(self, model: SDRModel, dtype: torch.dtype) -> tuple[PackedModel, GraphCache]:
        """The packed weights and their graphs, made anew if a parameter or buffer has changed since."""
        with self._lock:
            if self._tensors is None:
                tensors = chain(model.parameters(), model.buffers())
                self._tensors = [tensor for tensor in tensors if not tensor.is_inference()]  # these count no versions
            # versions only grow, so their sum changes when any does; batch norms bump num_batches_tracked's
            stamp = sum(map(attrgetter("_version"), self._tensors))
            if stamp != self._stamp:
                self.finish()
                self._packed, self._stamp = {}, stamp
            if dtype not in self._packed:
                packed = PackedModel(model, dtype)
                if model.trfi.joint_head.weight.is_cuda and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.current_stream().synchronize()  # other streams may use the weights at once
                self._packed[dtype] = packed, GraphCache(packed)
            return self._packed[dtype]

    def finish(self) -> None:
        """Wait for replays: what they use is about to be freed."""
        for _, graphs in self._packed.values():
            graphs.synchronize()

    def explain_reference(self, *, training: bool) -> None:
        """Log once why the reference runs."""
        if training not in self._explained:
            self._explained.add(training)
            if training:
                logger.info("training runs the reference model: the kernels have no backward yet")
            else:
                logger.warning("gradients are enabled, so the reference model runs: use torch.inference_mode()")


def wants_gradient(model: nn.Module, x: Tensor) -> bool:
    """A gradient would flow to the input or to a parameter."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters()))


def accelerate(model: FTCN | reference.SDRModel) -> SDRModel:
    """A fast model with a copy of these weights; an FTCN becomes the SDRModel of one branch, with the same logits."""
    if isinstance(model, FTCN):
        device = next(model.parameters()).device
        model = sdr_from_ftcn(model, num_branches=1).to(device)
    return model if isinstance(model, SDRModel) else SDRModel.from_reference(model)
