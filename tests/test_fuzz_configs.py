"""A configuration file ends as settings, or as exit code 2 and the reason: it runs nothing and opens no other file."""

import json
import os
import sys
import time

import draws
import numpy as np
import pytest
import yaml
from hostile_checkpoints import WATCHED

from sdr.cli import main
from sdr.errors import SDRError
from sdr.settings_file import MAX_BYTES, read_settings_file
from sdr.train_config import TRAIN_PRESETS, to_json

pytestmark = pytest.mark.promise(row="no code from files")

SECONDS = 5  # of one file
VALUES = (
    *(
        "",
        "x",
        "~",
        "null",
        "true",
        "3",
        "-1",
        "0",
        "1e3",
        "1e999",
        ".nan",
        "-.inf",
        "0x10",
        "0o7",
        "1_000",
        "2001-01-01",
    ),
    *(
        "9" * 400,
        "-" + "9" * 400,
        "0x" + "f" * 4000,
        "1" * 5000,
        "1:59:59",
        "0.1e-400",
        "[1, 2",
        "{a",
        '"',
        "'",
        "%",
        "@",
        "`",
    ),
    *(
        "[]",
        "[1, 2]",
        "[[1]]",
        "{}",
        "{a: 1}",
        "[other.yaml]",
        "other.yaml",
        "/etc/passwd",
        "/dev/zero",
        "../other.yaml",
    ),
    *(
        "!!python/object/apply:os.system [touch canary]",
        "!!python/name:os.system",
        "!include other.yaml",
        "!!binary aGk=",
    ),
    *(
        "!!set {a, b}",
        "!!int 3",
        "&a [*a]",
        "*a",
        "&a 1",
        "<<: *a",
        '"\\0"',
        '"\\x1b[2J"',
        '"a\\nb"',
        "|\n  a\n  b",
        ">\n a",
    ),
    *(
        "{class_path: os.system}",
        "{init_args: {}}",
        "{class_path: evil.Foo, init_args: {a: 1}}",
        "[" * 300,
        "{a: " * 99,
    ),
)
KEYS = (
    "lrr",
    "model.width",
    "model.class_path",
    "config",
    "print_config",
    "debug",
    "help",
    "subcommand",
    "train",
    "data",
    "out",
)
KEYS += (
    "preset",
    "methods",
    "3",
    "~",
    "true",
    "? [a]\n",
    "<<",
    "'a\\nb'",
    "model",
    "loader",
    "grouped",
    "loss",
    "tpa",
    "",
)
SPELLINGS = (  # none is an option
    *(f"{name} c.yaml" for name in ("--conf", "--model", "--grouped", "--tpa")),
    *(f"{name}=c.yaml" for name in ("--confi", "--loader", "--loss", "--limits")),
    *("--model=evil.Foo", "--tpa.class_path=evil.Foo"),
)
COMMANDS = {  # and what each cannot do without
    "score": "x.mp4",
    "synth": "out",
    "prepare": "root",
    "train": "--data cache --out run",
    "evaluate": "x.safetensors cache",
    "reproduce": "table1 --data cache",
    "study": "heldout",
    "profile": "",
    "convert": "a.pth b.safetensors",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("lr: 0.5\n")
    (tmp_path / "evil.py").write_text("open('canary', 'w')\nclass Foo: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def laughs(levels: int) -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefghij"[:levels], "bcdefghijk", strict=False)
    ]
    return "\n".join(lines) + "\n"


def draw_file(rng: np.random.Generator) -> bytes:
    """A configuration that training writes, in which something is changed; or another file altogether."""
    settings = to_json(TRAIN_PRESETS["tiny"]())
    text = json.dumps(settings, indent=1) if rng.random() < 0.3 else yaml.safe_dump(settings, sort_keys=False)
    lines, kind = text.splitlines(), rng.integers(6)
    place = int(rng.integers(len(lines)))
    value = VALUES[int(rng.integers(len(VALUES)))]
    if kind == 0:  # one setting of another value
        lines[place] = f"{lines[place].partition(':')[0]}: {value}"
    elif kind == 1:  # an unknown or doubled name
        name = KEYS[int(rng.integers(len(KEYS)))]
        lines.insert(place, f"{name}: {value}" if rng.random() < 0.5 else lines[place])
    elif kind == 2:
        name = KEYS[int(rng.integers(len(KEYS)))]
        lines = [f"{name}: {value}"]
    elif kind == 3:
        data = bytearray(text.encode())
        for at in rng.integers(len(data), size=int(rng.integers(1, 6))):
            data[at] = rng.integers(256)
        return bytes(data)
    elif kind == 4:
        return text.encode()[: int(rng.integers(len(text)))]
    else:
        whole = (
            laughs(9),
            "a\n---\nb\n",
            "[" * 60_000,
            "{a: " * 9000,
            "- " * 9000,
            "\0",
            "\ufeffsize: 3",
            value,
            "x" * (MAX_BYTES + 1),
        )
        return [*(w.encode() for w in whole), b"\xff\xfe\xff", rng.bytes(300), "lr: 1".encode("utf-16")][
            int(rng.integers(12))
        ]
    return "\n".join(lines).encode("utf-8", "surrogateescape")


