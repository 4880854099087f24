"""What a profile runs: a forward pass or an update of the user's own model."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sdr import stages
from sdr.checkpoint import load_model, sdr_from_ftcn
from sdr.config import GroupedConfig, SDRConfig, TPAConfig, check, check_choice, check_count, check_flag, tiny
from sdr.fast import SDRModel as FastModel
from sdr.ftcn import FTCN, Bottleneck
from sdr.loading import Batch, LoaderConfig
from sdr.model import SDRModel
from sdr.train import require_kernels
from sdr.train_config import TrainConfig
from sdr.trainer import Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
BATCH = {"cuda": 16, "cpu": 2}
GAMMA = 0.5  # of the last norm of a bottleneck, which starts at 0, where weights are random
EPOCH = 50.0  # of an update: neither end has a learning rate of 0


@dataclass(frozen=True)
class ProfileConfig:
    """What is profiled.

    Args:
        model: shapes of the model; random weights.
        weights: file whose model is profiled instead; an FTCN as the SDR model of one branch.
        batch: clips of a pass or an update; default: 16 on a GPU, 2 on a CPU.
        train: profile an update instead of a forward pass.
        implementation: ``fast`` is :mod:`sdr.fast`, ``reference`` plain PyTorch.
        grouped: how the implementation ``fast`` trains the branches.
        recompute: in training keep only the input of each block, with ``fast`` of each stage.
        dtype: of convolutions and products; ``auto`` is bfloat16 on a GPU and float32 on a CPU. In training weights
            stay float32.
        data: cache that sdr prepare wrote: with ``train``, times its loader against the update.
        loader: how clips are drawn from the cache, read and augmented.
        tpa: methods and strengths of the augmentation.
        threads: of a CPU; default: as many as torch takes.
    """

    model: SDRConfig = field(default_factory=tiny)
    weights: str | None = None
    batch: int | None = None
    train: bool = False
    implementation: Literal["fast", "reference"] = "fast"
    grouped: GroupedConfig = field(default_factory=GroupedConfig)
    recompute: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    data: str | None = None
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    tpa: TPAConfig = field(default_factory=TPAConfig)
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "threads"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        cores = os.cpu_count() or 1
        check(self.threads is None or self.threads <= cores, "threads", f"be at most {cores}, the cores", self.threads)
        for name in ("train", "recompute"):
            check_flag(name, getattr(self, name))
        check_choice("implementation", self.implementation, ("fast", "reference"))
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check(self.data is None or self.train, "data", "go with train: it is updates that the loader feeds", self.data)
        check(self.train or not self.recompute, "recompute", "go with train", self.recompute)
        check(not self.train or (self.batch or 2) % 2 == 0, "batch", "be even in training, half of it real", self.batch)
        if self.train:
            self.training("cpu")  # what it refuses is refused here

    def clips(self, device: torch.device) -> int:
        """B."""
        return self.batch or BATCH[device.type]

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """That ``auto`` stands for."""
        name = {"cuda": "bfloat16", "cpu": "float32"}[device.type] if self.dtype == "auto" else self.dtype
        return DTYPES[name]

    def training(self, device: torch.device | str, batch: int | None = None) -> TrainConfig:
        """The run whose update is profiled."""
        device = torch.device(device)
        return TrainConfig(
            model=self.model,
            implementation=self.implementation,
            init=self.weights,
            batch_size=batch or self.clips(device),
            precision=PRECISIONS[str(self.dtype_on(device)).removeprefix("torch.")],
            recompute=self.recompute,
            grouped=self.grouped,
            loader=self.loader,
            tpa=self.tpa,
        )


def with_weights(config: ProfileConfig) -> tuple[ProfileConfig, SDRModel | None]:
    """The configuration with the shapes of the weights file, and its model; None where there is no file."""
    if config.weights is None:
        return config, None
    model, _ = load_model(config.weights)
    model = sdr_from_ftcn(model, 1) if isinstance(model, FTCN) else model
    return replace(config, model=model.config), model


class Plan(NamedTuple):
    """What runs.

    Attributes:
        name: of :mod:`sdr.passes`, or a training scheme; "eager" for the plain branches.
        why: the plain branches run; empty where they do not.
    """

    name: str
    why: str = ""

    @property
    def plain(self) -> bool:
        return self.name == "eager"


class Inference:
    """A forward pass, ready to be called.

    Args:
        config: of the profile, with the shapes of its weights.
        device: where.
        clips: B.
        model: to take the weights of; None draws them.
    """

    def __init__(self, config: ProfileConfig, device: torch.device, clips: int, model: SDRModel | None = None) -> None:
        self.config, self.device, self.clips, self.dtype = config, device, clips, config.dtype_on(device)
        torch.manual_seed(0)
        model = model or random_model(config.model)
        model = FastModel.from_reference(model) if config.implementation == "fast" else model
        self.model = model.to(device, self.dtype).eval()
        self.views = random_views(config.model, clips, device, self.dtype)
        sideways = "" if config.model.spatial_kernel == 1 else "the kernels are for spatial_kernel 1"
        why = "implementation is reference" if config.implementation == "reference" else sideways
        self.plan = Plan("eager" if why else "block", why)

    def __call__(self) -> Tensor:
        return self._run(self.views)

    def one_clip(self) -> Tensor:
        """The same of one clip alone."""
        return self._run(self.views[:1])

    def _run(self, views: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(views).logits

    def by_stage(self) -> nullcontext:
        """A context in which stages can be told apart: a CUDA graph runs them as one."""
        return without_graphs(self.model) if isinstance(self.model, FastModel) else nullcontext()


class without_graphs:  # noqa: N801, used as a function
    """The fast model launches its kernels one by one for a while."""

    def __init__(self, model: FastModel) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.graph_limit = 0

    def __exit__(self, *error: object) -> None:
        del self.model.graph_limit  # the class's again


class Training:
    """An update as `sdr train` makes it, ready to be called; arguments as those of :class:`Inference`."""

    def __init__(self, config: ProfileConfig, device: torch.device, clips: int) -> None:
        self.config, self.device, self.clips, self.dtype = config, device, clips, config.dtype_on(device)
        run = config.training(device, clips)
        require_kernels(run, device)
        self.trainer = Trainer(run, OneDevice(device, self.dtype))
        self.model = self.trainer.objective.model
        self.trainer.objective.loss.register_forward_pre_hook(loss_begins)
        views = random_views(config.model, clips, device, self.dtype)
        labels = torch.arange(clips, device=device) % 2
        self.batch = Batch(views, labels, tuple(map(str, range(clips))), 0, 0)
        self.plan = self._plan(views)

    def _plan(self, views: Tensor) -> Plan:
        if self.config.implementation == "reference":
            return Plan("eager", "implementation is reference")
        why = self.model._why_reference(views, self.model.branch_of_view())
        return Plan("eager" if why else self.config.grouped.scheme, why)

    def __call__(self) -> Tensor:
        return self.step(self.batch)

    def step(self, batch: Batch) -> Tensor:
        """An update by this batch; does not wait for the device."""
        return self.trainer.step([batch], epoch=EPOCH)

    def by_stage(self) -> nullcontext:
        return nullcontext()


def loss_begins(loss: nn.Module, arguments: tuple) -> None:
    """A hook before the loss's forward pass, whose first argument is the model's output."""
    stages.enter(stages.LOSS, arguments[0].logits)


class OneDevice:
    """What :class:`sdr.trainer.Trainer` asks of Lightning Fabric, in one process: a profile needs no such package."""

    global_rank, world_size = 0, 1

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
        self.strategy = SimpleNamespace(precision=SimpleNamespace(scaler=self.scaler))

    def setup_module(self, module: nn.Module) -> nn.Module:
        return _InPrecision(module.to(self.device), self.device, self.dtype)

    def no_backward_sync(self, module: nn.Module, *, enabled: bool) -> nullcontext:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        stages.enter(stages.LOSS, loss)  # whose gradient is the first of the backward pass
        stages.begin(stages.LOSS, backward=True)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        stages.begin(stages.OPTIMISER)


class _InPrecision(nn.Module):
    """A module under autocast, where the dtype is not float32."""

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.context = partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext

    def forward(self, *arguments: Tensor) -> Tensor:
        with self.context():
            return self.module(*arguments)


def random_model(config: SDRConfig) -> SDRModel:
    """Of random weights, every part of which carries a signal."""
    model = SDRModel(config)
    for block in filter(lambda module: isinstance(module, Bottleneck), model.modules()):
        nn.init.constant_(block.c_bn.weight, GAMMA)
    return model


def random_views(config: SDRConfig, clips: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B, V, 3, T, H, W], normalised, channels innermost in memory, as a loader gives them."""
    shape = clips, config.num_branches, config.num_frames, config.image_size, config.image_size, 3
    return torch.randn(shape, device=device).to(dtype).movedim(-1, 2)
