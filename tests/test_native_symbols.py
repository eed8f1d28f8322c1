"""Kernel objects leave nothing behind that the linker could pick for the whole program."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

CXX = shutil.which("g++") or shutil.which("c++")


@pytest.mark.parametrize("name", ["avx2", "avx512", "baseline", "wide"])
def test_kernel_objects_have_no_weak_symbols(repo_root, tmp_path, name):
    if CXX is None or shutil.which("nm") is None or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs a C++ compiler, nm and x86-64")
    flags = {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    }
    source = repo_root / "csrc" / "cpu" / f"one_pass_{name}.cpp"
    target = Path(tmp_path) / "kernel.o"
    # Without optimisation nothing is inlined away, so every function that could leave the object shows.
    command = [
        CXX,
        "-std=c++20",
        "-O0",
        "-fPIC",
        "-Wno-psabi",
        *flags.get(name, []),
        "-c",
        source,
        "-o",
        target,
    ]
    subprocess.run(command, check=True)
    output = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
    # "0000 T name": upper case is visible outside the object, W, V and u are weak or unique.
    symbols = [line[17:].split(" ", 1) for line in output.splitlines()]
    visible = {symbol for kind, symbol in symbols if kind in "TDBRWVu" and not symbol.startswith("DW.ref")}
    assert visible == {f"tucker_ops::cpu::kernels_{name}"}
