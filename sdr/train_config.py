"""How a model is trained: one dataclass, and a preset for each shape of model."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from sdr.config import (
    FTCNConfig,
    GroupedConfig,
    LossConfig,
    SDRConfig,
    TPAConfig,
    check,
    check_choice,
    check_count,
    check_flag,
    check_number,
    ftcn_released,
    paper,
    tiny,
)
from sdr.loading import LoaderConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Args:
        model: shapes of the model.
        architecture: ``sdr``, or ``ftcn``: one branch and the transformer, trained by cross-entropy alone on the first
            view, the paper's baseline; ``model``'s branches and joint feature then say nothing.
        implementation: ``reference`` is plain PyTorch, ``fast`` is :mod:`sdr.fast`; they differ by rounding alone and
            write the same weights.
        init: weights of an FTCN (`sdr convert`) that every branch and the transformer start from, or of a model of this
            configuration; None starts anew.
        epochs: passes over the larger class.
        batch_size: clips of an update, over all processes, half of them real.
        accumulate: parts that an update's clips are run in, one after the other, to save memory. Batch statistics and
            the contrastive loss see one part; the gradient is the mean over parts.
        lr: of Adam, after the warm-up.
        warmup_epochs: linear from 0; then a cosine to 0; None is a tenth of the epochs.
        weight_decay: of Adam.
        clip_norm: longest gradient; a longer one is scaled down to it. None never does.
        ema: decay of the moving average of the weights, which is then validated and written; 0 keeps none.
        precision: ``bf16`` and ``fp16`` run convolutions and products in it (fp16 with loss scaling), in validation
            too; weights, BN statistics and losses stay float32. `sdr evaluate` computes in float32.
        strategy: of several processes: ``ddp`` keeps the model in each, ``fsdp`` a share of it.
        bn: statistics of the batch norms: ``batch`` is each process's own part of the batch, ``sync`` all processes',
            ``frozen`` the running ones of ``init``, which then never change.
        recompute: keep only the input of each block, with ``fast`` of each stage, and compute the rest again in the
            backward pass: less memory, about a third more time, the same numbers.
        compile: run the model through torch.compile.
        deterministic: refuse operations that give other numbers when they are repeated. Before torch 2.12 a GPU has
            no other for the max-pools' gradient.
        seed: of initialisation, order, augmentation and dropout.
        max_bad_steps: consecutive updates with a non-finite loss or gradient after which training stops.
        validate_every: epochs from one validation to the next; the last update is always followed by one.
        log_every: updates from one look at the losses to the next; the device is not waited for in between.
        checkpoint_every: updates from one checkpoint to the next; a validation always makes one.
        keep_last: checkpoints that are kept.
        loader: how clips are drawn from the cache, read and augmented.
        grouped: how the implementation ``fast`` trains the branches.
        loss: weights and options of the losses.
        tpa: methods and strengths of the augmentation.
    """

    model: SDRConfig = field(default_factory=tiny)
    architecture: Literal["sdr", "ftcn"] = "sdr"
    implementation: Literal["reference", "fast"] = "reference"
    init: str | None = None
    epochs: int = 100
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-4
    warmup_epochs: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    bn: Literal["batch", "sync", "frozen"] = "batch"
    recompute: bool = False
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    max_bad_steps: int = 10
    validate_every: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 500
    keep_last: int = 2
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    grouped: GroupedConfig = field(default_factory=GroupedConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tpa: TPAConfig = field(default_factory=TPAConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "max_bad_steps", "log_every", "checkpoint_every"):
            check_count(name, getattr(self, name))
        for name in ("lr", "weight_decay", "ema", "validate_every"):
            check_number(name, getattr(self, name))
        for name in ("warmup_epochs", "clip_norm"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        for name in ("recompute", "compile", "deterministic"):
            check_flag(name, getattr(self, name))
        check_choice("architecture", self.architecture, ("sdr", "ftcn"))
        check_choice("implementation", self.implementation, ("reference", "fast"))
        check_choice("bn", self.bn, ("batch", "sync", "frozen"))
        check(self.bn != "frozen" or self.init is not None, "bn", "be batch or sync without init", self.bn)
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        check_choice("strategy", self.strategy, ("ddp", "fsdp"))
        parts = 2 * self.accumulate
        check(self.batch_size % parts == 0, "batch_size", f"be a multiple of {parts}", self.batch_size)
        check(0 < self.lr < math.inf, "lr", "be positive", self.lr)
        check(0 <= self.weight_decay < math.inf, "weight_decay", "not be negative", self.weight_decay)
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "be positive", self.clip_norm)
        check(0 <= self.ema < 1, "ema", "lie in [0, 1)", self.ema)
        check(type(self.seed) is int and 0 <= self.seed < 2**32, "seed", "be a whole number in 0..2**32-1", self.seed)
        check(self.validate_every > 0, "validate_every", "be positive", self.validate_every)
        check(type(self.keep_last) is int and self.keep_last >= 2, "keep_last", "be at least 2", self.keep_last)
        check(0 <= self.warmup <= self.epochs, "warmup_epochs", "lie in 0..epochs", self.warmup_epochs)
        plain = "reference" if self.architecture == "ftcn" or self.strategy == "fsdp" else self.implementation
        check(plain == self.implementation, "implementation", "be reference for ftcn and fsdp", self.implementation)
        parts = {"stem", *(f"res{i + 2}" for i in range(self.model.backbone_stages))}
        check(
            set(self.grouped.recompute) <= parts, "grouped.recompute", "name the model's parts", self.grouped.recompute
        )
        recomputed = self.recompute or (self.implementation == "fast" and self.grouped.recompute)
        check(not (self.compile and recomputed), "compile", "be false with recompute", self.compile)
        sound = self.strategy == "ddp" or self.precision != "fp16"
        check(sound, "precision", "be bf16 or fp32 for fsdp, whose ranks would scale apart", self.precision)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def num_views(self) -> int:
        """V that the loader makes of each clip."""
        return 1 if self.architecture == "ftcn" else self.model.num_branches

    @property
    def shape(self) -> FTCNConfig:
        """The configuration of the model that is built."""
        return self.model.branch() if self.architecture == "ftcn" else self.model


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Linear warm-up, then half a cosine to 0; ``epoch`` counts fractions too."""
    if epoch < config.warmup:
        return config.lr * epoch / config.warmup
    rest = max(config.epochs - config.warmup, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - config.warmup) / rest)))


def train_paper() -> TrainConfig:
    """The paper's model, 100 epochs in bfloat16."""
    return TrainConfig(model=paper(), precision="bf16")


def train_ftcn_released() -> TrainConfig:
    """The model of FTCN's published weights, which ``init`` can start from, 100 epochs in bfloat16."""
    return TrainConfig(model=ftcn_released(), precision="bf16")


def train_tiny() -> TrainConfig:
    """The smallest model on synthetic clips, a few minutes on two cores."""
    return TrainConfig(model=tiny(), epochs=8, lr=3e-3)


TRAIN_PRESETS: Mapping[str, Callable[[], TrainConfig]] = {
    "paper": train_paper,
    "ftcn_released": train_ftcn_released,
    "tiny": train_tiny,
}


def to_json(config: TrainConfig) -> dict:
    """The configuration as JSON values: sets become sorted lists."""
    return json.loads(json.dumps(asdict(config), default=sorted))


def flatten(settings: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name: ``{"loss": {"mi": 1}}`` to ``{"loss.mi": 1}``."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
