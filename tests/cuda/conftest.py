"""The CUDA kernels on an emulated multiprocessor, as a backend of its own, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from tucker_ops.backends import cuda, select
from tucker_ops.backends.base import Backend, Verdict
from tucker_ops.backends.reference import REFERENCE


@pytest.fixture(scope="session")
def emulated_library(repo_root) -> Path:
    """Compiles the kernels for the host, once; later runs compile what has changed."""
    cmake = shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    ninja = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if cmake is None or ninja is None or shutil.which("c++") is None:
        pytest.skip("needs cmake, ninja and a C++ compiler to compile the CUDA kernels for the host")
    if sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("the emulated multiprocessor switches between threads in x86-64 assembly")
    folder = repo_root / "build" / f"emulated_gpu-torch{torch.__version__}"
    commands = [
        [cmake, "-S", repo_root, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DTUCKER_CUDA=OFF",
         f"-DTORCH_DIR={Path(torch.__file__).parent}"],
        [cmake, "--build", folder, "--target", "tucker_ops_emulated_gpu"],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
    library = folder / "libtucker_ops_emulated_gpu.so"
    torch.ops.load_library(str(library))
    return library


def emulated_backend(choice: list[int], device: cuda.Device = cuda.H200) -> Backend:
    """The kernels as a backend that runs whatever they support, by a given choice."""
    yes = Verdict(True, "emulated")
    return Backend(
        name="emulated",
        device=None,
        available=lambda: yes,
        supports=lambda problem: Verdict(problem.dtype in cuda.DTYPES, "by its dtype"),
        prefers=lambda problem: yes,
        run=lambda *args: cuda.run_on(device, choice, *args),
        describe=lambda problem: "emulated",
        supports_block=lambda problem: yes,
        run_block=lambda *args: cuda.run_block_on(device, choice, *args),
    )


@pytest.fixture
def emulated(emulated_library, monkeypatch):
    """`emulated(choice, device)` makes backend "emulated" compute so; the cost model chooses at first."""

    functions = ctypes.CDLL(str(emulated_library))
    monkeypatch.setattr(cuda, "_functions", lambda: functions)

    def use(choice: list[int] = (), device: cuda.Device = cuda.H200) -> None:
        monkeypatch.setattr(select, "ORDER", (emulated_backend(list(choice), device), REFERENCE))

    use()
    return use
