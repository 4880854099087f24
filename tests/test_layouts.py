"""The datasets' layouts: what `sdr synth` wrote is read back, and what is missing or broken is one line."""

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from sdr import SDRError
from sdr.datasets import Record, in_two_splits
from sdr.frame_lists import open_frames
from sdr.layouts import LAYOUTS, frame_gap_reason, other_layouts, read_layout
from sdr.synth import synthesize
from sdr.video import open_video

SMALL = {"identities": 8, "frames": 8, "size": 64, "methods": ("GainFlicker", "FullJitter")}
WRITTEN = ("ffpp", "celebdf", "dfdc", "deepfakebench")
NEEDS = "a temporal model needs consecutive ones"
PAIRS = {"train": [["000", "003"]], "val": [["001", "002"]], "test": [["004", "005"]]}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def refused(layout: str, root: Path, match: str, **options) -> SDRError:
    with pytest.raises(SDRError, match=match) as error:
        read_layout(layout, root, **options)
    assert "\n" not in str(error.value)
    return error.value


# --- what sdr synth writes ---


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, tmp_path_factory) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("synth") / request.param
    synthesize(root, layout=request.param, crf=(23,), **SMALL)
    return request.param, root


def rows(root: Path) -> dict[Path, dict]:
    with open(root / "videos.csv", newline="") as file:
        return {root / row["path"]: row for row in csv.DictReader(file)}


def test_records_are_those_of_the_list(written):
    layout, root = written
    records, known = read_layout(layout, root), rows(root)
    assert len(records) == len(known) == 30
    persons: dict[str, set[str]] = {}
    for record in records:
        row = known.pop(record.path)
        assert (str(record.label), record.split, record.method) == (row["label"], row["split"], row["method"])
        persons.setdefault(record.identity, set()).add(row["identity"])
    assert not known
    assert all(len(names) == 1 for names in persons.values())  # no identity is two persons
    assert not list(in_two_splits((r.identity, r.split, str(r.path)) for r in records))
    assert records == read_layout(layout, str(root))


def test_files_are_there_and_open(written):
    layout, root = written
    records = read_layout(layout, root)
    for number, record in enumerate(records):
        if layout == "deepfakebench":
            assert record.path.is_dir()
            assert frame_gap_reason(record.frames) == ""
            with open_frames(record.path, record.frames) as video:
                shapes = {frame.shape for _, frame in video.frames()}
        else:
            assert record.frames == ()
            assert record.path.is_file()
            if number % 7:  # a decoding process each takes its time
                continue
            with open_video(record.path) as video:
                shapes = {frame.shape for _, frame in video.frames()}
        assert shapes == {(64, 64, 3)}
        assert video.frames_read == 8
    assert all((record.mask is not None) == (layout == "ffpp" and record.label == 1) for record in records)


def test_methods_are_chosen(written):
    layout, root = written
    methods = {record.method for record in read_layout(layout, root) if record.label}
    chosen = sorted(methods)[:1]
    records = read_layout(layout, root, methods=chosen)
    assert {record.method for record in records} == {"real", *chosen}
    assert records == [r for r in read_layout(layout, root) if r.method in ("real", *chosen)]
    refused(
        layout, root, "no such folder" if layout == "ffpp" else "has no method 'Nonsense', only", methods=["Nonsense"]
    )


def test_the_list_itself_is_a_layout(written):
    _, root = written
    records, known = read_layout("csv", root), rows(root)
    assert records == read_layout("csv", root / "videos.csv")
    assert [record.path for record in records] == list(known)
    for record, row in zip(records, known.values(), strict=True):
        assert (record.split, record.method, record.identity) == (row["split"], row["method"], row["identity"])


def test_other_layouts_are_named(written, tmp_path):
    layout, root = written
    names = dict(zip(WRITTEN, ("FaceForensics++", "Celeb-DF-v2", "DFDC", "DeepfakeBench"), strict=True))
    assert other_layouts(root, layout) == []
    assert other_layouts(root, "csv") == [names[layout]]
    touch(tmp_path, "List_of_testing_videos.txt", "original_sequences/x", "part/metadata.json")
    (tmp_path / "x.json").write_text('{"A": {"B": {"train": {}}}}')
    assert other_layouts(tmp_path, layout) == [name for key, name in names.items() if key != layout]
    assert other_layouts(tmp_path / "nowhere", layout) == []


# --- FaceForensics++ ---


