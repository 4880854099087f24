"""Many clips scored in one process leave memory, descriptors, threads, processes and shared memory as they were."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import draws
import pytest
import score_runs

CLIPS = 12  # of a video
FRAMES = 8 + 2 * (CLIPS - 1)  # clips of 8 frames, a stride of 2

SCRIPT = """
import ctypes, gc, json, os, sys
from pathlib import Path
import forked, torch
from sdr.checkpoint import load_model
from sdr.score import ScoreConfig, Scorer
from sdr.score_command import recall_all, score_all
from sdr.score_run import KeptScores
from sdr.stopping import stopping

def usage():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and kept for later is no leak
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    # the folder is the whole machine's: what this process has mapped, and what bears its number
    mapped = {line.split("/dev/shm/")[1].split()[0] for line in open("/proc/self/maps") if "/dev/shm/" in line}
    named = {name for name in os.listdir("/dev/shm") if str(os.getpid()) in name.split("_")}
    children = [p.read_text().split() for p in Path("/proc/self/task").glob("*/children")]
    return {"memory": pages * os.sysconf("SC_PAGE_SIZE"), "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")), "processes": sum(map(len, children)),
            "shared memory": len(mapped | named)}

folder, count = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
config = ScoreConfig(stride=2)
scorer = Scorer(load_model(folder / "tiny.safetensors")[0], forked.StubDetector(), config, cache=folder / "cache")
kept = KeptScores(folder / "out", config, {})
videos = []
for number in range(count):  # the same bytes under other names, each a video to every part but the detections' cache
    path = folder / f"{number:04d}.mp4"
    os.link(folder / "video.mp4", path)
    videos.append((path, None))
warm, found = max(4, count // 10), []
with stopping() as stop:
    for part in (videos[:warm], videos[warm:]):
        records = recall_all(part, kept, folder / "scores.jsonl", stop)
        score_all(scorer, part, records, kept, folder / "scores.jsonl", stop)
        assert all(record["score"] is not None and record["clips"] == int(sys.argv[3]) for record in records)
        del records
        found.append(usage())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.promise(row="soak")
def test_many_clips_leave_everything_as_it_was(tmp_path, record_property):
    """The loop of `sdr score`: decoding, detections, scores, results and lines on disk."""
    score_runs.make_weights(tmp_path / "tiny.safetensors")
    score_runs.make_video(tmp_path / "video.mp4", 0, FRAMES)
    videos = max(8, math.ceil(draws.CLIPS / CLIPS))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, str(videos), str(CLIPS)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warm, last = json.loads(done.stdout.splitlines()[-1])
    growth = last["memory"] / warm["memory"] - 1
    record_property("clips scored in one process", videos * CLIPS)
    record_property("growth of its memory, percent", round(100 * growth, 3))
    record_property("memory after the last, MB", round(last["memory"] / 1e6, 1))
    names = [name for name in warm if name != "memory"]
    assert {name: last[name] for name in names} == {name: warm[name] for name in names}
    assert growth < 0.01
