"""Build of tucker_ops. Everything is described in pyproject.toml and CMakeLists.txt; this file joins them.

Environment variables
    TUCKER_NATIVE=1     the compiled extension must build, or the installation fails
    TUCKER_NATIVE=0     do not build it; the reference backend works, and `tucker_ops.backends()` says why
                        the others do not
    (unset)             build it if that works; else install without it and note the reason
    TUCKER_CUDA=1       the CUDA kernels must build as well, or the installation fails
    TUCKER_CUDA=0       leave them out
    (unset)             build them if nvcc is found; else, or if that fails, note the reason
    CUDACXX             nvcc, as for CMake
    TUCKER_CUDA_ARCHITECTURES   e.g. 90-real for one card only, which compiles three times faster; by default
                        75-real;80-real;90
    CXX                 the C++20 compiler, as for CMake
    TUCKER_SANITIZE     e.g. address,undefined
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STATUS = "_build_status.json"
CUDA_LIBRARY = "libtucker_ops_cuda.so"


class Unbuildable(Exception):
    """The extension cannot be built here; the message says why."""


def compiler() -> str:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(candidate.split()[0]):
            return candidate
    raise Unbuildable(f"no C++ compiler found (looked for {', '.join(candidates)}); install one, or set CXX")


def cmake() -> str:
    if importlib.util.find_spec("cmake") is not None:
        import cmake

        return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    found = shutil.which("cmake")
    if found is None:
        raise Unbuildable("CMake 3.25 or newer not found; `pip install cmake`")
    return found


def ninja() -> list[str]:
    found = shutil.which("ninja")
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        found = str(Path(ninja.BIN_DIR) / "ninja")
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={found}"] if found else []


def torch_folder() -> tuple[str, Path]:
    # Asked of a fresh interpreter: importing torch here would tie the build to its import side effects.
    code = "import torch, os; print(torch.__version__); print(os.path.dirname(torch.__file__))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise Unbuildable(
            "torch is not importable in the build environment; install torch 2.11 or newer first"
        )
    version, folder = result.stdout.split("\n")[:2]
    return version, Path(folder)


def switch(name: str) -> str:
    mode = os.environ.get(name, "")
    if mode not in ("", "0", "1"):
        raise SystemExit(f"tucker_ops: {name} must be 0, 1 or unset, got {mode!r}")
    return mode


def run(command: list[str], environment: dict[str, str]) -> None:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    print(result.stdout)
    if result.returncode:
        errors = [line for line in result.stdout.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
        raise Unbuildable((errors or result.stdout.splitlines() or ["no output"])[0].strip())


def build_native(target: Path) -> dict[str, str]:
    """Compile into `target`; returns what to note of it, raises Unbuildable where nothing could be built."""
    cxx = compiler()
    torch_version, torch_path = torch_folder()
    # One folder per torch, compiler and Python: isolated and plain builds would otherwise spoil each other's cache.
    abi = sysconfig.get_config_var("SOABI")
    key = hashlib.sha256(f"{torch_path}{abi}{cxx}".encode()).hexdigest()[:8]
    build = ROOT / "build" / f"{sysconfig.get_platform()}-torch{torch_version}-{key}"
    if "pip-build-env-" in str(torch_path):
        # An isolated build's torch is gone afterwards: nothing of this folder could be used again.
        build = Path(tempfile.mkdtemp(prefix="tucker_ops-build-"))
        atexit.register(shutil.rmtree, build, ignore_errors=True)
    configure = [
        *(cmake(), "-S", str(ROOT), "-B", str(build), *ninja()),
        f"-DCMAKE_INSTALL_PREFIX={target}",
        f"-DTORCH_DIR={torch_path}",
        f"-DPYTHON_EXECUTABLE={sys.executable}",
        f"-DTUCKER_SANITIZE={os.environ.get('TUCKER_SANITIZE', '')}",
        f"-DTUCKER_CUDA_ARCHITECTURES={os.environ.get('TUCKER_CUDA_ARCHITECTURES', '75-real;80-real;90')}",
    ]
    # CMake reads CXX from the environment at the first configuration.
    environment = {**os.environ, "CXX": cxx}
    cuda = switch("TUCKER_CUDA")
    modes = {"0": ("OFF",), "1": ("ON",), "": ("AUTO", "OFF")}[cuda]
    reason = (
        "switched off by TUCKER_CUDA=0 at installation"
        if cuda == "0"
        else "no CUDA compiler (nvcc) was found"
    )
    for mode in modes:
        try:
            run([*configure, f"-DTUCKER_CUDA={mode}"], environment)
            run([cmake(), "--build", str(build)], environment)
            run([cmake(), "--install", str(build)], environment)
            break
        except Unbuildable as error:
            if mode != "AUTO":
                raise
            # Whatever CUDA's part in it: without CUDA it may build yet.
            reason = f"it did not build: {error}"
            (target / CUDA_LIBRARY).unlink(missing_ok=True)
    built = (target / CUDA_LIBRARY).exists()
    return {
        "native": "built",
        "reason": f"compiled by {cxx} against torch {torch_version}",
        "cuda": "built" if built else "absent",
        "cuda_reason": f"compiled with nvcc against torch {torch_version}" if built else reason,
    }


class BuildModules(build_py):
    """Starts from an empty folder: setuptools would ship modules that were deleted since the last build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "tucker_ops", ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Delegates to CMake and notes the outcome beside the package's code."""

    def run(self) -> None:
        target = (
            ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        ) / "tucker_ops"
        target.mkdir(parents=True, exist_ok=True)
        # Before anything is removed.
        mode, cuda = switch("TUCKER_NATIVE"), switch("TUCKER_CUDA")
        if mode == "0" and cuda == "1":
            raise SystemExit(
                "tucker_ops: TUCKER_CUDA=1 needs the compiled extension, which TUCKER_NATIVE=0 leaves out"
            )
        for stale in [*target.glob("libtucker_ops_*.so"), *target.glob("_host.*.so")]:
            stale.unlink()
        try:
            if mode == "0":
                raise Unbuildable("switched off by TUCKER_NATIVE=0 at installation")
            status = build_native(target)
        except (Unbuildable, OSError) as error:
            if "1" in (mode, cuda):
                raise SystemExit(
                    f"tucker_ops: TUCKER_NATIVE=1 or TUCKER_CUDA=1, but the extension does not build: {error}"
                ) from None
            status = {"native": "absent", "reason": str(error), "cuda": "absent", "cuda_reason": str(error)}
            print(f"tucker_ops: installing without the compiled extension: {error}", file=sys.stderr)
        (target / STATUS).write_text(json.dumps(status, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        target = Path(self.build_lib) / "tucker_ops"
        return [str(path) for path in (*target.glob("*.so"), target / STATUS)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def version() -> str:
    text = (ROOT / "tucker_ops" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    version=version(),
    # Without sources: it only tells setuptools that the wheel belongs to one platform.
    ext_modules=[Extension("tucker_ops._native", sources=[])],
    cmdclass={"build_py": BuildModules, "build_ext": BuildNative},
)