@pytest.fixture
def ffpp(tmp_path):
    root = tmp_path / "ffpp"
    for split, pairs in PAIRS.items():
        touch(root, f"splits/{split}.json")
        (root / "splits" / f"{split}.json").write_text(json.dumps(pairs))
        for a, b in pairs:
            touch(root, *(f"original_sequences/youtube/c23/videos/{i}.mp4" for i in (a, b)))
            for m in "AB":
                touch(root, *(f"manipulated_sequences/{m}/c23/videos/{i}.mp4" for i in (f"{a}_{b}", f"{b}_{a}")))
    return root


def test_ffpp(ffpp):
    touch(ffpp, "manipulated_sequences/B/masks/videos/003_000.mp4")
    records = read_layout("ffpp", ffpp, methods=["A", "B"])
    assert len(records) == 3 * (2 + 2 * 2)
    fake = next(r for r in records if r.path.name == "003_000.mp4" and r.method == "B")
    folder = ffpp / "manipulated_sequences/B"
    assert fake == Record(
        folder / "c23/videos/003_000.mp4", 1, "train", "B", "003", mask=folder / "masks/videos/003_000.mp4"
    )
    assert [r for r in records if r.mask] == [fake]
    assert {(r.label, r.method) for r in records} == {(0, "real"), (1, "A"), (1, "B")}
    assert {r.split for r in records if r.identity in ("004", "005")} == {"test"}
    assert {r.method for r in read_layout("ffpp", ffpp, methods=["A"])} == {"real", "A"}
    assert not list(in_two_splits((r.identity, r.split, str(r.path)) for r in records))


def test_ffpp_takes_the_known_methods_that_are_there(ffpp):
    """FaceForensics++'s download also holds DeepFakeDetection, whose files are named otherwise."""
    (ffpp / "manipulated_sequences/A").rename(ffpp / "manipulated_sequences/FaceSwap")
    assert {r.method for r in read_layout("ffpp", ffpp)} == {"real", "FaceSwap"}


def test_ffpp_split_files_stand_in_any_of_three_places(ffpp, tmp_path):
    expected = read_layout("ffpp", ffpp, methods=["A"])
    for split in PAIRS:
        (ffpp / "splits" / f"{split}.json").rename(ffpp / f"{split}.json")
    assert read_layout("ffpp", ffpp, methods=["A"]) == expected
    (tmp_path / "official").mkdir()
    for split in PAIRS:
        (ffpp / f"{split}.json").rename(tmp_path / "official" / f"{split}.json")
    assert read_layout("ffpp", ffpp, methods=["A"], splits=tmp_path / "official") == expected
    refused("ffpp", ffpp, r"splits/train\.json: no such split file", methods=["A"])
    refused("ffpp", ffpp, "is not a folder", methods=["A"], splits=tmp_path / "official/val.json")


def test_ffpp_missing_videos_are_records(ffpp):
    expected = read_layout("ffpp", ffpp, methods=["A"])
    (ffpp / "manipulated_sequences/A/c23/videos/003_000.mp4").unlink()
    assert read_layout("ffpp", ffpp, methods=["A"]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "is not a JSON list of id pairs") for text in ('{"ab": 1}', '["ab"]', "[[1]]", "null", "[1, 2]")),
        *((text, "is not JSON") for text in ("[" * 100_000, "")),
        *(
            (f'[["000", {i}]]', "an id must be the name of a video")
            for i in ("1", "null", '"../a"', '"/a"', '"a\\u0000"')
        ),
        *(
            (f'[["000", {i}]]', "an id must be the name of a video")
            for i in ('""', '".."', '"\\ud800"', f'"{"a" * 300}"')
        ),
        ('[["000", "001"]]', "is listed twice"),
        ('[["007", "007"]]', "is listed twice"),
    ],
    ids=lambda t: t[:20],
)
def test_ffpp_wrong_split_files(ffpp, text, message):
    (ffpp / "splits/val.json").write_text(text)
    error = refused("ffpp", ffpp, message, methods=["A"])
    assert str(error).startswith(f"{ffpp}/{'original' if 'twice' in message else 'splits/val.json: '}")


def test_ffpp_missing_parts(ffpp):
    refused("ffpp", ffpp, "no such folder", methods=["C"])
    refused("ffpp", ffpp, "no such folder", methods=["A"], compression="c" * 300)
    for split in PAIRS:
        (ffpp / "splits" / f"{split}.json").write_text("[]")
    refused("ffpp", ffpp, "lists no video")
    refused("ffpp", ffpp / "splits", r"is not in FaceForensics\+\+'s layout")


# --- Celeb-DF-v2 ---


