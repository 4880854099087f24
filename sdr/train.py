"""The training step and loop: one process, the reference model, all losses."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sdr.checkpoint import WeightsInfo, load_model, save_weights, sdr_from_ftcn
from sdr.clip_cache import ClipCache
from sdr.config import PRESETS, LossConfig, SDRConfig, TPAConfig, check, check_choice
from sdr.errors import SDRError
from sdr.evaluate import video_metrics
from sdr.files import make_folder, to_csv, write_atomic
from sdr.ftcn import FTCN
from sdr.loading import Batch, LoaderConfig, TrainingLoader
from sdr.losses import Losses, SDRLoss
from sdr.model import SDRModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Args:
        preset: of the model.
        num_branches: V; None keeps the preset's.
        temporal_kernels: False trains the control whose convolutions are all 1x1x1.
        epochs: passes over the larger class.
        batch_size: clips per step, half of them real.
        lr: of Adam, after the warm-up.
        weight_decay: of Adam.
        precision: ``bf16`` runs convolutions and products in bfloat16; weights, BN statistics and losses stay float32.
        init: weights of an FTCN (`sdr convert`) that every branch and the transformer start from; None starts anew.
        warmup_epochs: linear from 0; then a cosine to 0; None is a tenth of the epochs.
        seed: of initialisation, order and augmentation.
        max_bad_steps: consecutive steps with a non-finite loss or gradient after which training stops.
        loader: how clips are drawn from the cache, read and augmented.
        loss: weights and options of the losses.
        tpa: methods and strengths of the augmentation.
    """

    preset: str = "tiny"
    num_branches: int | None = None
    temporal_kernels: bool = True
    epochs: int = 100
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    init: str | None = None
    warmup_epochs: float | None = None
    seed: int = 0
    max_bad_steps: int = 10
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    tpa: TPAConfig = field(default_factory=TPAConfig)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))
        for name in ("epochs", "max_bad_steps"):
            check(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        check(self.batch_size >= 2 and self.batch_size % 2 == 0, "batch_size", "be even", self.batch_size)
        check(self.lr > 0, "lr", "be positive", self.lr)
        check(self.weight_decay >= 0, "weight_decay", "not be negative", self.weight_decay)
        check_choice("precision", self.precision, ("fp32", "bf16"))
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", self.epochs / 10)
        check(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", "lie in 0..epochs", self.warmup_epochs)

    def model(self) -> SDRConfig:
        fields = {"temporal_kernels": self.temporal_kernels}
        if self.num_branches is not None:
            fields["num_branches"] = self.num_branches
        return replace(PRESETS[self.preset](), **fields)


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Linear warm-up, then half a cosine to 0; ``epoch`` counts fractions too."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    rest = max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - config.warmup_epochs) / rest)))


def start_model(config: TrainConfig) -> SDRModel:
    """The model before its first step: from FTCN's weights where ``init`` names them."""
    if config.init is None:
        return SDRModel(config.model())
    source, _ = load_model(config.init)
    model = sdr_from_ftcn(source, config.model().num_branches) if isinstance(source, FTCN) else source
    if model.config != config.model():
        raise SDRError(config.init, f"has the configuration {model.config}", f"the run asks for {config.model()}")
    return model


class Trainer:
    """Model, losses and optimiser of one run; ``step`` is one update."""

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.model = start_model(config).to(device)
        self.loss = SDRLoss(config.loss).to(device)
        self.device = torch.device(device)
        self.parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.bad_steps = 0

    def step(self, batch: Batch, *, epoch: float) -> Losses:
        """One update; a non-finite loss or gradient leaves every weight as it was.

        Args:
            batch: views, labels and names.
            epoch: passes over the data until now, fractions too; sets the learning rate.

        Raises:
            SDRError: ``max_bad_steps`` such steps in a row; names the batch's clips.
        """
        statistics = [b.clone() for b in self.model.buffers()]
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(batch.views)
        losses = self.loss(output, batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if torch.isfinite(losses.total) and torch.isfinite(norm):
            self.optimizer.step()
            self.bad_steps = 0
        else:
            self._skip(statistics, batch.names)
        return Losses(*(x.detach() for x in losses))

    def _skip(self, statistics: Sequence[Tensor], names: Sequence[str]) -> None:
        with torch.no_grad():
            for buffer, saved in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(saved)
        logger.warning("step skipped, its loss or gradient is not finite; clips %s", ", ".join(names))
        self.bad_steps += 1
        if self.bad_steps >= self.config.max_bad_steps:
            raise SDRError(
                "training", f"{self.bad_steps} steps in a row had no finite loss", f"last clips: {', '.join(names)}"
            )

    @torch.inference_mode()
    def video_scores(self, cache: ClipCache) -> list[float]:
        """Mean clip score of each video, the same clip for every branch."""
        self.model.eval()
        scores = []
        for part in torch.arange(len(cache)).split(self.config.batch_size):
            clips = torch.stack([torch.from_numpy(cache.read(i)) for i in part.tolist()])  # [B, T, S, S, 3]
            scores.append(self.model(clips.to(self.device).permute(0, 4, 1, 2, 3)).logits.sigmoid().cpu())
        scores = torch.cat(scores)
        return [scores[cache.videos == v].mean().item() for v in range(len(cache.records))]


def evaluate(trainer: Trainer, cache: ClipCache) -> dict[str, float]:
    """Video-level metrics of a split; none where it holds a single class."""
    labels = [record.label for record in cache.records]
    return video_metrics(trainer.video_scores(cache), labels) if len(set(labels)) == 2 else {}


def train(
    config: TrainConfig,
    data: ClipCache,
    validation: ClipCache | None,
    out: str | Path,
    *,
    info: WeightsInfo,
    device: torch.device | str = "cpu",
    report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, figures: None,
) -> tuple[Path, dict[str, float]]:
    """Train and write ``model.safetensors``, ``log.csv`` and ``config.json`` to the folder ``out``.

    Args:
        config: of the run.
        data: clips to train on.
        validation: scored after the last epoch; its metrics are written into the weights.
        out: folder; made when missing.
        info: what the weights file is to say of its origin.
        device: to train on.
        report: called after every step with its number, the number of steps and the losses.

    Returns:
        The weights' path and the validation metrics.

    Raises:
        SDRError: the clips are not of the model's size, a clip cannot be read, or ``out`` holds weights already.
    """
    out = Path(out)
    weights = out / "model.safetensors"
    for cache in filter(None, (data, validation)):
        require_shape(cache, config.model())
    if weights.exists():
        raise SDRError(weights, "is there from an earlier run", "choose another --out, or remove it")
    make_folder(out)
    trainer = Trainer(config, device)
    loader = TrainingLoader(
        data,
        config.loader,
        config.tpa,
        batch_size=config.batch_size,
        num_views=config.model().num_branches,
        seed=config.seed,
        device=device,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )
    steps = len(loader) * config.epochs
    rows: list[dict] = []
    with closing(iter(loader)) as batches:
        for batch in islice(batches, steps):
            now = batch.epoch + (batch.index + 0.5) / len(loader)  # the middle of the step: neither end has a rate of 0
            losses = trainer.step(batch, epoch=now)
            figures = {name: value.item() for name, value in losses._asdict().items()}
            rows.append({"step": len(rows) + 1, "epoch": round(now, 4), **figures})
            report(len(rows), steps, figures)
    info = replace(info, training=to_json(config))
    save_weights(weights, trainer.model, info)  # before the evaluation, whose failure must not cost the run
    write_atomic(out / "log.csv", to_csv(rows, tuple(rows[0])))
    write_atomic(out / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    metrics = evaluate(trainer, validation) if validation else {}
    save_weights(weights, trainer.model, replace(info, metrics={f"validation {n}": v for n, v in metrics.items()}))
    return weights, metrics


def require_shape(cache: ClipCache, model: SDRConfig) -> None:
    """Raise SDRError where the cache's clips are not of the model's size."""
    T, S = cache.shape[:2]
    if model.num_frames != T or model.image_size != S:
        wanted = f"--num_frames {model.num_frames} --size {model.image_size}"
        raise SDRError(
            cache.folder, f"holds clips of {T} x {S} x {S}", f"the model takes those of sdr prepare {wanted}"
        )


def to_json(config: TrainConfig) -> dict:
    """The configuration as JSON values: sets become sorted lists."""
    return json.loads(json.dumps(asdict(config), default=sorted))
