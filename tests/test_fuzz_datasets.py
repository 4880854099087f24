"""A hostile clip cache, or list of videos, is refused in a line or gives sound data; nothing outside of it is touched.

It is read in a process of its own, whose memory is limited and which notes every file that is opened.
"""

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import draws
import numpy as np
import pytest
from clip_caches import T, make_cache
from hostile_checkpoints import ODD, WATCHED, damage, pick

from sdr.cache_check import check_cache
from sdr.clip_cache import COLUMNS, MANIFEST, SETTINGS, ClipCache, arrow_types, npy_header, read_manifest, read_shard
from sdr.datasets import read_labels
from sdr.errors import SDRError
from sdr.layouts import read_layout

pytestmark = [pytest.mark.promise(row="no substitution"), pytest.mark.promise(row="fuzz")]

SIZE = 4  # of the clips' pictures
SECONDS, MEMORY = 10, 512 << 20
NAMES = (
    "../x",
    "/etc/passwd",
    "shards/../../x",
    "shards/",
    "",
    "a\nb",
    "\x1b[2J",
    "x" * 5000,
    "shards/train/000.tar",
    "é",
)
LISTS = {
    "ffpp": {"splits/train.json": [["000", "001"]], "splits/val.json": [["002", "003"]], "splits/test.json": []},
    "dfdc": {"part/metadata.json": {"a.mp4": {"label": "FAKE", "split": "train", "original": "b.mp4"}}},
    "deepfakebench": {
        "FF.json": {"F": {"real": {"test": {"000": {"label": "real", "frames": ["f/0/0.png", "f/0/1.png"]}}}}}
    },
    "celebdf": {"List_of_testing_videos.txt": "1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n"},
    "csv": {"videos.csv": "path,label,split,method,identity\na.mp4,0,train,real,a\nb.mp4,1,test,fake,b\n"},
}


def mutate_cache(rng: np.random.Generator, folder: Path, outside: Path) -> None:
    """Change one file of a sound cache."""
    shard = pick(rng, sorted(folder.rglob("*.tar")))
    path = pick(rng, (folder / SETTINGS, folder / MANIFEST, shard))
    kind = rng.integers(4)
    if kind == 0:
        path.write_bytes(damage(rng, path.read_bytes()))
    elif kind == 1:
        replace_by_other(rng, path, outside)
    elif path.name == SETTINGS:
        settings = json.loads(path.read_text())
        settings[pick(rng, ("num_frames", "size", "layout", "synthetic", "more"))] = pick(rng, (*ODD, 10**12, 2**30))
        path.write_text(
            pick(rng, (json.dumps(settings), json.dumps(settings), json.dumps(pick(rng, ODD)), "[" * 99_999))
        )
    elif path.name == MANIFEST:
        mutate_manifest(rng, path)
    else:
        mutate_shard(rng, path)


