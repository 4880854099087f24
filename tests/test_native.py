"""The CUDA kernels as they are built, found, compiled and launched, as far as a machine without a GPU can tell."""

import json
import stat
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import sdr_kernels
from sdr_kernels import _csrc, _ops, info
from sdr_kernels._cuda import loader

SOURCES = sorted(loader.CSRC.glob("*.cu"))
GPU = SimpleNamespace(device=torch.device("cuda", 0))  # all of a tensor that chooses an implementation
CPU = torch.zeros(1)
needs_build = pytest.mark.skipif(loader.built() is None, reason="sdr_kernels._C was not built: there was no nvcc")


@pytest.fixture
def nvrtc():
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install -e '.[cupy-cu13]'")


@pytest.fixture
def problems(monkeypatch):
    """What keeps kernels from running on a GPU, by their name."""
    found = {"triton": "", "cuda": ""}
    monkeypatch.setattr(_ops, "why_not", lambda kernels, device: found[kernels])
    monkeypatch.delenv("SDR_STRICT", raising=False)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_nvrtc_compiles_every_source(source, capability, nvrtc):
    cubin = loader.compile_cubin(source, capability)
    assert cubin.startswith(b"\x7fELF")
    if loader.built() is not None:
        kernels = [name for name in loader.built().kernels() if loader.source_of(name) == source]
        assert kernels
        assert [name for name in kernels if name.encode() not in cubin] == []


def test_a_source_that_does_not_compile_says_where(tmp_path, nvrtc):
    source = tmp_path / "planted.cu"
    source.write_text('#include "registry.h"\nextern "C" __global__ void planted(float* x) { *x = ; }\n')
    with pytest.raises(RuntimeError, match=r"planted.cu does not compile: planted.cu\(2\): error: expected an expr"):
        loader.compile_cubin(source, "90")


def test_a_cubin_is_compiled_once_for_what_it_depends_on(tmp_path, monkeypatch, nvrtc):
    csrc, compiled = tmp_path / "csrc", []
    csrc.mkdir()
    for name in ("planted.cu", "own.cuh", "flags.txt"):
        (csrc / name).write_text("--first\n")
    monkeypatch.setattr(loader, "CSRC", csrc)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "compile_cubin", lambda *args: compiled.append(args) or b"%d" % len(compiled))
    source = csrc / "planted.cu"
    first = loader.cached_cubin(source, "90")
    assert loader.cached_cubin(source, "90") == first
    assert first.read_bytes() == b"1"
    others = [loader.cached_cubin(source, "80")]
    for name in ("planted.cu", "own.cuh", "flags.txt"):
        (csrc / name).write_text("--second\n")
        others.append(loader.cached_cubin(source, "90"))
    assert [path.read_bytes() for path in others] == [b"2", b"3", b"4", b"5"]
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".cubin"] * 5
    assert stat.S_IMODE(first.stat().st_mode) == 0o644


def test_a_failed_compilation_leaves_nothing_in_the_cache(tmp_path, monkeypatch, nvrtc):
    source = tmp_path / "planted.cu"
    source.write_text("no C++\n")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match=r"planted.cu does not compile"):
        loader.cached_cubin(source, "90")
    assert list(tmp_path.glob("cache/*")) == []


def test_a_kernel_is_found_by_the_longest_name_of_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "CSRC", tmp_path)
    for name in ("loss.cu", "loss_all.cu"):
        (tmp_path / name).touch()
    assert loader.source_of("loss_all_float32").name == "loss_all.cu"
    assert loader.source_of("loss_float32").name == "loss.cu"
    with pytest.raises(RuntimeError, match="csrc has no source for kernel lossless"):
        loader.source_of("lossless")


