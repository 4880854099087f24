"""Device, precision and processes of a training run, by Lightning Fabric."""

import logging
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from sdr.errors import SDRError
from sdr.ftcn import Backbone
from sdr.train_config import TrainConfig

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Processes(NamedTuple):
    """This process among those of the run."""

    rank: int
    world_size: int


def processes() -> Processes:
    """As torchrun says it; one process without it."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def make_fabric(config: TrainConfig, device: torch.device):
    """Lightning Fabric, launched: on ``device``, or under torchrun on as many devices of its type as there are ranks.

    Raises:
        SDRError: the batch cannot be shared out among the processes.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    world_size = processes().world_size
    share = 2 * world_size * config.accumulate
    if config.batch_size % share:
        what = f"batch_size must be a multiple of {share} for {world_size} processes, got {config.batch_size}"
        raise SDRError("options", what)
    choices: dict = {"precision": PRECISIONS[config.precision], "plugins": []}
    if config.precision == "fp16":  # not by name: Fabric would take bfloat16 on a CPU
        scaler = torch.amp.GradScaler(device.type)
        choices = {"plugins": [MixedPrecision("16-mixed", device.type, scaler)]}
    if world_size == 1:
        if device.type == "cuda" and device.index is None:  # Fabric asks for the number
            device = torch.device("cuda", torch.cuda.current_device())
        fabric = Fabric(accelerator=device.type, strategy=SingleDeviceStrategy(device), devices=1, **choices)
        fabric.launch()
        return fabric
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(shard, data_parallel_size=world_size, tensor_parallel_size=1)
    else:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    choices["plugins"].append(TorchElasticEnvironment())
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(accelerator=device.type, strategy=strategy, devices=local, num_nodes=world_size // local, **choices)
    fabric.launch()
    return fabric


def shard(module: nn.Module, mesh: "dist.DeviceMesh") -> nn.Module:
    """FSDP2: every block's parameters are gathered when it runs, the rest when the module runs."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    for backbone in filter(lambda part: isinstance(part, Backbone), module.modules()):
        for block in (backbone.stem, *(block for name in backbone.stages for block in getattr(backbone, name))):
            fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)