@pytest.fixture
def celebdf(tmp_path):
    root = tmp_path / "celebdf"
    touch(root, "Celeb-real/id0_0000.mp4", "Celeb-real/id0_0001.mp4", "Celeb-synthesis/id0_id1_0001.mp4")
    touch(
        root,
        "Celeb-synthesis/id10_id0_0000.mp4",
        "YouTube-real/00170.mp4",
        "YouTube-real/._00170.mp4",
        "YouTube-real/x.txt",
    )
    lines = ["1 YouTube-real/00170.mp4", "0 Celeb-synthesis/id0_id1_0001.mp4", "1 Celeb-real/id0_0009.mp4", ""]
    (root / "List_of_testing_videos.txt").write_text("\r\n".join(lines))
    return root


def test_celebdf(celebdf):
    expected = [
        ("Celeb-real/id0_0000.mp4", 0, "train", "real", "id0"),
        ("Celeb-real/id0_0001.mp4", 0, "train", "real", "id0"),
        ("Celeb-real/id0_0009.mp4", 0, "test", "real", "id0"),  # listed, not there
        ("Celeb-synthesis/id0_id1_0001.mp4", 1, "test", "Celeb-synthesis", "id0"),
        ("Celeb-synthesis/id10_id0_0000.mp4", 1, "train", "Celeb-synthesis", "id10"),
        ("YouTube-real/00170.mp4", 0, "test", "real", "YouTube-real/00170"),
    ]
    assert read_layout("celebdf", celebdf) == [Record(celebdf / name, *rest) for name, *rest in expected]


def test_celebdf_label_is_the_folders(celebdf):
    path = celebdf / "List_of_testing_videos.txt"
    expected = read_layout("celebdf", celebdf)
    path.write_text("0 YouTube-real/00170.mp4\n1 Celeb-synthesis/id0_id1_0001.mp4\n0 Celeb-real/id0_0009.mp4\n")
    assert read_layout("celebdf", celebdf) == expected


def test_celebdf_list_may_stand_elsewhere(celebdf, tmp_path):
    expected = read_layout("celebdf", celebdf)
    (celebdf / "List_of_testing_videos.txt").rename(tmp_path / "List_of_testing_videos.txt")
    refused("celebdf", celebdf, r"List_of_testing_videos\.txt: cannot be read: No such file")
    assert read_layout("celebdf", celebdf, splits=tmp_path) == expected
    assert read_layout("celebdf", celebdf, splits=tmp_path / "List_of_testing_videos.txt") == expected


@pytest.mark.parametrize(
    "line",
    [
        "YouTube-real/00170.mp4",
        "2 YouTube-real/00170.mp4",
        "1 Elsewhere/00170.mp4",
        "1 YouTube-real/../a.mp4",
        "1 YouTube-real//etc/a.mp4",
        "1 /a.mp4",
        "1 YouTube-real/00170.avi",
        "1 YouTube-real/a\0.mp4",
        f"1 YouTube-real/{'a' * 300}.mp4",
    ],
    ids=lambda line: ascii(line)[:30],
)
def test_celebdf_wrong_lines(celebdf, line):
    (celebdf / "List_of_testing_videos.txt").write_text(f"1 Celeb-real/id0_0000.mp4\n{line}\n")
    refused("celebdf", celebdf, r"List_of_testing_videos\.txt: line 2 must be")


def test_celebdf_missing_parts(celebdf):
    path = celebdf / "List_of_testing_videos.txt"
    path.write_text("1 Celeb-real/id0_0000.mp4\n" * 2)
    refused("celebdf", celebdf, r"line 2 lists 'Celeb-real/id0_0000\.mp4' again")
    path.write_bytes(b"1 Celeb-real/\xff.mp4\n")
    refused("celebdf", celebdf, "is not UTF-8 text")
    refused("celebdf", celebdf / "Celeb-real", "is not in Celeb-DF-v2's layout: no Celeb-real, no YouTube-real")
    (celebdf / "YouTube-real/y.mp4").symlink_to(celebdf / "YouTube-real/00170.mp4")
    path.write_text("")
    refused("celebdf", celebdf, r"y\.mp4: is listed twice, the first time as .*00170\.mp4")


# --- DFDC ---


