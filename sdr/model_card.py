"""The model card that goes with weights: Markdown, with the YAML front matter that the Hugging Face Hub reads.

Every text that comes from a user is escaped: no name, origin or setting can break the front matter, a table or a block
of code, or put HTML into the page.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdr.config import FTCNConfig, SDRConfig
from sdr.errors import escape
from sdr.hub import is_repository
from sdr.terminal import SYNTHETIC_NOTE

if TYPE_CHECKING:
    from sdr.checkpoint import WeightsInfo
    from sdr.evaluate import Group

METRIC_TYPES = {"AUC": "roc_auc", "accuracy": "accuracy", "EER": "equal_error_rate", "AP": "average_precision"}
UNKNOWN = "not recorded"

PAGE = """---
{front_matter}
---

# {name}
{banner}
{model}

## Data

Trained on: {data}

Where the weights come from: {origin}

## Metrics

{metrics}

## Use

```python
from {module} import {kind}

model = {kind}.from_pretrained({python_name})
```

On the command line, with the `model.safetensors` that lies beside this card:

```sh
{download}sdr score VIDEO --weights model.safetensors
```

The weights file holds the configuration and the preprocessing, and loading it runs no code. Clips are {T} consecutive
frames of one followed face, aligned by one transform a clip, {S} x {S} pixels; `sdr score` makes them of videos.

## Intended use

Research on video forgery detection, and hints to people who examine a video. A person decides: before anything follows
for anybody, check where the video comes from, look for its original, and watch what the score points at.

Not for: proof that a video is real or manipulated; decisions without a person; moderation, identification or
surveillance of people at scale; audio, images, or videos without a face.

## Limits

- The score is not a probability that a video was manipulated, and scores of different weights cannot be compared.
- It knows what it was trained on. Forgeries made in another way, wholly generated videos, and fakes in which only the
  voice is false may score low.
- Strong compression, re-uploads, filters, cuts, dropped frames, fast motion and unusual cameras move the score, in both
  directions.
- Only faces that were found and followed are judged. A short forged part can vanish in the mean of a long video.
- Whether it works equally well for all groups of people has not been measured.
- The threshold is a choice. {threshold}
{synthetic_limit}
## Training settings

{training}

## Citation

