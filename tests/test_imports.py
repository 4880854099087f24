"""Imports point one way, importing has no effects, and optional packages stay optional."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdr"
KERNELS = ROOT / "sdr_kernels"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# a module may import, at its top, only from the layers above it in this list
LAYERS = [
    {"errors", "confinement", "decode_worker", "stages"},
    {
        "files",
        "stopping",
        "config",
        "containers",
        "decoding",
        "decode_worker_dali",
        "portraits",
        "recompute",
        "sync_norm",
    },
    {"tpa", "video", "detectors", "bootstrap", "terminal", "page", "run_log", "hub", "torch_file"},
    {"transformer", "faces", "datasets", "dali", "model_card", "published"},
    {"settings_file", "timing", "ftcn", "trfi", "frame_lists", "deepfakebench", "synth_layouts", "clip_cache"},
    {"model", "layers", "graphs", "layouts", "synth", "cache_check", "shortcut"},
    {"packing", "passes", "grouped", "losses", "checkpoint", "loading", "evaluate", "cutting", "profile_kernels"},
    {"fast", "training_passes", "prepare", "train_config", "checkpoints"},
    {"study_config"},
    {"engine", "objective", "training_report", "score", "profile_stages"},
    {"trainer", "report", "run_results"},
    {"train", "score_run"},
    {"protocol", "profile_work"},
    {"profile_floors", "profile_data"},
    {"profile_advice"},
    {"profile"},
    {"reproduce", "study"},
    {"reproduce_tables", "study_table"},
    {"__init__"},
    {"score_command", "prepare_command", "train_command", "evaluate_command"},
    {"reproduce_command", "study_command", "profile_text", "profile_command"},
    {"cli"},
    {"__main__"},
]
DATA = {
    "video",
    "faces",
    "detectors",
    "datasets",
    "tpa",
    "synth",
    "confinement",
    "decode_worker",
    "decode_worker_dali",
    "clip_cache",
    "cache_check",
    "cutting",
    "prepare",
    "dali",
    "loading",
    "containers",
    "decoding",
    "portraits",
    "layouts",
    "deepfakebench",
    "frame_lists",
    "synth_layouts",
}
MODEL = {
    "transformer",
    "ftcn",
    "trfi",
    "model",
    "layers",
    "passes",
    "training_passes",
    "packing",
    "grouped",
    "fast",
    "losses",
    "checkpoint",
    "train",
    "score",
}
MODEL |= {"stages", "profile", "profile_work", "profile_floors", "profile_stages", "profile_kernels"}
MODEL |= {"hub", "evaluate", "objective", "engine", "trainer", "train_config", "model_card"}
BASE = {"torch", "numpy", "sdr", "sdr_kernels"}
WORKER = {"av"}  # run as a script of its own


def imports(module: str | Path, *, top_only: bool) -> set[str]:
    """Dotted names that a module of sdr, or a file, imports, at its top level or anywhere, type checking aside."""
    tree = ast.parse((PACKAGE / f"{module}.py" if isinstance(module, str) else module).read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"sdr.{alias.name}" for alias in node.names} if node.module == "sdr" else {node.module}
    return names


def inside(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("sdr.")} & set(MODULES)


def test_every_module_has_a_layer():
    assert sorted(set().union(*LAYERS)) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    back = [name for name in inside(imports(module, top_only=True)) if rank[name] >= rank[module]]
    assert back == []


@pytest.mark.parametrize("module", sorted(DATA))
def test_data_never_imports_the_model(module):
    assert inside(imports(module, top_only=False)) & MODEL == set()


@pytest.mark.parametrize("module", MODULES)
def test_top_level_needs_torch_and_numpy_alone(module):
    top = {name.split(".")[0] for name in imports(module, top_only=True)}
    allowed = WORKER if module == "decode_worker" else BASE
    assert {name for name in top if name not in sys.stdlib_module_names} <= allowed


@pytest.mark.parametrize("file", sorted(KERNELS.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_know_nothing_of_the_model(file):
    names = {name.split(".")[0] for name in imports(file, top_only=False)}
    assert "sdr" not in names
    allowed = {"torch", "numpy", "sdr_kernels"} | ({"triton"} if file.parent.name == "_triton" else set())
    top = {name.split(".")[0] for name in imports(file, top_only=True)}
    assert {name for name in top if name not in sys.stdlib_module_names} <= allowed


@pytest.mark.promise(row="supply")
@pytest.mark.promise(row="absent parts")
def test_importing_prints_nothing_and_loads_no_optional_package():
    code = """