@pytest.fixture
def dfdc(tmp_path):
    root = tmp_path / "dfdc"
    entries = {
        "train/dfdc_train_part_0": {
            "b.mp4": {"label": "FAKE", "split": "train", "original": "a.mp4"},
            "a.mp4": {"label": "REAL", "split": "train", "original": None},
        },
        "part_1": {
            "c.mp4": {"label": "REAL", "split": "validation"},
            "d.mp4": {"label": "FAKE", "split": "val", "original": "c.mp4"},
            "e.mp4": {"label": "FAKE", "split": "test"},
        },
    }
    for folder, content in entries.items():
        touch(root, f"{folder}/metadata.json", *(f"{folder}/{name}" for name in content))
        (root / folder / "metadata.json").write_text(json.dumps(content))
    touch(root, "test/labels.csv", "test/metadata.json")
    (root / "test/labels.csv").write_text("filename,label\nx.mp4,1\ny.mp4,0\n")
    return root


def test_dfdc(dfdc):
    expected = [
        ("part_1/c.mp4", 0, "val", "real", "c"),
        ("part_1/d.mp4", 1, "val", "DFDC", "c"),
        ("part_1/e.mp4", 1, "test", "DFDC", "e"),
        ("test/x.mp4", 1, "test", "DFDC", "x"),
        ("test/y.mp4", 0, "test", "real", "y"),
        ("train/dfdc_train_part_0/a.mp4", 0, "train", "real", "a"),
        ("train/dfdc_train_part_0/b.mp4", 1, "train", "DFDC", "a"),
    ]
    assert read_layout("dfdc", dfdc) == [Record(dfdc / name, *rest) for name, *rest in expected]


def test_dfdc_list_of_the_root_and_elsewhere(dfdc, tmp_path):
    (dfdc / "metadata.json").write_text('{"m.mp4": {"label": "REAL", "split": "test"}}')
    assert read_layout("dfdc", dfdc)[0] == Record(dfdc / "m.mp4", 0, "test", "real", "m")
    assert len(read_layout("dfdc", dfdc)) == 8
    (tmp_path / "mine.csv").write_text("filename,label,other\nb.mp4,FAKE,3\n")
    folder = dfdc / "train/dfdc_train_part_0"
    expected = [Record(folder / "b.mp4", 1, "test", "DFDC", "b")]
    assert read_layout("dfdc", folder, splits=tmp_path / "mine.csv") == expected
    (tmp_path / "mine.csv").rename(tmp_path / "labels.csv")
    assert read_layout("dfdc", folder, splits=tmp_path) == expected
    refused("dfdc", dfdc, "is not in DFDC's layout", splits=dfdc / "train")


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("a.mp4", None, "'a.mp4' must have the label REAL or FAKE and a split of train, .*, got None and None"),
        ("a.mp4", {"label": "real", "split": "train"}, "got 'real' and 'train'"),
        ("a.mp4", {"label": ["REAL"], "split": {}}, "got a list and an object"),
        ("a.mp4", {"label": "REAL", "split": "dev"}, "got 'REAL' and 'dev'"),
        ("a.mp4", {"label": "FAKE", "split": "train", "original": 3}, "the original of 'a.mp4' must be the name"),
        ("a.mp4", {"label": "FAKE", "split": "train", "original": "../x.mp4"}, "got '../x.mp4'"),
        ("../a.mp4", {"label": "REAL", "split": "train"}, "an entry must be the name of a video, got '../a.mp4'"),
        ("/a.mp4", {"label": "REAL", "split": "train"}, "got '/a.mp4'"),
        ("a\0.mp4", {"label": "REAL", "split": "train"}, r"got 'a\\x00.mp4'"),
        ("..", {"label": "REAL", "split": "train"}, "got '..'"),
    ],
)
def test_dfdc_wrong_entries(dfdc, name, entry, message):
    (dfdc / "part_1/metadata.json").write_text(json.dumps({name: entry}))
    error = refused("dfdc", dfdc, message)
    assert error.file == dfdc / "part_1/metadata.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,label\na.mp4,2\n", "line 2 must have the label 0 or 1, got '2'"),
        ("filename,label\na.mp4\n", "line 2 must have the label 0 or 1, got None"),
        ("filename,label\n../a.mp4,1\n", "an entry must be the name of a video"),
        ("name,label\na.mp4,1\n", "has no column filename"),
        ("filename,label\na.mp4,1\n./a.mp4,1\n", "an entry must be the name of a video"),
    ],
)
def test_dfdc_wrong_tables(dfdc, text, message):
    (dfdc / "test/labels.csv").write_text(text)
    assert refused("dfdc", dfdc, message).file == dfdc / "test/labels.csv"
    (dfdc / "test/labels.csv").write_text("filename,label\na.mp4,1\na.mp4,1\n")
    refused("dfdc", dfdc, r"test/a\.mp4: is listed twice")


