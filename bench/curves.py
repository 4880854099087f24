"""Losses of `tiny` trained by the plain branches and by the kernels, from the same weights on the same clips.

``python bench/curves.py --impl triton --out curves.csv`` prints how far the curves are apart at most. Without a GPU the
kernels are interpreted, for which ``--small`` makes clips of 4 frames of 16 pixels and two branches.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sdr import SDRConfig, SDRLoss, tiny
from sdr.config import GroupedConfig
from sdr.fast import SDRModel

STEPS = 200
BAND = 1e-3  # of the loss, at every step
CLIPS = 4
SMALL = {"num_frames": 4, "image_size": 16, "num_branches": 2}


def losses(config: SDRConfig, grouped: GroupedConfig, device: torch.device, steps: int = STEPS) -> list[float]:
    """Of Adam, on clips that stand still where they are real and flicker where they are fake."""
    torch.manual_seed(0)
    model = SDRModel(replace(config, dropout=0.0), grouped=grouped).to(device).train()
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=1e-3), SDRLoss()
    labels = torch.arange(CLIPS) % 2
    shape = CLIPS, config.num_branches, 3, config.num_frames, config.image_size, config.image_size
    found = []
    for _ in range(steps):
        still = torch.randn(*shape[:3], 1, *shape[4:]).expand(shape)
        views = still + 0.5 * torch.randn(shape) * labels.view(-1, 1, 1, 1, 1, 1)
        total = loss(model(views.to(device)), labels.to(device)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.detach())
    return torch.stack(found).tolist()


def compare(
    config: SDRConfig, impl: str, device: torch.device, steps: int = STEPS, say: Callable[[str], None] = lambda _: None
) -> dict[str, list[float]]:
    """The curves of the plain branches and of both schemes."""
    runs = {"reference": GroupedConfig(impl="reference")}
    runs |= {scheme: GroupedConfig(scheme=scheme, impl=impl) for scheme in ("gram", "fused")}
    curves = {}
    for name, grouped in runs.items():
        curves[name] = losses(config, grouped, device, steps)
        say(f"{name}: {curves[name][0]:.6f} to {curves[name][-1]:.6f}")
    return curves


def apart(curves: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of each scheme's loss from the reference's, over all steps."""
    reference = curves["reference"]
    return {
        name: max(abs(a - b) for a, b in zip(curve, reference, strict=True))
        for name, curve in curves.items()
        if name != "reference"
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=("cpu", "triton"), default="triton")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="the curves as CSV")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before a launcher imports Triton
    config = replace(tiny(), **SMALL) if options.small else tiny()
    curves = compare(config, options.impl, device, options.steps, lambda line: print(line, flush=True))
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *curves])
            writer.writerows([step, *row] for step, row in enumerate(zip(*curves.values(), strict=True), 1))
    differences = apart(curves)
    for name, difference in differences.items():
        print(f"{name}: at most {difference:.2e} from the reference in {options.steps} steps, {BAND:.0e} allowed")
    return 0 if max(differences.values()) <= BAND else 1


if __name__ == "__main__":
    sys.exit(main())
