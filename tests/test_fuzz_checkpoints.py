"""No checkpoint runs code, takes more memory or time than its size asks for, or passes with a flipped bit.

Hostile files are read in a process of their own, whose memory is limited and which notes every file that is opened.
"""

import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import draws
import pytest
import torch
from hostile_checkpoints import (
    DOUBLED,
    WATCHED,
    describe,
    encode,
    mutate_torch_file,
    mutate_weights,
    safetensors,
    saved,
)

import sdr.checkpoint
from sdr import FTCN, SDRError, SDRModel, ftcn_released, tiny
from sdr.checkpoint import WeightsInfo, load_model, read_ftcn_checkpoint, read_weights, save_weights, write_tensors
from sdr.checkpoints import FORMAT, Checkpoints
from sdr.torch_file import open_torch_file

pytestmark = pytest.mark.promise(row="no code from files")

SMALL = {"num_frames": 4, "image_size": 16, "width": 2, "embed_dim": 4, "num_heads": 1, "head_dim": 4, "mlp_dim": 4}
READERS = {"safetensors": ("weights", "run", "folder"), "torch.save": ("zip", "legacy")}
SECONDS, MEMORY = 10, 384 << 20  # of one file, beyond what the imports take


def small_ftcn() -> FTCN:
    """FTCN in the published checkpoint's structure, as narrow as can be."""
    return FTCN(replace(ftcn_released().branch(), blocks=(1, 1, 1), **SMALL)).eval()