@pytest.fixture
def launches(monkeypatch):
    """What reaches ``_C.launch``."""
    calls = []
    monkeypatch.setattr(loader, "built", lambda: SimpleNamespace(launch=lambda *args: calls.append(args)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return calls


def test_launch_packs_what_the_kernel_takes(launches):
    x = torch.zeros(3)
    loader.launch("kernel", SimpleNamespace(device=torch.device("cuda", 1)), (5,), (64, 2), [x, None, 3, 0.5], 1024)
    assert launches == [("kernel", 1, (5, 1, 1), (64, 2, 1), 1024, 7, [x.data_ptr(), 0, 3, 0.5])]


def test_an_empty_grid_launches_nothing(launches):
    loader.launch("kernel", GPU, (4, 0), (64,), [])
    assert launches == []


def test_nvrtc_launch_gives_arguments_their_width_and_asks_for_shared_memory(monkeypatch, nvrtc):
    import cupy

    calls = []

    class Kernel:
        def __call__(self, *args, **options):
            calls.append((*args, options))

    kernel, entered = Kernel(), []
    enter = pytest.MonkeyPatch.context
    monkeypatch.setattr(loader, "_nvrtc_kernel", lambda name, device: kernel)
    monkeypatch.setattr(cupy.cuda, "Device", lambda device: entered.append(device) or enter())
    monkeypatch.setattr(cupy.cuda.stream.Stream, "from_external", lambda stream: entered.append(stream) or enter())
    loader._launch_nvrtc("kernel", 1, (5, 1, 1), (64, 1, 1), 50_000, "stream", [3, 0.1])
    (grid, block, values, options), *more = calls
    assert (grid, block, options, more) == ((5, 1, 1), (64, 1, 1), {"shared_mem": 50_000}, [])
    assert [type(value) for value in values] == [cupy.int64, cupy.float32]
    assert kernel.max_dynamic_shared_size_bytes == 50_000
    assert entered == [1, "stream"]


@needs_build
def test_the_built_module_refuses_what_it_does_not_know():
    module = loader.built()
    assert set(module.build_info()) == {"cuda", "architectures", "host_compiler", "csrc"}
    assert module.build_info()["csrc"] == loader.csrc_digest()
    assert (module.driver_version() > 0) >= torch.cuda.is_available()
    assert {loader.source_of(name) for name in module.kernels()} == set(SOURCES)
    with pytest.raises(RuntimeError, match=r"sdr_kernels._C has no kernel lossless"):
        module.launch("lossless", 0, (1, 1, 1), (1, 1, 1), 0, 0, [])
    with pytest.raises(RuntimeError, match=r"takes \d+ arguments, got 0"):
        module.launch(module.kernels()[0], 0, (1, 1, 1), (1, 1, 1), 0, 0, [])


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("compute_90a", (10, 0), False),
        ("sm_120", (12, 1), True),
    ],
)
def test_code_runs_where_cuda_says(architecture, capability, runs):
    assert loader.runs_on(architecture, capability) is runs