# --- DeepfakeBench ---


def frame_list(prefix: str = "", *, separator: str = "/") -> dict:
    """Two videos of FaceForensics++ in one list."""

    def video(folder: str, label: str) -> dict:
        names = (f"{prefix}FF/{folder}/frames/{n:03d}.png" for n in (2, 0, 1))  # as a folder is scanned
        return {"label": label, "frames": [name.replace("/", separator) for name in names]}

    return {
        "FF": {
            "FF-real": {"train": {"c23": {"000": video("real/000", "FF-real")}}, "val": {"c23": {}}, "test": {}},
            "FF-DF": {"train": {"c23": {"000_003": video("df/000_003", "FF-DF")}, "c40": {}}},
        }
    }


@pytest.fixture
def bench(tmp_path):
    root = tmp_path / "bench"
    touch(root, *(f"FF/{folder}/frames/{n:03d}.png" for folder in ("real/000", "df/000_003") for n in range(3)))
    (root / "FF.json").write_text(json.dumps(frame_list()))
    return root


def expected_bench(root: Path) -> list[Record]:
    folders = [root / "FF/real/000/frames", root / "FF/df/000_003/frames"]
    frames = [tuple(folder / f"{n:03d}.png" for n in range(3)) for folder in folders]
    return [
        Record(folders[0], 0, "train", "real", "000", frames=frames[0]),
        Record(folders[1], 1, "train", "FF-DF", "000", frames=frames[1]),
    ]


@pytest.mark.parametrize("separator", ["/", "\\"])
@pytest.mark.parametrize("prefix", ["", "./", "/", "D:/data/rgb/", "/home/author/data/sets/rgb/", "datasets/"])
def test_deepfakebench_paths_of_the_author_are_found(bench, prefix, separator):
    (bench / "FF.json").write_text(json.dumps(frame_list(prefix, separator=separator)))
    assert read_layout("deepfakebench", bench) == expected_bench(bench)


def test_deepfakebench_leaves_out_no_more_than_it_must(bench):
    touch(bench, "real/000/frames/000.png", "frames/000.png")
    assert read_layout("deepfakebench", bench) == expected_bench(bench)


def test_deepfakebench_missing_videos_are_records(bench):
    content = frame_list("/author/")
    (bench / "FF.json").write_text(json.dumps(content))
    (bench / "FF/real/000/frames").rename(bench / "elsewhere")
    touch(bench, "frames/000.png")  # the missing one's path ends so, too
    assert read_layout("deepfakebench", bench) == expected_bench(bench)
    content["FF"]["FF-DF"]["train"]["c23"] |= {name: {"label": "FF-DF", "frames": []} for name in ("../../x", "..")}
    (bench / "FF.json").write_text(json.dumps(content))
    missing = read_layout("deepfakebench", bench)[2:]
    assert [(r.frames, r.path) for r in missing] == [((), bench / "FF/FF-DF/.._.._x"), ((), bench / "FF/FF-DF/_")]


def test_deepfakebench_frames_are_in_the_order_of_their_numbers(bench):
    """Without leading zeros the order of the names is another."""
    content = frame_list()
    names = [f"FF/df/000_003/frames/frame_{n}.png" for n in (10, 9, 100, 8)]
    content["FF"]["FF-DF"]["train"]["c23"]["000_003"]["frames"] = names
    (bench / "FF.json").write_text(json.dumps(content))
    frames = read_layout("deepfakebench", bench)[1].frames
    assert [frame.name for frame in frames] == [f"frame_{n}.png" for n in (8, 9, 10, 100)]


def test_deepfakebench_a_folder_that_is_left_out_of_others_is_no_root(bench):
    content = frame_list("author/")
    content["FF"]["FF-DF"]["train"]["c23"]["x"] = {"label": "FF-DF", "frames": ["author/0.png"]}
    (bench / "FF.json").write_text(json.dumps(content))
    assert read_layout("deepfakebench", bench)[-1].path == bench / "author"


def test_deepfakebench_compression(bench):
    refused("deepfakebench", bench, r"FF\.json: 'FF/FF-real/train' has no 'c40', only c23", compression="c40")
    content = frame_list()
    content["FF"]["FF-real"]["train"] = content["FF"]["FF-real"]["train"]["c23"]
    content["FF"]["FF-DF"]["train"] = content["FF"]["FF-DF"]["train"]["c23"]
    (bench / "FF.json").write_text(json.dumps(content))
    assert read_layout("deepfakebench", bench, compression="c40") == expected_bench(bench)


