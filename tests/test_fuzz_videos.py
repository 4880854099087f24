"""Mutated videos: each ends as frames or as one line, in time, and leaves nothing behind."""

import time
from collections import Counter

import numpy as np
import pytest
from draws import FILES, draw, numbers, replay
from test_video import FRAGMENTED, KINDS, OpenWatch, assert_no_children, open_descriptors
from video_files import barcode, encode, mutated

from sdr.errors import SDRError
from sdr.video import Limits, open_video

SAME = {"x264-params": "mbtree=0"}  # with macroblock trees x264 writes other bytes now and then
ORIGINALS = {
    "h264.mp4": {"options": SAME},
    "h265.mp4": KINDS["h265.mp4"],
    "av1.mp4": KINDS["av1.mp4"],
    "fragmented.mp4": FRAGMENTED | {"options": FRAGMENTED["options"] | SAME},
    "prores.mov": KINDS["prores.mov"],
    "vp8.mkv": KINDS["vp8.webm"],
    "vp9-alpha.webm": KINDS["vp9-alpha.webm"],
    "mpeg4.avi": KINDS["mpeg4.avi"],
    "h264.ts": {"options": SAME},
    "mpeg1.mpg": KINDS["mpeg1.mpg"],
}
SECONDS = 20  # that one file may take
LISTED = 5  # failures that a message holds


def original(path):
    """Ten numbered pictures with noise, so that a decoder has work with each; the same bytes each time."""
    noise = np.random.default_rng(0).integers(-30, 30, (10, 48, 64))
    pictures = [np.clip(barcode(number) + noise[number], 0, 255).astype(np.uint8) for number in range(10)]
    return encode(path, pictures, **ORIGINALS[path.name])


def ending(path) -> tuple[str, str]:
    """How one pass over a file ends, in a word, and the line that says why."""
    try:
        with open_video(path, limits=Limits(seconds=SECONDS)) as opened:
            shape, last = (opened.info.height, opened.info.width, 3), float("-inf")
            for seconds, picture in opened.frames():
                assert picture.shape == shape
                assert last <= seconds
                last = seconds
        word, line = "damaged" if opened.damage else "whole", opened.damage
    except SDRError as error:
        word, line = "refused", str(error)
        if "decoder process" in line:
            word = "crashed"
        if "not decoded within" in line:
            word = "hung"
    except Exception as error:  # whatever else escapes is what this test looks for
        word, line = "other exceptions", repr(error)
    return word, line


def other_descriptors_stay(before: int) -> bool:
    """Whether more or fewer are open for a second; a thread of an earlier test may open one for a moment."""
    end = time.monotonic() + 1
    while open_descriptors() != before:
        if time.monotonic() > end:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.promise(row="fuzz")
@pytest.mark.parametrize("name", ORIGINALS)
def test_mutated_files_end_as_frames_or_one_line(tmp_path, name, record_property):
    place = list(ORIGINALS).index(name)
    data = original(tmp_path / name).read_bytes()
    second = original(tmp_path / list(ORIGINALS)[place - 1])
    other, path = second.read_bytes(), tmp_path / f"mutated-{name}"
    endings, bad, slowest = Counter(), [], 0.0
    with OpenWatch(second) as watch:
        before = open_descriptors()
        for number in numbers(FILES // len(ORIGINALS) + (place < FILES % len(ORIGINALS))):
            path.write_bytes(mutated(data, name, other, draw(name, number)))
            start = time.monotonic()
            word, line = ending(path)
            slowest = max(slowest, time.monotonic() - start)
            endings[word] += 1
            said = bool(line) or word == "whole"
            one_line = said and line.isprintable() and (path.name in line or word != "refused")
            if word not in ("whole", "damaged", "refused") or not one_line or other_descriptors_stay(before):
                bad.append(f"{word}: {line}: {replay(f'tests/test_fuzz_videos.py -k {name}', number)}")
                before = open_descriptors()
        assert_no_children()
        assert not watch.opened()
    for word in ("whole", "damaged", "refused", "crashed", "hung", "other exceptions"):
        record_property(f"mutated videos {word}", endings[word])
    record_property("longest mutated video, s", round(slowest, 2))
    assert not bad, f"{len(bad)} files: " + "\n".join(bad[:LISTED])