@pytest.fixture
def opened():
    """What is opened or started from now on, by everything but imports of what is installed."""
    seen: list[str] = []
    noting = [True]

    def note(event: str, arguments: tuple) -> None:
        if noting and event in WATCHED and not str(arguments[0]).startswith((sys.prefix, sys.base_prefix)):
            seen.append(f"{event} {arguments[0]!s}")

    sys.addaudithook(note)  # it cannot be removed again
    yield seen
    noting.clear()


def end(capsys, command: tuple[str, ...], given: str = "--config c.yaml") -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    try:
        code = main([*command, *given.split()])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.promise(row="fuzz")
@pytest.mark.parametrize("part", range(2))
def test_mutated_configurations_are_settings_or_refused(folder, capsys, opened, part, record_property):
    count = draws.CHECKPOINTS // 10
    sound, slowest = 0, 0.0
    numbers = [number for number in draws.numbers(count * 2) if number % 2 == part]
    main(["train", "--data", "none", "--out", "run"])  # what the first command imports, it opens
    capsys.readouterr()
    for number in numbers:
        again = draws.replay(f"test_fuzz_configs.py -k 'mutated and {part}'", number)
        rng = draws.draw("config", number)
        data = draw_file(rng)
        given = SPELLINGS[int(rng.integers(len(SPELLINGS)))] if rng.random() < 0.2 else "--config c.yaml"
        (folder / "c.yaml").write_bytes(data)
        opened.clear()
        began = time.monotonic()
        try:
            code, said = end(capsys, ("train", "--data", "cache", "--out", "run"), given)
        except BaseException as error:
            pytest.fail(f"{error!r}\n{given}\n{data[:300]!r}\n{again}")
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        assert code == 2, again  # no cache is there
        assert "Traceback" not in said, again
        assert len(said) < 20_000, again
        sound += "sdr train: cache: no such folder" in said or "sdr train: " in said
        known = (f"{folder}", "cache", *(["c.yaml"] if given == "--config c.yaml" else []))
        foreign = [event for event in opened if not event.endswith(known)]
        assert not foreign, f"{foreign}\n{given}\n{data[:300]!r}\n{again}"
        assert "evil" not in sys.modules, again
        assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [
            "c.yaml",
            "evil.py",
            "other.yaml",
        ], again
        assert seconds < SECONDS, f"{seconds} s\n{again}"
    record_property(f"mutated configuration files, part {part}", len(numbers))
    record_property(f"of them settings that the command understood, part {part}", sound)
    record_property(f"slowest configuration file, part {part}, s", slowest)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (laughs(9), "has an anchor or alias in line 1"),
        ("lr: 1\nlr: 2\n", "has 'lr' twice, again in line 2"),
        ('{"loss": {"mi": 1, "mi": 2}}', "has 'mi' twice, again in line 1"),
        ("lr: !!python/object/apply:os.system [touch canary]\n", "has a tag in line 1: no code"),
        ("model: !include other.yaml\n", "has a tag in line 1"),
        ("grouped: other.yaml\n", "must hold settings under grouped, got 'other.yaml'"),
        ("config: other.yaml\n", "has config, which is for the command line alone"),
        ("debug: true\n", "has debug, which is for the command line alone"),
        ("tpa:\n  crop_area:\n    class_path: evil.Foo\n", "has class_path under 'tpa': no code"),
        ("loss.class_path: evil.Foo\n", "has class_path under 'loss.class_path': no code"),
        ("[" * 9, "is nested more than 8 deep in line 1"),
        ("a: 1\n---\nb: 2\n", "has two documents, the second in line 2"),
        ("3: 4\n", "has 3 in the place of a name"),
        ("? [a]\n: 3\n", "has a key that is no name in line 1"),
        ("- lr\n", "must hold settings by name, got a list"),
        ("x" * (MAX_BYTES + 1), f"is larger than {MAX_BYTES} bytes"),
        ("epochs: 1" + "0" * 5000, "has a value of 5001 letters in line 1"),
        ("lr: \0", "is not YAML"),
        ("lr: [\n", "is not YAML in line 2"),
        ("loss:\n  mi: " + "9" * 400, "has a number of over 63 bits under 'loss'"),
    ],
)
def test_what_is_refused(folder, text, said):
    (folder / "c.yaml").write_text(text)
    with pytest.raises(SDRError) as error:
        read_settings_file("c.yaml", ("model", "grouped"))
    assert said in str(error.value)
    assert str(error.value).startswith("c.yaml: ")
    assert str(error.value).isprintable()