def test_deepfakebench_a_video_of_several_splits_is_tested_or_else_trained_on(bench):
    content = frame_list()
    real, fake = (content["FF"][kind] for kind in ("FF-real", "FF-DF"))
    real["test"] = real["val"] = {"c23": real["train"]["c23"]}
    fake["val"] = fake["train"]
    (bench / "FF.json").write_text(json.dumps(content))
    assert [(r.method, r.split) for r in read_layout("deepfakebench", bench)] == [("real", "test"), ("FF-DF", "train")]
    (bench / "FF.json").write_text(json.dumps(frame_list()))
    (bench / "FF-DF.json").write_text(json.dumps(content).replace('{"FF":', '{"FF-DF":'))  # lists share real videos
    assert {(r.method, r.split) for r in read_layout("deepfakebench", bench)} == {("real", "test"), ("FF-DF", "train")}


def test_deepfakebench_stray_entry_of_dfdc(bench):
    content = frame_list()
    videos = content["FF"]["FF-DF"]["train"]["c23"]
    content["FF"]["FF-DF"]["val"] = dict(videos["000_003"])
    (bench / "FF.json").write_text(json.dumps(content))
    assert read_layout("deepfakebench", bench) == expected_bench(bench)


def test_deepfakebench_lists_may_stand_elsewhere(bench, tmp_path):
    (tmp_path / "lists").mkdir()
    (bench / "FF.json").rename(tmp_path / "lists/FF.json")
    refused("deepfakebench", bench, "is not in DeepfakeBench's layout: no JSON file that lists frames")
    assert read_layout("deepfakebench", bench, splits=tmp_path / "lists") == expected_bench(bench)
    assert read_layout("deepfakebench", bench, splits=tmp_path / "lists/FF.json") == expected_bench(bench)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (["FF/../../../etc/0.png"], "leads out of its folder"),
        (["FF\\..\\..\\etc\\0.png"], "leads out of its folder"),
        (["FF/a/.."], "leads out of its folder"),
        (["FF/a/"], "leads out of its folder or nowhere"),
        (["FF/a/0\0.png"], "leads out of its folder or nowhere"),
        (["FF/\ud800/0.png"], "leads out of its folder or nowhere"),
        ([f"FF/{'a' * 300}/0.png"], "leads out of its folder or nowhere"),
        (["a/" * 2000 + "0.png"], "leads out of its folder or nowhere"),
        (["0.png"], "has frames without a folder"),
        (["/0.png"], "has frames without a folder"),
        (["FF/a/0.png", "FF/b/1.png"], "has frames in 2 folders"),
        (["FF/a/0.png", "FF/a/0.png"], "has a frame twice"),
        (["FF/a/0.png", 3], "must have a list of frames"),
        ("FF/a/0.png", "must have a list of frames, got 'FF/a/0.png'"),
        (None, "must have a list of frames, got None"),
        ({"FF": 1}, "must have a list of frames, got an object"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_deepfakebench_wrong_frames(bench, frames, message):
    content = frame_list()
    content["FF"]["FF-DF"]["train"]["c23"]["000_003"]["frames"] = frames
    (bench / "FF.json").write_text(json.dumps(content))
    error = refused("deepfakebench", bench, f"FF.json: 'FF/FF-DF/train/000_003' .*{message}")
    assert error.file == bench / "FF.json"


def test_deepfakebench_contradictions(bench):
    def with_label(kind: str, label: object) -> None:
        content = frame_list()
        content["FF"][kind]["train"]["c23"]["000_003"] = frame_list()["FF"]["FF-DF"]["train"]["c23"]["000_003"]
        content["FF"][kind]["train"]["c23"]["000_003"]["label"] = label
        (bench / "FF.json").write_text(json.dumps(content))

    with_label("FF-DF", "FF-Real")
    refused("deepfakebench", bench, "is in a class of label 1, its own label is 'FF-Real'")
    with_label("FF-real", "FF-DF")
    refused("deepfakebench", bench, "is in a class of label 0, its own label is 'FF-DF'")
    with_label("FF-DF", None)
    refused("deepfakebench", bench, "must have a label, got None")
    with_label("FF-real", "FF-real")
    refused("deepfakebench", bench, "lists 'FF/df/000_003/frames' in two ways")


def test_deepfakebench_wrong_shape(bench):
    for text, message in (
        ("[]", "content must be a JSON object, got a list"),
        ('{"A": 1}', "'A' must be a JSON object, got 1"),
        ('{"A": {"B": null}}', "'A/B' must be a JSON object, got None"),
        ('{"A": {"B": {"dev": {}}}}', "'A/B/dev' must be one of train, val, test"),
        ('{"A": {"B": {"val": []}}}', "'A/B/val' must be a JSON object, got a list"),
        ('{"A": {"B": {"val": {"c23": 3}}}}', "'A/B/val/c23' must be a JSON object, got 3"),
        ('{"A": {"B": {"val": {"x": "y"}}}}', "'A/B/val/x' must be a JSON object, got 'y'"),
        ('{"A": {"B": {"val": {"a\\u0000": {"label": "x", "frames": []}}}}}', "has no name that a file could have"),
        ('{"A": {}}', "lists no video"),
    ):
        (bench / "FF.json").write_text(text)
        refused("deepfakebench", bench, message)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["000.png", "001.png", "002.png"], ""),
        (["frame_9.jpg", "frame_10.jpg"], ""),
        (["7.png"], ""),
        (["0.png", "9.png", "18.png", "28.png"], f"frames are 9 apart (median), {NEEDS}"),
        (["0.png", "2.png", "5.png"], f"frames are 2.5 apart (median), {NEEDS}"),
        (["0.png", "1.png", "2.png", "5.png"], f"frames between 2 and 5 are missing, {NEEDS}"),
        (["2.png", "1.png", "0.png"], "frames are not in the order of their numbers"),
        (["0.png", "00.png"], "frames are not in the order of their numbers"),
        (["0.png", "a.png"], f"frames have no numbers, {NEEDS}"),
        (["a/12/x.png"], f"frames have no numbers, {NEEDS}"),
        ([], "has no frames"),
    ],
)  # fmt: skip
def test_frame_gaps(names, reason):
    assert frame_gap_reason([Path(name) for name in names]) == reason


