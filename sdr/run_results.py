"""What a finished run leaves for people: the report and the model card."""

from datetime import UTC, datetime
from pathlib import Path

from sdr.checkpoint import WeightsInfo
from sdr.config import FTCNConfig
from sdr.evaluate import ScoredVideos, evaluate_groups
from sdr.files import write_atomic
from sdr.model_card import model_card
from sdr.run_log import read_log
from sdr.training_report import TrainingRun, render_training_report

REPORT, CARD = "report.html", "README.md"


def write_results(
    out: Path, *, info: WeightsInfo, config: FTCNConfig, data: str, scored: ScoredVideos | None, threshold: float | None
) -> None:
    """Write report.html and README.md to a run's folder.

    Args:
        out: with the run's logs.
        info: of the weights that were kept.
        config: of the model.
        data: one phrase: what it was trained on.
        scored: the validation videos, by the weights that were kept; None without a validation split.
        threshold: the validation split's.
    """
    import sdr

    groups = [] if scored is None else evaluate_groups(scored, validation_threshold=threshold)
    run = TrainingRun(
        title=out.resolve().name,
        config=info.training,
        origin=info.origin,
        synthetic=info.synthetic,
        version=sdr.__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        losses=read_log(out / "losses.csv"),
        throughput=read_log(out / "throughput.csv"),
        validation=read_log(out / "validation.csv"),
        scored=scored,
        threshold=threshold,
        metrics=info.metrics,
    )
    write_atomic(out / REPORT, render_training_report(run))
    named = [group._replace(dataset=f"{group.dataset}, validation split") for group in groups]
    write_atomic(out / CARD, model_card(name=run.title, info=info, config=config, groups=named, data=data))