def replace_by_other(rng: np.random.Generator, path: Path, outside: Path) -> None:
    """Something that is no regular file of the cache in the place of one."""
    if path.suffix == ".tar":
        shutil.copyfile(path, outside)  # sound, but not in there
    path.unlink()
    kind = rng.integers(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind in (2, 3) and path.suffix == ".tar":
        path.symlink_to(pick(rng, (outside, Path(os.path.relpath(outside, path.parent)))))
    elif kind == 4:
        path.symlink_to(pick(rng, ("/dev/zero", "/dev/null", "/etc/passwd", "nowhere", path.name)))
    elif kind == 5:
        path.write_bytes(b"")


def mutate_manifest(rng: np.random.Generator, path: Path) -> None:
    """A sound Parquet file of other content."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(path)
    name, kind = pick(rng, list(COLUMNS)), rng.integers(8)
    options = {"compression": pick(rng, ("snappy", "snappy", "zstd", "gzip", "none"))}
    if kind == 0:
        table = table.drop_columns([name])
    elif kind in (1, 2):
        values, place = table[name].to_pylist(), int(rng.integers(len(table)))
        numbers = (0, -1, 7, 127, 2**31 - 1, 2**62, None)
        odd = {"string": NAMES, "int8": numbers[:4], "int32": numbers[:5], "int64": numbers}.get(
            COLUMNS[name], ([], None)
        )
        values[place] = pick(rng, odd)
        table = table.set_column(table.column_names.index(name), name, pyarrow.array(values, arrow_types()[name]))
    elif kind == 3:
        wrong = pick(rng, ([1.5], [True], [b"x"], [{"a": 1}], [["x"]], [2**40], [None]))
        table = table.set_column(table.column_names.index(name), name, pyarrow.array(wrong * len(table)))
    elif kind == 4:  # one text of a megabyte in every row
        rows = int(rng.integers(1, 60_000))
        table = pyarrow.concat_tables([table.slice(0, 1)] * 1).to_pydict()
        table = {
            n: v * rows if n != "video" else ["v" * (1 << 20)] * rows
            for n, v in table.items()
            if n not in ("frames", "transform")
        }
        words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["v" * (1 << 20)])
        table = pyarrow.table(
            {**{n: v for n, v in table.items() if n != "video"}, "video": words, "frames": [[0]] * rows}
        )
    elif kind == 5:  # very many rows, of almost no bytes
        table = pyarrow.concat_tables([table] * int(rng.integers(1, 40_000))).combine_chunks()
    elif kind == 6:  # rows of long lists, all alike
        table = long_lists(table, int(rng.integers(1, 5000)), int(rng.integers(1, 4097)))
    else:
        table = table.slice(0, int(rng.integers(len(table))))
    parquet.write_table(table, path, **options)


def long_lists(table, rows: int, length: int):
    """The first row of a manifest, ``rows`` times, with ``length`` equal frames in each."""
    import pyarrow

    many = pyarrow.concat_tables([table.slice(0, 1)] * rows).combine_chunks()
    offsets = np.arange(rows + 1, dtype=np.int32) * length
    frames = pyarrow.ListArray.from_arrays(offsets, np.zeros(rows * length, np.int32))
    return many.set_column(many.column_names.index("frames"), "frames", frames)


def mutate_shard(rng: np.random.Generator, path: Path) -> None:
    """A sound tar of other content."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    (clip, pixels), (row, text) = members[:2]
    kind = rng.integers(8)
    if kind == 0:
        content = json.loads(text) | {pick(rng, (*COLUMNS, "more")): pick(rng, (*ODD[:12], *NAMES))}
        text = json.dumps(content).encode()
    elif kind == 1:
        text = pick(rng, (b"", b"[" * 99_999, b"null", b"[1]", b"\xff", b'{"a":' * 9999, b"9" * 9999))
    elif kind == 2:
        pixels = pick(
            rng, (pixels[:-1], pixels + b"x", b"", bytes(len(pixels)), npy_header((T, 9, 9, 3)) + bytes(T * 243))
        )
    elif kind == 3:
        clip.name = pick(rng, NAMES)
    elif kind == 4:
        clip.type = pick(
            rng, (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"S")
        )
        clip.linkname, pixels = "/etc/passwd", b""
    elif kind == 5:
        members.append(members[0])
    data = io.BytesIO()
    plain = tarfile.GNU_FORMAT if kind == 3 else tarfile.USTAR_FORMAT  # which has no room for long names
    with tarfile.open(fileobj=data, mode="w", format=pick(rng, (plain, tarfile.PAX_FORMAT))) as tar:
        for member, content in [(clip, pixels), (row, text), *members[2:]]:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    out = bytearray(data.getvalue())
    if kind >= 6:  # a header that says how long it goes on
        head = tarfile.TarInfo("x")
        head.type = pick(
            rng, (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE, tarfile.REGTYPE)
        )
        head.size = pick(rng, (2**33, 2**40, 2**60, 10**6, 3))
        out[:0] = head.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(out)


def read_cache(folder: Path, sound: set[str]) -> str:
    """How reading a whole cache ends; every clip of one that its check finds sound must be one that was written."""
    said: list[str] = []
    try:
        said += check_cache(folder).problems
    except SDRError as error:
        said.append(str(error))
    try:
        cache = ClipCache(folder)
        digests = {hashlib.sha256(cache.read(index)).hexdigest() for index in range(min(len(cache), 20))}
        assert said or digests <= sound, "clips that were never written"
    except SDRError as error:
        said.append(str(error))
    for line in said:
        assert str(folder) in line, line
        assert line.isprintable(), line
        assert "allocate" not in line, line
    return "refused" if said else "sound"


def write_lists(layout: str, folder: Path) -> None:
    for name in (
        "original_sequences/youtube/c23/videos",
        "manipulated_sequences/Deepfakes/c23/videos",
        "Celeb-real",
        "f/0",
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in LISTS[layout].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def mutate_list(rng: np.random.Generator, layout: str, folder: Path) -> None:
    """Change one list of a dataset: its bytes, or one word of its text."""
    path = folder / pick(rng, sorted(LISTS[layout]))
    text, kind = path.read_text(), rng.integers(4)
    if kind == 0:
        path.write_bytes(damage(rng, text.encode()))
    elif kind == 1:
        path.write_bytes(
            pick(rng, (b"[" * 99_999, b'{"a":' * 99_999, b"\xff", b"", b"null", b"9" * 9999, b'"' * 9999, b"a,a\n"))
        )
    elif kind == 2:
        path.unlink()
        pick(rng, (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)))(path)
    else:
        word = pick(rng, re.findall(r"[\w.]+", text) or [text])
        new = pick(rng, ("..", "../../x", "/etc/passwd", "\\u0000", "\\ud800", "x" * 400, "", "a/b", "3", ".", "a\\nb"))
        path.write_text(text.replace(word, new, int(rng.integers(1, 3))))


def read_list(layout: str, folder: Path) -> str:
    """How reading a dataset's lists ends; what they give lies in its folder, but for a CSV that the user made."""
    try:
        records = read_layout(layout, folder)
        if layout == "csv":
            read_labels(folder / "videos.csv")
    except SDRError as error:
        said = str(error)
        assert str(folder) in said, said
        assert said.isprintable(), said
        return "refused"
    for record in records:
        for path in (record.path, *record.frames):
            assert layout == "csv" or (path.is_relative_to(folder) and ".." not in path.parts), path
    return "sound"


def read_cases(kind: str, folder: Path, count: int) -> None:
    """What the child process does: read, and end with a line that counts how it went; stop at the first fault."""
    opened: list[str] = []
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    original, outside, home = folder / "original", folder / "outside.tar", folder / "home"
    make_cache(original, real=2, fake=2, clips=2, size=SIZE)
    cache = ClipCache(original)
    sound = {hashlib.sha256(cache.read(index)).hexdigest() for index in range(len(cache))}
    check_cache(original)
    for layout in LISTS:
        write_lists(layout, folder / layout)
        read_list(layout, folder / layout)
    for codec in ("cp437", "unicode_escape", "unicode_escape"):
        "".encode(codec)
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in WATCHED else None)
    limit = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + MEMORY
    ends: Counter[str] = Counter()
    slowest = 0.0
    for number in draws.numbers(count):
        rng = draws.draw(f"dataset {kind}", number)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        layout = pick(rng, sorted(LISTS))
        outside.write_bytes(b"outside")
        if kind == "cache":
            shutil.copytree(original, home)
            mutate_cache(rng, home, outside)
        else:
            write_lists(layout, home)
            mutate_list(rng, layout, home)
        before = sorted(home.rglob("*"))
        print(number, flush=True)
        opened.clear()
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        began = time.monotonic()
        ends[read_cache(home, sound) if kind == "cache" else read_list(layout, home)] += 1
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - began)
        foreign = [path for path in opened if not os.path.realpath(path).startswith(str(home))]
        foreign = [path for path in foreign if not path.startswith((sys.base_prefix, sys.prefix))]
        assert not foreign, foreign
        assert sorted(home.rglob("*")) == before
        shutil.rmtree(home)
    print(f"ends {ends['sound']} {ends['refused']} {slowest:.3f}", flush=True)