def test_a_file_that_would_block_or_never_end_is_refused(folder):
    os.mkfifo("pipe")
    os.symlink("nowhere", "dangling")
    for name, said in {
        "pipe": "not a regular file",
        "/dev/zero": "not a regular file",
        ".": "not a regular file",
    }.items():
        with pytest.raises(SDRError, match=said):
            read_settings_file(name)
    with pytest.raises(SDRError, match="dangling: cannot be read: No such file"):
        read_settings_file("dangling")
    with pytest.raises(SDRError, match=r"none\.yaml: no such configuration file"):
        read_settings_file("none.yaml")


@pytest.mark.parametrize("word", ["9" * 400, "[" * 3000, "{a: " * 3000], ids=["digits", "lists", "mappings"])
def test_words_of_the_command_line_end_in_a_line_too(folder, capsys, word):
    for name in ("--lr", "--methods", "--model", "--tpa.methods"):
        try:
            code = main(["train", "--data", "cache", "--out", "run", f"{name}={word}"])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_every_preset_can_be_read(folder):
    for preset in TRAIN_PRESETS.values():
        settings = to_json(preset())
        (folder / "c.yaml").write_text(yaml.safe_dump(settings))
        assert read_settings_file("c.yaml", ("model", "loss")) == settings
    assert read_settings_file('{"lr": 0.5}') == {"lr": 0.5}


@pytest.mark.parametrize("command", [("reproduce", "table1"), ("profile",), ("study", "synthetic")], ids=str)
def test_every_command_that_takes_a_file_looks_through_it(folder, capsys, opened, command):
    (folder / "c.yaml").write_text(laughs(9))
    code, said = end(capsys, (*command, "--out", "run", *([] if command[0] == "profile" else ["--data", "cache"])))
    assert (code, "has an anchor or alias" in said) == (2, True), said


@pytest.mark.parametrize("command", COMMANDS)
def test_no_other_option_opens_a_file_of_settings(folder, capsys, opened, command):
    """Neither --config spelled in part, nor a whole section out of a file or by the name of a class."""
    end(capsys, (command,), f"{COMMANDS[command]} --none")  # what the first command imports, it opens
    for given in SPELLINGS:
        text = "model: {class_path: evil.Foo}" if "conf" in given else "class_path: evil.Foo"
        (folder / "c.yaml").write_text(text)
        opened.clear()
        code, said = end(capsys, (command,), f"{COMMANDS[command]} {given}")
        assert (code, "unrecognized arguments: --" in said) == (2, True), f"{given}: {said}"
        assert not opened, f"{given}: {opened}"
        assert "evil" not in sys.modules, given


@pytest.mark.parametrize("text", ["model: {class_path: evil.Foo}", "model: evil.Foo"])
def test_what_was_changed_after_it_was_looked_through_is_not_imported(folder, capsys, monkeypatch, text):
    (folder / "c.yaml").write_text(text)
    monkeypatch.setattr("sdr.train_command.read_settings_file", lambda path, sections: {})
    code, said = end(capsys, ("train", "--data", "cache", "--out", "run"))
    assert (code, "Importing 'evil.Foo' is not allowed" in said, "Traceback" in said) == (2, True, False), said
    assert "evil" not in sys.modules
