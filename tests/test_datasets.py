"""Records, label lists, and reading the files that list videos."""

import json
import os

import pytest

from sdr import SDRError
from sdr.datasets import in_two_splits, is_path, read_json, read_labels, read_regular, read_table, shorten


def test_what_is_in_two_splits_is_named_once():
    rows = [("identity 7", "train", "a"), ("identity 8", "train", "b"), ("identity 7", "test", "c")]
    assert list(in_two_splits([*rows, ("identity 7", "test", "d"), ("identity 8", "train", "e")])) == [
        "identity 7 is in test (c) and train (a)"
    ]


def test_an_identity_cannot_forge_a_line():
    (line,) = in_two_splits([("identity 7\nall fine", split, "a\n") for split in ("train", "val")])
    assert "\n" not in line


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
        ("path,label,path\na.mp4,1,b.mp4\n", "has two columns of one name"),
        ("path,label\na\0.mp4,1\n", r"line 2 must hold a path and the label 0 or 1, got 'a\\x00\.mp4' and '1'"),
        (f"path,label\n{'a' * 300},1\n", r"line 2 must hold .* got 'a{77}'\.\.\. and '1'"),
        ('path,label\n"a\n.mp4",1\n"a\n.mp4",0\n', r"line 5 contradicts an earlier label of a\\n\.mp4"),
        pytest.param(f"path,label\n{'a' * 200_000},1\n", "is not CSV: field larger than field limit", id="long field"),
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1', "is not JSON: Expecting"),
        (b"", "is not JSON: Expecting value"),
        (b"[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
        (b"9" * 5000, "is not JSON: Exceeds the limit"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "names 'c' twice"),
        (b'{"\xff": 1}', "is not UTF-8 text"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_json_is_one_line(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(SDRError, match=message) as error:
        read_json(tmp_path / "x.json")
    assert str(error.value).startswith(f"{tmp_path}/x.json: ")
    assert "\n" not in str(error.value)


def test_json_and_tables_are_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": [1, None, "\u00fc"]}).encode())
    assert read_json(tmp_path / "x.json") == {"a": [1, None, "\u00fc"]}
    (tmp_path / "x.csv").write_text('a,b\n1,2\n\n"3\n4",5\n')
    assert list(read_table(tmp_path / "x.csv", ("a",))) == [(2, {"a": "1", "b": "2"}), (5, {"a": "3\n4", "b": "5"})]


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert read_regular(tmp_path / "ten", 10) == b"0123456789"
    with pytest.raises(SDRError, match="ten: is larger than 9 bytes"):
        read_regular(tmp_path / "ten", 9)
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), (".", "not a regular file"), ("no", "No such file")):
        with pytest.raises(SDRError, match=message):
            read_regular(tmp_path / name)
    with pytest.raises(SDRError, match="cannot be read: embedded null"):
        read_regular(f"{tmp_path}/a\0b")


@pytest.mark.parametrize("text", ["a", "/a/b", "../a", "a" * 255, "/".join("ab" * 500), "\udcff", " "], ids=ascii)
def test_is_path_takes_what_a_file_system_takes(tmp_path, text):
    assert is_path(text)
    os.path.lexists(tmp_path / text)


@pytest.mark.parametrize(
    "text", ["", "a\0", "a" * 256, "\u00fc" * 128, "a/" * 2000, "\ud800", None, 3, ["a"]], ids=ascii
)
def test_is_path_refuses_what_raises(text):
    assert not is_path(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n\x1b[0m", r"'a\n\x1b[0m'"),
        ("x" * 81, f"'{'x' * 77}'..."),
        (None, "None"),
        ([1], "a list"),
        ({}, "an object"),
    ],
)
def test_quoted_values_are_one_short_line(value, text):
    assert shorten(value) == text