The model and its losses: Chu, Xu, Zhang, You, Zhou, "Reduced Spatial Dependency for More General Video-level Deepfake
Detection", [arXiv:2503.03270](https://arxiv.org/abs/2503.03270). The backbone and the temporal transformer: Zheng, Bao,
Chen, Zeng, Wen, "Exploring Temporal Coherence for More General Video Face Forgery Detection", ICCV 2021. These weights
and this software are not the authors'.
"""
BANNER = """
> **Trained on synthetic videos: these weights detect nothing real.** {note}
"""


def model_card(
    *,
    name: str,
    info: WeightsInfo,
    config: FTCNConfig | SDRConfig,
    groups: Sequence[Group] | None = None,
    data: str = "",
    license: str | None = None,
) -> str:
    """The text of README.md for weights.

    Args:
        name: of the model; on the Hub ``owner/name``.
        info: what the weights say of themselves.
        config: of the model.
        groups: results of an evaluation.
        data: one phrase: what the model was trained on.
        license: identifier of the weights' licence as the Hub names it; None leaves it open.
    """
    kind = "SDRModel" if isinstance(config, SDRConfig) else "FTCN"
    return PAGE.format(
        front_matter=front_matter(name, info, kind, groups or [], license),
        name=markdown(name),
        banner=BANNER.format(note=SYNTHETIC_NOTE) if info.synthetic else "",
        model=describe(config),
        data=markdown(data) or UNKNOWN,
        origin=markdown(info.origin) or UNKNOWN,
        metrics=metrics_section(info, groups or []),
        kind=kind,
        module="sdr.fast" if kind == "SDRModel" else "sdr",
        python_name=quoted(name),
        download=f"hf download {name} model.safetensors --local-dir .\n" if is_repository(name) else "",
        T=config.num_frames,
        S=config.image_size,
        threshold=threshold_sentence(info),
        synthetic_limit=f"- Its figures come from synthetic videos. {SYNTHETIC_NOTE}\n" if info.synthetic else "",
        training=code_block(dict(info.training)) if info.training else "None were recorded.",
    )


def markdown(text: str) -> str:
    """One printable line in which nothing is markup; not to stand at the beginning of a line."""
    marked = re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", escape(text).strip())
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code_block(value: object) -> str:
    """JSON; no line of it begins with anything but white space, a bracket, a quote or a literal."""
    return f"```json\n{json.dumps(value, indent=2)}\n```"


def describe(config: FTCNConfig) -> str:
    """What the model is, in a paragraph."""
    space = config.spatial_kernel
    backbone = "a temporal-only 3D ResNet" if space == 1 else f"a 3D ResNet with kernels of {space} in space"
    backbone += f" to res{config.backbone_stages + 1} ({config.backbone_channels} channels)"
    if isinstance(config, SDRConfig):
        branches = f"{config.num_branches} branches" if config.num_branches != 1 else "one branch"
        what = (
            f"A video-level deepfake detector, SDR (Reduced Spatial Dependency): {branches}, each {backbone}, joined "
            "by task-relevant feature integration and a temporal transformer."
        )
    else:
        what = f"A video-level deepfake detector, FTCN: {backbone} and a temporal transformer."
    if not config.temporal_kernels:
        what += " Its kernels are all 1 in time: a control, which cannot see motion in the backbone."
    return f"{what} It puts out one score in 0..1 for each clip, higher the more the face's motion looks forged."


def metrics_section(info: WeightsInfo, groups: Sequence[Group]) -> str:
    """Tables of what was measured."""
    parts = []
    if groups:
        names = list(dict.fromkeys(name for group in groups for name in group.metrics))
        rows = [
            [group.dataset, group.method, str(group.real), str(group.fake)]
            + [figure(group.metrics.get(name, math.nan), group.intervals.get(name)) for name in names]
            for group in groups
        ]
        parts += [
            "One score per video; in brackets 95 % bootstrap intervals over videos. The accuracy counts a score of 0.5 "
            "or more as fake where it names no other threshold.",
            table(["dataset", "fakes", "real", "fake", *names], rows),
        ]
    if info.metrics:
        parts += [
            "Measured when the weights were made. Figures of a validation split flatter: it has chosen the weights.",
            table(["metric", "value"], [[name, figure(value)] for name, value in info.metrics.items()]),
        ]
    return "\n\n".join(parts) or "None were recorded."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell if i == 1 else markdown(cell) for cell in line) + " |" for i, line in enumerate(lines)
    )


def figure(value: float, bounds: tuple[float, float] | None = None) -> str:
    """Three decimals, with the interval where one is known."""
    if not math.isfinite(value):
        return "undefined"
    return f"{value:.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def threshold_sentence(info: WeightsInfo) -> str:
    value = info.metrics.get("validation threshold")
    best = "" if value is None else f" the validation split's most accurate one was {figure(value)};"
    return f"Commands take 0.5 unless told otherwise;{best} close to it the words real and fake mean little."


def front_matter(name: str, info: WeightsInfo, kind: str, groups: Sequence[Group], license: str | None) -> str:
    """YAML; strings are JSON's, which are YAML's too."""
    tags = ["deepfake-detection", "face-forgery-detection", "video-classification", kind.lower().removesuffix("model")]
    lines = ["library_name: sdr", "pipeline_tag: video-classification"]
    if license is not None:
        lines.append(f"license: {quoted(license)}")
    lines.append(f"tags: {json.dumps(tags + ['synthetic'] * info.synthetic)}")
    found = [(f"{group.dataset}, {group.method} fakes", group.metrics) for group in groups]
    found.append(
        ("split that chose the weights", {n: v for n, v in info.metrics.items() if n.startswith("validation ")})
    )
    results = [result(*entry, synthetic=info.synthetic) for entry in found]
    if results := [text for text in results if text]:
        lines += ["model-index:", f"- name: {quoted(name)}", "  results:", *results]
    return "\n".join(lines)


def result(dataset: str, metrics: dict[str, float], *, synthetic: bool) -> str:
    """A dataset's entry in the model index; empty where no metric is finite."""
    entries = []
    for name, value in metrics.items():
        kind = METRIC_TYPES.get(name.split(" at ")[0].split(" ")[-1])
        if kind and math.isfinite(value):
            # fixed point: YAML 1.1 reads 1e-05 as a text
            entries.append(f"    - {{type: {kind}, name: {quoted(name)}, value: {value:.6f}}}")
    if not entries:
        return ""
    slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "videos"
    shown = f"{dataset} (synthetic, says nothing about real deepfakes)" if synthetic else dataset
    head = [
        '  - task: {type: video-classification, name: "Video-level deepfake detection"}',
        f"    dataset: {{type: {quoted(slug)}, name: {quoted(shown)}}}",
        "    metrics:",
    ]
    return "\n".join([*head, *entries])


def quoted(text: str) -> str:
    return json.dumps(escape(text), ensure_ascii=False)