import sys, sdr, sdr.score, sdr.train, sdr.report, sdr.synth, sdr.cli, sdr.fast, sdr.reproduce, sdr.study, sdr.profile
import sdr_kernels
heavy = {"triton", "av", "pyarrow", "nvidia.dali", "lightning_fabric", "huggingface_hub", "tensorboard", "scipy"}
heavy |= {"onnxruntime", "onnx", "cv2", "sklearn", "skimage", "jinja2", "plotly", "PIL", "rich", "jsonargparse"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what no module may do -------------------------------------------------------------------------------------------

SOURCES = sorted(path for folder in (PACKAGE, KERNELS) for path in folder.rglob("*.py"))
FORBIDDEN = {"eval", "exec", "compile", "__import__"}  # builtins
UNSAFE = {  # what takes code out of a file, or hands text to a shell
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "dill.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader", "yaml.UnsafeLoader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.package.PackageImporter", "torch.hub.load"),
    *("torch._inductor.aoti_load_package", "joblib.load", "pandas.read_pickle"),
}
MODULES_OF_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute or a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.AST) -> set[str]:
    """Calls and imports of a module that could run what a file or a text says."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in UNSAFE:
            found.add(dotted(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN:
            found.add(node.func.id)
        if isinstance(node, ast.keyword) and node.arg == "shell" and getattr(node.value, "value", True) is not False:
            found.add("shell")
        if (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and getattr(node.value, "value", True) is not False
        ):
            found.add("allow_pickle")
        if (
            isinstance(node, ast.keyword)
            and node.arg == "weights_only"
            and getattr(node.value, "value", None) is not True
        ):
            found.add("weights_only")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names} & MODULES_OF_CODE
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE
    return found


@pytest.mark.promise(row="supply")
@pytest.mark.promise(row="no code from files")
@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_can_run_what_a_file_says(file):
    assert unsafe(ast.parse(file.read_text())) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "import torch\ntorch.load('x', weights_only=True)",
        "f(weights_only=False)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import yaml\nyaml.load('x')",
        "from torch.jit import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_search_finds_what_is_unsafe(code):
    assert unsafe(ast.parse(code))


@pytest.mark.promise(row="supply")
def test_versions_with_known_holes_are_not_accepted():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    needed = [Requirement(line) for line in needed]
    for name, below in {
        "torch": "2.9.1",
        "nvidia-dali-cuda120": "2.2",
        "nvidia-dali-cuda130": "2.2",
        "pillow": "10.2",
    }.items():
        found = [requirement for requirement in needed if requirement.name == name]
        assert found, name
        assert not any(requirement.specifier.contains(below) for requirement in found), name


@pytest.mark.promise(row="supply")
def test_importing_and_computing_reach_no_network():
    """Every module, the demonstration weights and a forward pass, where any look for an address is an error."""
    code = f"""
import importlib, sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"network: {{event}} {{args}}")
sys.addaudithook(refuse)
for name in {[name for name in MODULES if name not in ("__main__", "decode_worker", "decode_worker_dali")]}:
    importlib.import_module(f"sdr.{{name}}")
import torch
from sdr.checkpoint import DEMONSTRATION, load_model
model, _ = load_model(DEMONSTRATION)
c = model.config
with torch.no_grad():
    model(torch.zeros(1, 3, c.num_frames, c.image_size, c.image_size))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