# --- CSV ---


def test_csv(tmp_path):
    (tmp_path / "mine.csv").write_bytes(
        b"\xef\xbb\xbfpath,label,split,method,identity\r\nv/a.mp4,1,test,Swap,anna\r\nv/b.mp4,0,,,\r\n/x/c.mp4,1,val,,\r\n"
    )
    assert read_layout("csv", tmp_path / "mine.csv") == [
        Record(tmp_path / "v/a.mp4", 1, "test", "Swap", "anna"),
        Record(tmp_path / "v/b.mp4", 0, "train", "real", "v/b.mp4"),
        Record(Path("/x/c.mp4"), 1, "val", "fake", "/x/c.mp4"),
    ]
    (tmp_path / "videos.csv").write_text("path,label\na.mp4,1\n")
    expected = [Record(tmp_path / "a.mp4", 1, "train", "fake", "a.mp4")]
    assert read_layout("csv", tmp_path) == expected
    assert len(read_layout("csv", tmp_path, splits=tmp_path / "mine.csv")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.mp4,1\nb.mp4,2\n", "line 3 must hold a path, a label 0 or 1 .* got 'b.mp4', '2' and 'train'"),
        ("path,label\n,1\n", "line 2 must hold a path"),
        ("path,label\na\0,1\n", "line 2 must hold a path"),
        ("path,label\na\n", "line 2 must hold a path, .* got 'a', None and 'train'"),
        ("path,label,split\na,1,dev\n", "a split of train, val, test, got 'a', '1' and 'dev'"),
        ("path,label\na,1\nb,0\n./a,0\n", "line 4 contradicts an earlier label of './a'"),
        ("path,label,method\na,1,real\n", "line 2 has the label 1 and the method 'real'"),
        ("path,label,method\na,0,Swap\n", "line 2 has the label 0 and the method 'Swap'"),
        ("path,label\na,1\n./a,1\n", "is listed twice"),
        ("path\na\n", "has no column label"),
        ("path,label\n", "lists no video"),
        ("", "has no column path and no column label"),
    ],
)
def test_csv_wrong_rows(tmp_path, text, message):
    (tmp_path / "videos.csv").write_text(text)
    refused("csv", tmp_path, message)


def test_csv_without_a_table(tmp_path):
    refused("csv", tmp_path, r"videos\.csv: cannot be read: No such file")
    (tmp_path / "videos.csv").write_bytes(b"path,label\n\xff,1\n")
    refused("csv", tmp_path, "is not UTF-8 text")


