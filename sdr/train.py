"""The training step and loop: one process, the reference model, all losses, TPA."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sdr.checkpoint import WeightsInfo, save_weights
from sdr.config import PRESETS, LossConfig, SDRConfig, TPAConfig, check, check_choice, with_fields
from sdr.errors import SDRError
from sdr.evaluate import video_metrics
from sdr.files import make_folder, to_csv, write_atomic
from sdr.loading import ClipSet, balanced_batches
from sdr.losses import Losses, SDRLoss
from sdr.model import SDRModel
from sdr.tpa import augment


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained (specification section 7).

    Args:
        preset: of the model.
        num_branches: V; None keeps the preset's.
        temporal_kernels: False trains the control whose convolutions are all 1x1x1.
        epochs: passes over the larger class.
        batch_size: clips per step, half of them real.
        lr: of Adam, after the warm-up.
        warmup_epochs: linear from 0; then a cosine to 0.
        seed: of initialisation, order and augmentation.
        max_bad_steps: consecutive steps with a non-finite loss or gradient after which training stops.
        loss: weights and options of the losses.
        tpa: methods and strengths of the augmentation.
    """

    preset: str = "tiny"
    num_branches: int | None = None
    temporal_kernels: bool = True
    epochs: int = 100
    batch_size: int = 16
    lr: float = 1e-4
    warmup_epochs: float = 10
    seed: int = 0
    max_bad_steps: int = 10
    loss: LossConfig = field(default_factory=LossConfig)
    tpa: TPAConfig = field(default_factory=TPAConfig)

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))
        for name in ("epochs", "max_bad_steps"):
            check(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        check(self.batch_size >= 2 and self.batch_size % 2 == 0, "batch_size", "be even", self.batch_size)
        check(self.lr > 0, "lr", "be positive", self.lr)
        check(0 <= self.warmup_epochs <= self.epochs, "warmup_epochs", "lie in 0..epochs", self.warmup_epochs)

    def model(self) -> SDRConfig:
        fields = {"temporal_kernels": self.temporal_kernels}
        if self.num_branches is not None:
            fields["num_branches"] = self.num_branches
        return with_fields(PRESETS[self.preset](), **fields)


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """Linear warm-up, then half a cosine to 0; ``epoch`` counts fractions too."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    rest = max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - config.warmup_epochs) / rest)))


class Trainer:
    """Model, losses and optimiser of one run; ``step`` is one update."""

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.model = SDRModel(config.model()).to(device)
        self.loss = SDRLoss(config.loss).to(device)
        self.device = torch.device(device)
        self.parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr)
        self.bad_steps = 0

    def step(self, clips: Tensor, labels: Tensor, *, samples: Sequence[int], epoch: float) -> Losses:
        """One update on uint8 clips, [B, 3, T, S, S]; a non-finite loss or gradient leaves every weight as it was.

        Raises:
            SDRError: ``max_bad_steps`` such steps in a row; names the batch's samples.
        """
        V = self.model.config.num_branches
        views = augment(
            clips.to(self.device),
            self.config.tpa,
            seed=self.config.seed,
            epoch=int(epoch),
            samples=list(samples),
            num_views=V,
        )
        statistics = [b.clone() for b in self.model.buffers()]
        self.model.train()
        losses = self.loss(self.model(views), labels.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, epoch)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if torch.isfinite(losses.total) and torch.isfinite(norm):
            self.optimizer.step()
            self.bad_steps = 0
        else:
            self._skip(statistics, samples)
        return Losses(*(x.detach() for x in losses))

    def _skip(self, statistics: Sequence[Tensor], samples: Sequence[int]) -> None:
        with torch.no_grad():
            for buffer, saved in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(saved)
        self.bad_steps += 1
        if self.bad_steps >= self.config.max_bad_steps:
            names = ", ".join(map(str, samples))
            raise SDRError("training", f"{self.bad_steps} steps in a row had no finite loss", f"last samples: {names}")

    @torch.inference_mode()
    def video_scores(self, data: ClipSet) -> list[float]:
        """Mean clip score of each video, the same clip for every branch."""
        self.model.eval()
        size = self.config.batch_size
        scores = torch.cat([self.model(part.to(self.device)).logits.sigmoid().cpu() for part in data.clips.split(size)])
        return [scores[data.videos == v].mean().item() for v in range(len(data.records))]


def evaluate(trainer: Trainer, data: ClipSet) -> dict[str, float]:
    """Video-level metrics of a split; none where it holds a single class."""
    labels = [record.label for record in data.records]
    return video_metrics(trainer.video_scores(data), labels) if len(set(labels)) == 2 else {}


def train(
    config: TrainConfig,
    data: ClipSet,
    validation: ClipSet | None,
    out: str | Path,
    *,
    info: WeightsInfo,
    device: torch.device | str = "cpu",
    report: Callable[[int, int, dict[str, float]], None] = lambda step, steps, figures: None,
) -> tuple[Path, dict[str, float]]:
    """Train and write ``model.safetensors``, ``log.csv`` and ``config.json`` to the folder ``out``.

    Args:
        config: of the run.
        data: training clips.
        validation: scored after the last epoch; its metrics are written into the weights.
        out: folder; made when missing.
        info: what the weights file is to say of its origin.
        device: to train on.
        report: called after every step with its number, the number of steps and the losses.

    Returns:
        The weights' path and the validation metrics.
    """
    out = Path(out)
    make_folder(out)
    trainer = Trainer(config, device)
    per_epoch = len(list(balanced_batches(data.labels, config.batch_size, seed=config.seed, epoch=0)))
    steps = per_epoch * config.epochs
    rows: list[dict] = []
    for epoch in range(config.epochs):
        for i, batch in enumerate(balanced_batches(data.labels, config.batch_size, seed=config.seed, epoch=epoch)):
            now = epoch + (i + 0.5) / per_epoch  # the middle of the step, so that neither end has a rate of 0
            losses = trainer.step(data.clips[batch], data.labels[batch], samples=batch, epoch=now)
            figures = {name: value.item() for name, value in losses._asdict().items()}
            rows.append({"step": len(rows) + 1, "epoch": round(now, 4), **figures})
            report(len(rows), steps, figures)
    metrics = evaluate(trainer, validation) if validation else {}
    weights = out / "model.safetensors"
    save_weights(
        weights,
        trainer.model,
        WeightsInfo(
            origin=info.origin,
            synthetic=info.synthetic,
            metrics={f"validation {name}": value for name, value in metrics.items()},
            training=to_json(config),
        ),
    )
    write_atomic(out / "log.csv", to_csv(rows, tuple(rows[0])))
    write_atomic(out / "config.json", json.dumps(to_json(config), indent=2) + "\n")
    return weights, metrics


def to_json(config: TrainConfig) -> dict:
    """The configuration as JSON values: sets become sorted lists."""
    return json.loads(json.dumps(asdict(config), default=sorted))
