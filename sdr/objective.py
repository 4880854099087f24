"""What is trained: the model and its loss as one module, so that DDP and FSDP see every parameter."""

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sdr import fast
from sdr.checkpoint import load_model, sdr_from_ftcn
from sdr.errors import SDRError
from sdr.ftcn import FTCN, Backbone
from sdr.losses import Losses, SDRLoss
from sdr.model import SDRModel
from sdr.sync_norm import SyncBatchNorm3d
from sdr.train_config import TrainConfig

Model = FTCN | SDRModel


class Objective(nn.Module):
    """Views and labels to the losses.

    Args:
        model: an SDRModel, or an FTCN, which is trained by cross-entropy alone.
        loss: of an SDRModel.
        group: processes whose features the contrastive loss compares.
    """

    def __init__(self, model: Model, loss: SDRLoss, group: "dist.ProcessGroup | None" = None) -> None:
        super().__init__()
        self.model, self.loss, self.group = model, loss, group

    def forward(self, views: Tensor, labels: Tensor | None = None) -> Tensor:
        """views: [B, V, 3, T, H, W], or [B, 3, T, H, W] for all branches, with labels [B] to :class:`Losses` as
        float32 [5], or without to logits [B].
        """
        alone = isinstance(self.model, FTCN)
        output = self.model(views[:, 0] if alone and views.ndim == 6 else views)
        if labels is None:
            return output.logits
        with torch.autocast(views.device.type, enabled=False):
            if alone:
                ce = F.binary_cross_entropy_with_logits(output.logits.float(), labels.float())
                return F.pad(ce.expand(2), (0, len(Losses._fields) - 2))
            return torch.stack(self.loss(output, labels, self.group))


def build_objective(config: TrainConfig) -> Objective:
    """Model and loss before the first update, drawn from torch's generator, on the CPU."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    norm = SyncBatchNorm3d if config.bn == "sync" and several else nn.BatchNorm3d
    model = start_model(config, norm)
    for backbone in filter(lambda module: isinstance(module, Backbone), model.modules()):
        backbone.recompute = config.recompute
    if config.compile:
        model.compile()
    loss = SDRLoss(config.loss if isinstance(model, SDRModel) else None)
    return Objective(model, loss, dist.group.WORLD if several else None)


def start_model(config: TrainConfig, norm: Callable[[int], nn.Module] = nn.BatchNorm3d) -> Model:
    """A new model, or one with the weights of ``init``.

    Raises:
        SDRError: the weights cannot be read, or are of another configuration, whose fields are named.
    """
    if config.architecture == "ftcn":
        model = FTCN(config.shape, norm)
    else:
        fast_one = config.implementation == "fast"
        model = fast.SDRModel(config.model, norm, config.grouped) if fast_one else SDRModel(config.model, norm)
    if config.init is None:
        return model
    source, _ = load_model(config.init)
    drawn: tuple[str, ...] = ()  # what an FTCN does not have stays as it was drawn
    if isinstance(source, FTCN) and config.architecture == "sdr":
        source, drawn = sdr_from_ftcn(source, config.model.num_branches), ("trfi.joint_head.", "trfi.loo_heads.")
    require_same_shape(config.init, source, model)
    model.load_state_dict({n: v for n, v in source.state_dict().items() if not n.startswith(drawn)}, strict=not drawn)
    return model


def require_same_shape(path: str, source: Model, model: Model) -> None:
    """Raise SDRError that names each field in which the weights' configuration is another than the run's."""
    kinds = [FTCN if isinstance(m, FTCN) else SDRModel for m in (source, model)]
    if kinds[0] is not kinds[1]:
        raise SDRError(path, f"holds an {kinds[0].__name__}, the run trains an {kinds[1].__name__}")
    given, wanted = asdict(source.config), asdict(model.config) | {"dropout": source.config.dropout}
    if others := [
        f"{name} is {given[name]}, the run asks for {wanted[name]}" for name in wanted if given[name] != wanted[name]
    ]:
        raise SDRError(path, f"is of another model: {'; '.join(others)}")
