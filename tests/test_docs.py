"""README and docs hold what they say: commands parse, Python runs, names, links and counted figures are true."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

import sdr
import sdr_kernels
from sdr import ftcn_released
from sdr.cli import build_parser
from sdr.config import LossConfig, SDRConfig, TPAConfig
from sdr.cutting import PrepareConfig
from sdr.layers import layers_of
from sdr.loading import LoaderConfig
from sdr.passes import INFERENCE, passes_of
from sdr.score import ScoreConfig
from sdr.train_command import files_first
from sdr.train_config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS = {  # options of other programs that the pages name
    "--extra-index-url",  # pip
    "--nproc_per_node",  # torchrun
    *("--benchmark", "--record-folder"),  # pytest bench
    *("--json", "--rounds", "--tolerance", "--longest"),  # bench/compare_trees.py, python -m sdr_kernels.info
}
OF_ONE_THEME = {"--grouped.", "--limits.*"}  # a prefix of several options


def blocks(text: str, *languages: str) -> list[str]:
    return [block for language, block in FENCE.findall(text) if language in languages]


def shell_lines(text: str) -> Iterator[str]:
    """Every line of a shell block, fenced or indented."""
    for block in blocks(text, "sh"):
        yield from block.splitlines()
    yield from (line.strip() for line in FENCE.sub("", text).splitlines() if line.startswith("    "))


def sdr_arguments(line: str) -> list[str] | None:
    """What `sdr` is given by a line of a shell; None where the line calls something else."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    if words[:1] == ["sdr"]:
        return words[1:]
    return words[words.index("-m") + 2 :] if words[:1] == ["torchrun"] else None


def shell_commands() -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for name, text in BY_NAME.items():
        for line in shell_lines(text):
            if "sdr" in line and (arguments := sdr_arguments(line)):
                found.append((name, tuple(arguments)))
    return list(dict.fromkeys(found))


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """Of each command, the options that it takes."""
    (commands,) = (action for action in build_parser()._actions if hasattr(action, "choices") and action.choices)
    return {name: set(parser._option_string_actions) for name, parser in commands.choices.items()}


def test_pages_have_commands():
    assert {name for name, _ in shell_commands()} >= {"README.md", "docs/tutorial.md", "docs/training.md"}