@pytest.fixture
def build(monkeypatch):
    """What a module says of itself with which all is right, on a GPU of sm_90; a test changes it."""
    said = {"architectures": "sm_80 sm_90", "cuda": "13.1.80", "csrc": loader.csrc_digest(), "driver": 13010}
    module = SimpleNamespace(build_info=lambda: said, driver_version=lambda: said["driver"])
    monkeypatch.setattr(loader, "built", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return said


def test_a_module_of_other_sources_is_refused(build, monkeypatch):
    assert loader.why_not_cuda(GPU.device) == ""
    stale = "sdr_kernels._C was built from other sources than csrc: install again"
    build["csrc"] = "0" * 64
    assert loader.why_not_cuda(GPU.device) == stale
    del build["csrc"]  # as before the digest was embedded
    assert loader.why_not_cuda(GPU.device) == stale
    monkeypatch.setattr(loader, "csrc_digest", lambda: "")
    assert loader.why_not_cuda(GPU.device) == ""


def test_the_digest_is_of_names_and_contents_of_what_is_compiled(tmp_path):
    def digest_with(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return _csrc.digest(tmp_path)

    names = ("a.cu", "a.cuh", "a.h", "a.cpp", "flags.txt")
    digests = [digest_with(name, "1") for name in names] + [digest_with(name, "2") for name in names]
    (tmp_path / "a.cu").rename(tmp_path / "b.cu")
    digests.append(_csrc.digest(tmp_path))
    assert len(set(digests)) == 2 * len(names) + 1
    assert digest_with("a.cu.swp", "an editor's") == digests[-1]
    assert {path.suffix for path in loader.CSRC.iterdir()} <= set(_csrc.SUFFIXES)


@pytest.mark.parametrize(
    ("driver", "architectures", "problem"),
    [
        (13010, "sm_80 sm_90", ""),
        (13000, "sm_80 sm_90", ""),
        (13020, "sm_80 compute_80", ""),
        (13000, "sm_80 compute_80", "sdr_kernels._C was built with CUDA 13.1, the driver is for CUDA 13.0"),
        (12080, "sm_80 sm_90", "sdr_kernels._C was built with CUDA 13.1, the driver is for CUDA 12.8"),
        (0, "sm_80 sm_90", "sdr_kernels._C was built with CUDA 13.1, the driver is for CUDA 0.0"),
    ],
)
def test_an_older_driver_is_named(driver, architectures, problem, build):
    build |= {"driver": driver, "architectures": architectures}
    assert loader.why_not_cuda(GPU.device) == problem


@pytest.mark.promise(row="absent parts")
def test_why_not_cuda(build, monkeypatch):
    assert loader.why_not_cuda(torch.device("cpu")) == "it needs CUDA tensors, got cpu"
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert loader.why_not_cuda(GPU.device) == ""
    capability = (12, 0)
    assert loader.why_not_cuda(GPU.device) == "sdr_kernels._C was built for sm_80 sm_90, cuda:0 is sm_120"
    capability = (7, 5)
    assert loader.why_not_cuda(GPU.device) == "it needs compute capability 8.0, cuda:0 has 7.5"
    capability = (9, 0)
    monkeypatch.setattr(loader, "built", lambda: None)
    monkeypatch.setattr(loader, "find_spec", lambda name: None)
    assert "CuPy, to compile csrc, is not installed" in loader.why_not_cuda(GPU.device)
    monkeypatch.setattr(loader, "find_spec", lambda name: name == "cupy")
    assert loader.why_not_cuda(GPU.device) == ""


@pytest.mark.promise(row="absent parts")
def test_auto_takes_the_first_that_runs(problems):
    def chosen(**options):
        return _ops.select_impl("auto", GPU, **({"op": "temporal_conv3d"} | options))

    assert chosen() == "triton"
    assert chosen(no_tile="too wide") == "cuda"
    problems["triton"] = "triton is not installed"
    assert chosen() == "cuda"
    assert chosen(no_cuda="float32") == "reference"
    assert chosen(unfit="float64") == "reference"
    assert chosen(op="an op with Triton kernels alone") == "reference"
    problems["cuda"] = "not built"
    assert chosen() == "reference"


@pytest.mark.promise(row="absent parts")
def test_auto_says_once_why_it_takes_the_reference(problems, caplog):
    _ops._reference_instead.cache_clear()
    reasons = "x must not be float64", "joint_logits must have at most 16 classes, got 17"
    for reason in reasons * 3:
        assert _ops.select_impl("auto", GPU, op="temporal_conv3d", unfit=reason) == "reference"
        assert _ops.select_impl("auto", CPU, op="temporal_conv3d", unfit=reason) == "reference"
        assert _ops.select_impl("reference", GPU, op="temporal_conv3d", unfit=reason) == "reference"
    assert caplog.messages == [f"impl='auto' takes the reference on cuda:0: {reason}" for reason in reasons]
    assert _ops.select_impl("auto", GPU, op="temporal_conv3d", no_tile="too wide") == "cuda"
    assert _ops.select_impl("auto", GPU, op="temporal_conv3d", no_tile="too wide", no_cuda="float32") == "reference"
    assert caplog.messages[2:] == ["impl='auto' takes the reference on cuda:0: too wide; float32"]


@pytest.mark.promise(row="absent parts")
def test_auto_says_so_in_a_trace_too(problems, caplog):
    _ops._reference_instead.cache_clear()

    @partial(torch.compile, fullgraph=True, backend="eager")
    def double(x):
        return 2 * x if _ops.select_impl("auto", GPU, unfit="x must not be float64") == "reference" else x

    assert double(torch.ones(1)) == 2
    assert "impl='auto' takes the reference on cuda:0: x must not be float64" in caplog.messages


@pytest.mark.promise(row="absent parts")
def test_the_log_says_once_what_cannot_run(monkeypatch, caplog):
    monkeypatch.setattr(_ops, "_triton_problem", lambda device: "triton is not installed")
    _ops._why_not.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="impl='triton' cannot run: triton is not installed"):
                _ops.select_impl("triton", GPU)
    finally:
        _ops._why_not.cache_clear()
    assert caplog.messages == ["triton kernels cannot run on cuda:0: triton is not installed"]


def test_a_named_cuda_runs_or_raises(problems):
    assert _ops.select_impl("cuda", GPU, op="temporal_conv3d") == "cuda"
    for options, reason in (
        ({"op": ""}, "this op has no cuda kernel"),
        ({"unfit": "x must not be float64"}, "x must not be float64"),
        ({"no_cuda": "x must not be float32"}, "x must not be float32"),
    ):
        with pytest.raises(RuntimeError, match=f"impl='cuda' cannot run: {reason}"):
            _ops.select_impl("cuda", GPU, **({"op": "temporal_conv3d"} | options))
    problems["cuda"] = "not built"
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: not built"):
        _ops.select_impl("cuda", GPU, op="temporal_conv3d")


@pytest.mark.parametrize("value", ["", "0", None])
def test_strict_is_off_unless_asked_for(value, problems, monkeypatch):
    if value is not None:
        monkeypatch.setenv("SDR_STRICT", value)
    assert _ops.select_impl("auto", GPU, op="temporal_conv3d", no_tile="too wide") == "cuda"


def test_strict_raises_where_auto_would_pass_a_kernel_over(problems, monkeypatch):
    monkeypatch.setenv("SDR_STRICT", "1")
    assert _ops.select_impl("auto", GPU, op="temporal_conv3d") == "triton"
    for options in ({"unfit": "float64"}, {"no_tile": "too wide"}):
        (reason,) = options.values()
        with pytest.raises(RuntimeError, match=f"SDR_STRICT is set and .* pass over triton on cuda:0: {reason}"):
            _ops.select_impl("auto", GPU, op="temporal_conv3d", **options)
    # plain torch is what a CPU tensor takes, and so is what somebody named
    assert _ops.select_impl("auto", CPU) == "reference"
    assert _ops.select_impl("auto", CPU, has_cpu=True) == "cpu"
    assert _ops.select_impl("reference", GPU, unfit="float64") == "reference"


def test_cuda_is_refused_on_a_cpu():
    x, weight = torch.zeros(1, 1, 2, 4, 2, 2, dtype=torch.float16), torch.zeros(1, 2, 2, 3, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: it needs CUDA tensors, got cpu"):
        sdr_kernels.temporal_conv3d(x, weight, impl="cuda")
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run: x must be float16 or bfloat16"):
        sdr_kernels.temporal_conv3d(x.float(), weight.float(), impl="cuda")


def test_the_order_names_the_launchers_that_there_are():
    package = loader.PACKAGE
    for op, order in _ops.GPU_ORDER.items():
        assert [kernels for kernels in order if not (package / f"_{kernels}" / f"{op}.py").exists()] == []
    launchers = {path.stem for path in (package / "_cuda").glob("*.py")} - {"__init__", "loader"}
    ops = {op for op, order in _ops.GPU_ORDER.items() if "cuda" in order}
    assert launchers == ops
    assert [op for op in ops if f'op="{op}"' not in (package / f"{op}.py").read_text()] == []


def test_info_says_what_runs_and_why_not_the_rest(problems):
    problems["triton"] = "triton is not installed"
    assert info.choice("temporal_conv3d", GPU) == {
        "runs": "cuda",
        "why_not": {
            "reference": "cuda comes first",
            "cpu": "this op has no implementation of its own for CPU tensors",
            "triton": "triton is not installed",
        },
    }


def test_info_in_strict_mode_tells_what_it_raises(problems, monkeypatch):
    monkeypatch.setenv("SDR_STRICT", "1")
    problems["triton"] = "triton is not installed"
    found = info.choice("temporal_conv3d", GPU)
    assert found["runs"] is None
    assert found["why_not"]["auto"].startswith("SDR_STRICT is set and impl='auto' would pass over triton on cuda:0")


def test_info_command():
    command = [sys.executable, "-m", "sdr_kernels.info"]
    found, text = (
        subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
        for options in (["--json"], [])
    )
    found = json.loads(found)
    assert set(found["ops"]) == {name for name in sdr_kernels.__all__ if name.islower()}
    assert found["ops"]["bottleneck_chain"]["cpu"]["runs"] == "cpu"
    assert found["ops"]["spatial_mean"]["cpu"]["runs"] == "reference"
    assert (found["ops"]["spatial_mean"]["cuda"] is None) == (not torch.cuda.is_available())
    assert (found["build"] is None) == (loader.built() is None)
    for op in found["ops"]:
        assert f"\n{op}\n" in text
