"""Folders of tiny videos to score, a model as tiny, and what of a run's results must be the same every time."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import video_files

from sdr import SDRModel, tiny
from sdr.checkpoint import WeightsInfo, save_weights

FRAMES = 12
SMALL = {"num_frames": 8, "image_size": 32, "width": 4, "embed_dim": 16}


def make_weights(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = SDRModel(replace(tiny(), **SMALL)).eval()
    save_weights(path, model, WeightsInfo(origin="random", synthetic=True))
    return path


def make_video(path: Path, seed: int, frames: int = FRAMES) -> Path:
    """Noise that moves, 64 x 64."""
    noise = np.random.default_rng(seed).integers(0, 255, (64, 64 + frames, 3), np.uint8)
    return video_files.encode(path, [noise[:, n : n + 64] for n in range(frames)], options={"preset": "ultrafast"})


def make_folder(folder: Path, videos: int = 6) -> Path:
    """Videos of which the last is none."""
    folder.mkdir()
    for number in range(videos - 1):
        make_video(folder / f"{number}.mp4", number)
    (folder / f"{videos - 1}.mp4").write_bytes(b"\0" * 500)
    return folder


def words(videos: Path, weights: Path, out: Path, cache: Path) -> list[str]:
    """Of the command line; two clips a video."""
    options = ["--weights", weights, "--out", out, "--cache", cache, "--stride", "4", "--min_frames", "4"]
    return list(map(str, ["score", videos, *options]))


def results(out: Path) -> dict[str, object]:
    """What is in the three files, but for measured seconds, the time of day and the command line."""
    table = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    page = (out / "report.html").read_text()
    # seconds of a video stand in a cell of the table, behind its value, and in its section
    page = re.sub(r'data-value="[0-9.e-]+">[0-9.]+ s</td>', "", page)
    page = re.sub(r"<dt>Time taken</dt><dd>[0-9.]+ s", "", page)
    page = re.sub(r'data-fact="(created|command)">.*?</dd>', "", page)
    for row in (*table, *lines):
        del row["seconds"]
    return {"table": table, "lines": lines, "page": page}