# --- every layout ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roots_that_are_none(tmp_path, layout, monkeypatch):
    touch(tmp_path, "file")
    refused(layout, tmp_path / "nowhere", "nowhere: no such f")
    refused(layout, tmp_path / ("a" * 300), "no such f")
    refused(layout, f"{tmp_path}/a\0b", "no such f")
    refused(layout, tmp_path / "file", "has no column" if layout == "csv" else "is not a folder")
    refused(layout, tmp_path, "layout|cannot be read")  # of csv, the table
    refused(layout, tmp_path, "nowhere: no such f", splits=tmp_path / "nowhere")

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(layout, tmp_path, "cannot be read: Permission denied")


def test_rejects_an_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match=r"layout must be one of ffpp, celebdf, .*, got 'kodf'"):
        read_layout("kodf", tmp_path)


STRANGE = [
    None,
    True,
    3,
    -1.5,
    "",
    "x",
    "../../x",
    "/x",
    "a\0b",
    "\ud800",
    "a" * 300,
    "line\nline",
    [],
    {},
    [[]],
    ["x"],
]
STRANGE += [{"x": {"y": {"z": {}}}}, {"../x": {"label": "REAL", "split": "train"}}, json.loads("[" * 500 + "]" * 500)]


def changed(content: object) -> list[object]:
    """The content with each of its parts, one at a time, replaced by each of STRANGE, renamed or left out."""
    out = list(STRANGE)
    if isinstance(content, dict):
        for key in content:
            rest = {k: v for k, v in content.items() if k != key}
            out += [rest, *({**rest, str(name): content[key]} for name in STRANGE)]
            out += [{**content, key: value} for value in changed(content[key])]
    elif isinstance(content, list):
        for i in range(min(2, len(content))):
            out += [
                content[:i] + content[i + 1 :],
                *([*content[:i], v, *content[i + 1 :]] for v in changed(content[i])),
            ]
    return out


def attempt(layout: str, root: Path, **options) -> bool:
    """Whether the dataset is refused, in one line; what it gives otherwise lies in its folder."""
    try:
        records = read_layout(layout, root, **options)
    except SDRError as error:
        return len(str(error).splitlines()) == 1 or pytest.fail(f"more than one line: {error}")
    for record in records:
        for path in (record.path, *record.frames):
            path.exists()
            assert path.is_relative_to(root)
            assert ".." not in path.parts
    return False


@pytest.mark.parametrize(
    ("name", "list_of"),
    [("ffpp", "splits/val.json"), ("dfdc", "part_1/metadata.json"), ("bench", "FF.json")],
)
def test_any_change_of_a_json_list_is_refused_or_harmless(request, name, list_of):
    root = request.getfixturevalue(name)
    layout, options = ("deepfakebench" if name == "bench" else name), ({"methods": ["A"]} if name == "ffpp" else {})
    path = root / list_of
    assert not attempt(layout, root, **options)
    contents = changed(json.loads(path.read_text()))
    refused_ones = 0
    for content in contents:
        path.write_text(json.dumps(content))
        refused_ones += attempt(layout, root, **options)
    assert len(contents) > 60
    assert 0.5 * len(contents) < refused_ones < len(contents)


@pytest.mark.parametrize(
    ("name", "list_of"),
    [
        ("ffpp", "splits/val.json"), ("celebdf", "List_of_testing_videos.txt"), ("dfdc", "part_1/metadata.json"),
        ("dfdc", "test/labels.csv"), ("bench", "FF.json"),
    ],
)  # fmt: skip
def test_any_damaged_byte_of_a_list_is_refused_or_harmless(request, name, list_of):
    root = request.getfixturevalue(name)
    layout, options = ("deepfakebench" if name == "bench" else name), ({"methods": ["A"]} if name == "ffpp" else {})
    path = root / list_of
    data = path.read_bytes()
    refused_ones = 0
    for i in range(0, len(data), max(1, len(data) // 60)):
        for content in (
            data[:i],
            data[:i] + b"\xff" + data[i + 1 :],
            data[:i] + b"\0/" + data[i:],
            data[:i] + b'",' + data[i:],
        ):
            path.write_bytes(content)
            refused_ones += attempt(layout, root, **options)
    assert refused_ones > 20


def test_a_pipe_in_place_of_a_list_is_refused(request):
    for name, list_of in (
        ("ffpp", "splits/val.json"),
        ("celebdf", "List_of_testing_videos.txt"),
        ("dfdc", "part_1/metadata.json"),
    ):
        root = request.getfixturevalue(name)
        (root / list_of).unlink()
        os.mkfifo(root / list_of)
        refused(name, root, "is not a regular file", **({"methods": ["A"]} if name == "ffpp" else {}))
