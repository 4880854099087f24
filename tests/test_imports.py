"""Imports point one way, importing has no effects, and optional packages stay optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdr"
KERNELS = ROOT / "sdr_kernels"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
# a module may import, at its top, only from the layers above it in this list
LAYERS = [
    {"errors", "decode_worker", "stages"},
    {"files", "config", "containers", "decoding", "decode_worker_dali", "portraits", "recompute", "sync_norm"},
    {"tpa", "video", "detectors", "bootstrap", "terminal", "page", "run_log", "hub"},
    {"transformer", "faces", "datasets", "dali", "model_card", "published"},
    {"timing", "ftcn", "trfi", "frame_lists", "deepfakebench", "synth_layouts", "clip_cache"},
    {"model", "layers", "graphs", "layouts", "synth", "cache_check", "shortcut"},
    {"packing", "passes", "grouped", "losses", "checkpoint", "loading", "evaluate", "cutting", "profile_kernels"},
    {"fast", "training_passes", "prepare", "train_config", "checkpoints"},
    {"study_config"},
    {"engine", "objective", "training_report", "score", "profile_stages"},
    {"trainer", "report", "run_results"},
    {"train"},
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