def originals(kind: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a sound checkpoint."""
    if kind in ("zip", "legacy"):
        return small_ftcn().state_dict(), {}
    path = folder / "sound.safetensors"
    if kind == "run":
        write_tensors(
            path, {"now.a": torch.ones(3)}, {"format": FORMAT, "values": '{"step": 1, "loader": {"epoch": 0}}'}
        )
    else:
        config = replace(tiny(), blocks=(1, 1), num_branches=2, **SMALL)
        save_weights(path, SDRModel(config), WeightsInfo(origin="a test", metrics={"video AUC": 0.5}))
    tensors, metadata = read_weights(path, FORMAT if kind == "run" else sdr.checkpoint.FORMAT)
    tensors, metadata = {n: t.clone() for n, t in tensors.items()}, {n: v for n, v in metadata.items() if n != "sha256"}
    path.unlink()
    return tensors, metadata


def write_case(kind: str, number: int | None, place: Path, sound: tuple) -> None:
    """One file; None is the sound one."""
    rng = draws.draw(f"checkpoint {kind}", number or 0)
    if kind in ("zip", "legacy"):
        legacy = kind == "legacy"
        data = saved(sound[0], legacy=legacy) if number is None else mutate_torch_file(rng, sound[0], legacy=legacy)
    else:
        data = safetensors(*sound) if number is None else mutate_weights(rng, *sound)
    place.write_bytes(data)


def read_case(kind: str, place: Path) -> None:
    if kind in ("zip", "legacy"):
        read_ftcn_checkpoint(place)
    elif kind == "weights":
        load_model(place)
    elif kind == "folder":
        SDRModel.from_pretrained(place.parent)
    else:
        Checkpoints(place.parent, 2).load()


def read_cases(kinds: tuple[str, ...], folder: Path, count: int) -> None:
    """What the child process does: read, and end with a line that counts how it went; stop at the first fault."""
    torch.set_num_threads(1)
    sdr.checkpoint.ftcn_released = lambda: replace(ftcn_released(), blocks=(1, 1, 1), **SMALL)
    logging.getLogger("sdr").addHandler(logging.NullHandler())
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(f"{event} {args[0]!r}") if event in WATCHED else None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    os.chdir(folder)
    for codec in ("cp437", "unicode_escape", "raw_unicode_escape"):  # which Python opens when it needs them
        "".encode(codec)
    ends: Counter[str] = Counter()
    slowest = 0.0
    for kind in kinds:
        home = folder / kind
        home.mkdir()
        place = home / ("step_000000001.safetensors" if kind == "run" else "model.safetensors")
        sound = originals(kind, home)
        write_case(kind, None, place, sound)
        read_case(kind, place)
        limit = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 + MEMORY
        for number in draws.numbers(-(-count // len(kinds))):
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            write_case(kind, number, place, sound)
            before = place.read_bytes()
            print(f"{kind} {number}", flush=True)
            opened.clear()
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            signal.alarm(SECONDS)
            began = time.monotonic()
            try:
                read_case(kind, place)
                ends["loaded"] += 1
            except SDRError as error:
                ends["refused"] += 1
                said = str(error)
                assert str(place if kind != "run" else home) in said, said
                assert said.isprintable(), said
                assert len(said) < 20_000, said[:500]
                assert "allocate" not in said, said
            signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
            foreign = [event for event in opened if str(place) not in event]
            assert not foreign, foreign
            assert place.read_bytes() == before
            assert os.listdir(home) == [place.name]
            assert sorted(os.listdir(folder)) == sorted({*kinds[: kinds.index(kind) + 1]})
    print(f"ends {ends['loaded']} {ends['refused']} {slowest:.3f}", flush=True)


@pytest.mark.promise(row="fuzz")
@pytest.mark.parametrize("format", READERS)
def test_mutated_checkpoints_load_or_are_one_line(tmp_path, format, record_property):
    count = draws.CHECKPOINTS // len(READERS)
    command = [sys.executable, __file__, format, str(tmp_path), str(count)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    *cases, last = done.stdout.splitlines() or [""]
    kind, number = (cases[-1] if last.startswith("ends") else last).split() or ("none", "0")
    again = draws.replay(f"{Path(__file__).name} -k '{format}'", int(number))
    assert last.startswith("ends"), f"{kind} {number}: {done.stderr[-3000:]}\nexit code {done.returncode}\n{again}"
    _, loaded, refused, slowest = last.split()
    record_property(f"mutated {format} checkpoints", len(cases))
    record_property(f"of them loaded, {format}", int(loaded))
    record_property(f"slowest {format} checkpoint, s", float(slowest))
    assert int(loaded) + int(refused) == len(cases)


def test_every_flipped_bit_of_our_weights_is_found(tmp_path, record_property):
    """In the lengths, the header, its padding and the tensors of a whole file."""
    path = tmp_path / "x.safetensors"
    metadata = {"format": sdr.checkpoint.FORMAT, "info": '{"origin": "\\u00e9\\n"}', "config": "é"}
    write_tensors(path, {"a": torch.arange(4.0), "b": torch.tensor(3), "c": torch.zeros(0)}, metadata)
    data = path.read_bytes()
    step = 1 if draws.CHECKPOINTS > 1000 else 7  # each seventh bit: of almost every byte one, of any place in a byte
    bits = range(0, len(data) * 8, step)
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(SDRError):
            read_weights(path)
    record_property("single flipped bits of a weights file, all found", len(bits))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_our_reader_gives_what_torch_load_gives(tmp_path, legacy):
    base = torch.arange(24.0)
    # as FTCN's was saved: module. before every name, versions on the dict, counts of batches as int64 without a shape
    state = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))).state_dict()
    assert state["module.1.num_batches_tracked"].shape == ()
    assert "module.1" in state._metadata
    state |= {
        "view": base.reshape(4, 6)[1:3, ::2].t(),
        "tied": base,
        "half": torch.ones(3).half(),
        "none": torch.zeros(0, 3),
    }
    state |= {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "byte": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "one": torch.tensor(1),
    }
    (tmp_path / "x.pth").write_bytes(saved(state, legacy=legacy))
    with open_torch_file(tmp_path / "x.pth") as file:
        found = file.read()
    expected = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        # its sign stands beside the numbers: torch.load gives -2 and 4, the numbers are 2 and -4
        (
            torch.imag(torch.tensor([1 + 2j, 3 - 4j]).conj()),
            "it calls torch._utils._rebuild_tensor_v2 in a way of its own",
        ),
        (torch.zeros(1).expand(3), r"it has a tensor of more elements than it stores: \[3\] of 1"),
        (torch.zeros(2, 2).to_sparse(), r"it holds torch\._utils\._rebuild_sparse_tensor, which is no dense tensor"),
    ],
    ids=["sign", "expanded", "sparse"],
)
def test_what_our_reader_would_give_otherwise_is_refused(tmp_path, legacy, value, said):
    (tmp_path / "x.pth").write_bytes(saved({"n": value}, legacy=legacy))
    with pytest.raises(SDRError, match=said), open_torch_file(tmp_path / "x.pth"):
        pass


def test_a_zip_without_checksums_says_how_it_came(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "x.pth").write_bytes(saved({"a": torch.ones(3)}, legacy=False))
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(SDRError, match=r"Bad CRC-32 .*set_crc32_options\(False\)"), open_torch_file(tmp_path / "x.pth"):
        pass


def test_what_a_pickle_nests_is_neither_hashed_nor_run(tmp_path):
    """A key of tuples within tuples takes 2^120 steps to hash in torch.load."""
    path = tmp_path / "x.pth"
    content = encode(describe({"a": torch.zeros(1)}))
    head = b"".join(b"\x80\x02" + encode(v) + b"." for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(head + b"\x80\x02" + content + DOUBLED + b"Ns.")
    with pytest.raises(
        SDRError, match=r"x\.pth: is not a bare state_dict of dense tensors: it has a key that is no text"
    ):
        read_ftcn_checkpoint(path)


@pytest.mark.parametrize("fields", [{"depth": 1000}, {"blocks": [1000, 1000]}, {"num_branches": 1000}], ids=str)
def test_layers_that_have_no_tensors_are_not_made(tmp_path, fields, monkeypatch):
    import json

    tensors, metadata = originals("weights", tmp_path)
    config = json.loads(metadata["config"]) | fields
    (tmp_path / "x.safetensors").write_bytes(safetensors(tensors, metadata | {"config": json.dumps(config)}))
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *a, **k: pytest.fail("a module was made"))
    with pytest.raises(SDRError, match="describes 1000 layers or branches and has"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("values", ["[" * 100_000, "[]", "{}", '{"step": "1"}', "1" * 9999], ids=lambda v: v[:15])
def test_a_run_whose_values_are_none_goes_back_to_the_checkpoint_before(tmp_path, values, caplog):
    for step, text in ((1, '{"step": 1}'), (2, values)):
        path = tmp_path / f"step_{step:09d}.safetensors"
        write_tensors(path, {"now.a": torch.ones(3)}, {"format": FORMAT, "values": text})
    assert Checkpoints(tmp_path, 2).load()[1] == {"step": 1}
    assert "step_000000002.safetensors: holds no state of a run" in caplog.text


if __name__ == "__main__":
    format, folder, count = sys.argv[1:]
    read_cases(READERS[format], Path(folder), int(count))