@pytest.mark.parametrize("kind", ["cache", "lists"])
def test_mutated_datasets_are_sound_or_refused(tmp_path, kind, record_property):
    command = [sys.executable, __file__, kind, str(tmp_path), str(draws.CHECKPOINTS // 4)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # another sets addresses aside that the limit counts
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    *cases, last = done.stdout.splitlines() or [""]
    number = (cases[-1] if last.startswith("ends") else last) or "0"
    again = draws.replay(f"{Path(__file__).name} -k '{kind}'", int(number))
    assert last.startswith("ends"), f"{number}: {done.stderr[-3000:]}\nexit code {done.returncode}\n{again}"
    _, sound, refused, slowest = last.split()
    record_property(f"mutated datasets, {kind}", len(cases))
    record_property(f"of them sound, {kind}", int(sound))
    record_property(f"slowest dataset, {kind}, s", float(slowest))
    assert int(sound) + int(refused) == len(cases)


def test_a_shard_outside_of_the_cache_is_not_read(tmp_path):
    """Not even where it is what the manifest says."""
    cache = make_cache(tmp_path / "cache", real=1, fake=1, size=SIZE)
    shard = cache / "shards/train/000.tar"
    shard.rename(tmp_path / "elsewhere.tar")
    shard.symlink_to(tmp_path / "elsewhere.tar")
    data = ClipCache(cache)
    with pytest.raises(SDRError, match=r"000\.tar: lies outside of the cache \(a cache may be a link as a whole"):
        data.read(0)
    assert "lies outside of the cache" in check_cache(cache).problems[0]
    shard.unlink()
    os.mkfifo(shard)  # to open it would wait for a writer
    with pytest.raises(SDRError, match=r"000\.tar: is not a regular file"):
        data.read(0)
    with pytest.raises(SDRError, match=r"000\.tar: is not a regular file"):
        read_shard(shard, data.shape)


def refuse_shard(path: Path, line: str, *, most: int) -> None:
    """The shard is refused with this line, by less than ``most`` bytes of Python's memory."""
    tracemalloc.start()
    try:
        with pytest.raises(SDRError, match=re.escape(line)):
            read_shard(path, (T, SIZE, SIZE, 3))
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_a_tar_that_asks_for_all_memory_is_refused(tmp_path):
    head = tarfile.TarInfo("x")
    head.type, head.size = tarfile.XHDTYPE, 2**40
    (tmp_path / "x.tar").write_bytes(head.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    refuse_shard(tmp_path / "x.tar", "is no shard of clips: ", most=4 << 20)


def test_a_tar_of_very_many_empty_files_is_refused_at_the_first(tmp_path):
    (tmp_path / "x.tar").write_bytes(tarfile.TarInfo("x").tobuf() * 5000 + bytes(1024))
    refuse_shard(tmp_path / "x.tar", "is no shard of clips: x is no clip", most=1 << 20)


def test_a_manifest_that_would_fill_the_memory_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    cache = make_cache(tmp_path / "cache", real=1, fake=1, size=SIZE)
    table = parquet.read_table(cache / MANIFEST)
    parquet.write_table(pyarrow.concat_tables([table.slice(0, 1)] * 500_000).combine_chunks(), cache / MANIFEST)
    with pytest.raises(SDRError, match=r"is damaged: 500000 rows do not fit into \d+ bytes"):
        read_manifest(cache)
    parquet.write_table(long_lists(table, 5000, 1000), cache / MANIFEST, row_group_size=1000)
    with pytest.raises(SDRError, match=r"is damaged: it says that it has more values than fit into \d+ bytes"):
        read_manifest(cache)
    parquet.write_table(long_lists(table, 4000, 1000), cache / MANIFEST)
    assert len(read_manifest(cache, ["frames"])["frames"]) == 4000
    parquet.write_table(table, cache / MANIFEST, compression="zstd")
    with pytest.raises(SDRError, match="is compressed by ZSTD"):
        read_manifest(cache)
    parquet.write_table(table.set_column(0, "video", pyarrow.array([1, 2])), cache / MANIFEST)
    with pytest.raises(SDRError, match="its column video is of the type int64"):
        read_manifest(cache)


if __name__ == "__main__":
    read_cases(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
