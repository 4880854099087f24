"""FaceForensics++'s layout, split files and label lists."""

import json

import pytest

from sdr import SDRError
from sdr.datasets import Record, check_identities, ffpp_records, read_labels

PAIRS = {"train": [["000", "003"]], "val": [["001", "002"]], "test": [["004", "005"]]}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "splits").mkdir()
    for split, pairs in PAIRS.items():
        (tmp_path / "splits" / f"{split}.json").write_text(json.dumps(pairs))
        for a, b in pairs:
            for name in (
                *(f"original_sequences/youtube/c23/videos/{i}.mp4" for i in (a, b)),
                *(f"manipulated_sequences/{m}/c23/videos/{i}_{j}.mp4" for m in "AB" for i, j in ((a, b), (b, a))),
            ):
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
    return tmp_path


def test_records(root):
    records = ffpp_records(root, methods=["A", "B"])
    assert len(records) == 3 * (2 + 2 * 2)
    fake = next(r for r in records if r.path.name == "003_000.mp4" and r.method == "B")
    assert fake == Record(root / "manipulated_sequences/B/c23/videos/003_000.mp4", 1, "train", "B", "003")
    assert {(r.label, r.method) for r in records} == {(0, "real"), (1, "A"), (1, "B")}
    assert {r.split for r in records if r.identity in ("004", "005")} == {"test"}
    assert {r.method for r in ffpp_records(root, methods=["A"])} == {"real", "A"}
    check_identities(records)


def test_missing_parts_are_named(root):
    (root / "manipulated_sequences/A/c23/videos/003_000.mp4").unlink()
    with pytest.raises(SDRError, match=r"1 videos of the split files are missing, first 003_000\.mp4"):
        ffpp_records(root, methods=["A"])
    with pytest.raises(SDRError, match="no such folder"):
        ffpp_records(root, methods=["C"])
    (root / "splits/val.json").write_text("[1, 2]")
    with pytest.raises(SDRError, match=r"val\.json: is not a JSON list of id pairs"):
        ffpp_records(root)
    (root / "splits/val.json").unlink()
    with pytest.raises(SDRError, match=r"val\.json: no such split file"):
        ffpp_records(root)
    with pytest.raises(SDRError, match="is not in FaceForensics"):
        ffpp_records(root / "splits")


def test_identity_in_two_splits_is_refused(tmp_path):
    records = [Record(tmp_path / "a", 0, "train", "real", "7"), Record(tmp_path / "b", 1, "test", "A", "7")]
    with pytest.raises(SDRError, match="identity 7 is in both train and test"):
        check_identities(records)


def test_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("path,label,split\nv/a.mp4,1,test\nv/b.mp4,0,train\n")
    assert read_labels(path) == {f"{tmp_path}/v/a.mp4": 1, f"{tmp_path}/v/b.mp4": 0}
    assert read_labels(path, split="test") == {f"{tmp_path}/v/a.mp4": 1}
    path.write_bytes(b"\xef\xbb\xbfpath,label\r\na.mp4,1\r\n")  # as a spreadsheet saves it
    assert read_labels(path) == {f"{tmp_path}/a.mp4": 1}
    with pytest.raises(SDRError, match="cannot be read: No such file"):
        read_labels(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.mp4,fake\n", "line 2 must hold a path and the label 0 or 1, got 'a.mp4' and 'fake'"),
        ("path,label\na.mp4\n", "line 2 must hold a path and the label 0 or 1, got 'a.mp4' and None"),
        ("path,label\na.mp4,1\n./a.mp4,0\n", r"line 3 contradicts an earlier label of \./a\.mp4"),
        ("file,label\na.mp4,1\n", "has no column path"),
        ("", "has no column path and no column label"),
    ],
)
def test_wrong_labels_are_one_line(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(SDRError, match=message) as error:
        read_labels(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"ab": 1}', '["ab"]', "[" * 100_000, "[[1]]", ""], ids=lambda t: t[:9])
def test_wrong_split_files_are_one_line(root, text):
    (root / "splits/val.json").write_text(text)
    with pytest.raises(SDRError, match=r"val\.json: is not a JSON list of id pairs$"):
        ffpp_records(root, methods=["A", "B"])


def test_default_methods_are_the_known_ones(root):
    """FaceForensics++'s download also holds DeepFakeDetection, whose files are named otherwise."""
    (root / "manipulated_sequences/A").rename(root / "manipulated_sequences/FaceSwap")
    assert {r.method for r in ffpp_records(root)} == {"real", "FaceSwap"}