def exit_code(arguments: list[str]) -> int | str | None:
    """0 for a command line that parses, or that is answered by a text, as --help and --print_config are."""
    try:
        build_parser(arguments).parse_args(arguments)
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.parametrize(
    ("page", "arguments"), shell_commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_command_parses(page, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = files_first(arguments)
    for option, value in pairwise(arguments):
        if option == "--config":
            Path(value).write_text("{}")
    assert exit_code(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", BY_NAME)
def test_named_commands_and_options_exist(page, options):
    every = set.union(*options.values()) | OTHERS
    for span in code_spans(BY_NAME[page]):
        named = set(re.findall(r"(?<!\S)--[a-z][\w.*-]*", span)) - OF_ONE_THEME
        command = re.match(r"sdr ([a-z]+)", span)
        assert named <= (options[command[1]] if command else every), span


def test_prefixes_are_those_of_options(options):
    for prefix in OF_ONE_THEME:
        assert any(name.startswith(prefix.rstrip("*")) for names in options.values() for name in names), prefix


def python_blocks(marked: bool) -> list[tuple[str, str]]:
    mark = "<!-- run -->\n" if marked else ""
    fence = re.compile(mark + r"```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(name, block) for name, text in BY_NAME.items() for block in fence.findall(text)]


@pytest.mark.parametrize(("page", "block"), python_blocks(marked=False), ids=lambda x: x[:40])
def test_python_imports_what_there_is(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize(("page", "block"), python_blocks(marked=True), ids=lambda x: x[:40])
def test_marked_python_runs(page, block):
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    if "scores" in names:
        assert names["scores"].shape == (2,)
        assert ((names["scores"] > 0) & (names["scores"] < 1)).all()
    trained = names.get("model") or names.get("features")
    gradients = [p.grad for p in trained.parameters()] if hasattr(trained, "parameters") else [trained.grad]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_readme_runs():
    assert {"README.md", "docs/library.md", "docs/fast.md"} <= {page for page, _ in python_blocks(marked=True)}


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", BY_NAME)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", BY_NAME[page])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def api_members() -> dict[str, list[str]]:
    """Module to the names that the API pages show of it."""
    found = {}
    for name, text in BY_NAME.items():
        if name.startswith("docs/api/"):
            for module, rest in re.findall(r"^::: (\S+)\n((?: +.*\n?)*)", text, re.MULTILINE):
                found[module] = re.findall(r"^ +- (\w+)$", rest, re.MULTILINE)
    return found


def test_api_pages_show_what_there_is():
    """mkdocstrings leaves out in silence what a module does not have, and what has no docstring."""
    for module, names in api_members().items():
        for name in names:
            thing = getattr(import_module(module), name)
            assert thing.__module__ == module, f"{module}.{name} is of {thing.__module__}"
            text = inspect.getdoc(thing) or ""
            assert text, f"{module}.{name} has no docstring"
            assert not text.startswith(f"{name}("), f"{module}.{name} has only what Python gives a tuple"


def test_api_pages_show_every_export():
    shown = {name for names in api_members().values() for name in names}
    assert {*sdr.__all__, *sdr_kernels.__all__} <= shown


def table(page: str, name: str) -> dict[str, list[str]]:
    """First cell to the others, of the table between the marks of that name."""
    text = BY_NAME[page].split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_layer_table_is_the_layer_models():
    work: dict[str, list[int]] = {}
    for layer in layers_of(ftcn_released(), clips=1):
        flops, moved = work.get(layer.stage, (0, 0))
        work[layer.stage] = [flops + layer.flops, moved + layer.bytes]
    rows = {name: [f"{f / 1e9:.1f}", f"{b / 1e6:.1f}", f"{f / b:.0f}"] for name, (f, b) in work.items()}
    assert table("docs/kernels.md", "layers") == rows


def test_plan_table_is_that_of_the_passes():
    rows = {}
    for plan in INFERENCE:
        passes = list(passes_of(ftcn_released(), 1, plan))
        flops = sum(p.flops for p in passes)
        floor = sum(max(p.flops, 200 * p.bytes) for p in passes)
        rows[plan] = [str(len(passes)), f"{sum(p.bytes for p in passes) / 1e9:.2f}", f"{floor / flops:.2f}"]
    assert {plan: cells[1:] for plan, cells in table("docs/kernels.md", "plans").items()} == rows


def decisions() -> list[tuple[str, str]]:
    """The fields that the page of decisions names, each with the text of its default."""
    found = []
    for line in BY_NAME["docs/decisions.md"].split("## Shape of the model")[0].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if len(cells) == 4 and cells[0] != "decision" and "--" not in cells[2]:
            found += [(name, cells[1]) for name in re.findall(r"`([\w.]+)`", cells[2])]
    return found


def test_decisions_name_fields_and_their_defaults():
    configs = (SDRConfig, LossConfig, TPAConfig, TrainConfig, LoaderConfig, ScoreConfig, PrepareConfig)
    defaults: dict[str, list] = {}
    for config in configs:
        for field in fields(config):
            defaults.setdefault(field.name, []).append(field.default)
    assert len(decisions()) > 30
    for name, text in decisions():
        said = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)}
        said |= {number / 100 for number in said}  # per cent
        for value in defaults[name.rpartition(".")[2]]:
            parts = value if isinstance(value, tuple) else (value,)
            numbers = {float(p) for p in parts if isinstance(p, int | float) and not isinstance(p, bool) and p}
            assert numbers <= said, f"{name} is {value}, the page says: {text}"


@pytest.mark.slow
def test_site_builds_and_asks_no_other_host(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?([^\s\">]+)", page.read_text())
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page
