"""Builds sdr_kernels._C with CMake where there is nvcc; SDR_CUDA says whether: auto (the default), 1 or 0."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HOME = os.environ.get("CUDA_HOME")
NVCC = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else None)
WANTED = os.environ.get("SDR_CUDA", "auto")
CUDA = WANTED == "1" or (WANTED == "auto" and NVCC is not None)
if WANTED not in ("auto", "1", "0"):
    sys.exit(f"SDR_CUDA must be auto, 1 or 0, got {WANTED!r}")
if WANTED != "0" and HOME and NVCC is None:
    sys.exit(f"CUDA_HOME has no bin/nvcc: {HOME}; unset it, or set SDR_CUDA=0")
if CUDA and NVCC is None:
    sys.exit("SDR_CUDA=1 needs nvcc, and there is none in PATH")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if not CUDA:
            self.warn(f"no CUDA kernels are built: {'SDR_CUDA is 0' if WANTED == '0' else 'nvcc was not found'}")
        if not self.editable_mode:  # where _C was not built, NVRTC compiles them
            shipped = Path(self.build_lib, "sdr_kernels", "csrc")
            shutil.rmtree(shipped, ignore_errors=True)  # a source that is gone, by a build before this one
            shutil.copytree("csrc", shipped)
        elif not CUDA:
            for left in Path("sdr_kernels").glob("_C.*"):  # by an editable install before this one
                left.unlink()


class BuildCUDA(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": NVCC,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "SDR_CSRC": runpy.run_path("sdr_kernels/_csrc.py")["digest"](Path("csrc")),
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # --fresh: an earlier build's cache names files of a build environment that is gone
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", ".", "-B", self.build_temp]
        subprocess.run([*configure, *(f"-D{name}={value}" for name, value in settings.items())], check=True)
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run(["cmake", "--build", self.build_temp, *jobs], check=True)


setup(
    ext_modules=[Extension("sdr_kernels._C", [])] if CUDA else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildCUDA},
)
