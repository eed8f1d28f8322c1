"""Kernel objects leave nothing behind that the linker could pick for the whole program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tucker_ops.backends import native

CXX = shutil.which("g++") or shutil.which("c++")


FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx512_bf16": ["-mavx512f", "-mavx512bf16"],
    "amx_bf16": ["-mavx512f", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
KERNELS = ("avx2", "avx512", "avx512_bf16", "amx_bf16", "baseline", "wide", "wide_bf16", "wide_amx")
LOOPS = ("avx2", "avx512", "avx512_bf16", "amx_bf16", "baseline")
OPERATIONS = {
    "amx_bf16": r"\ttdpbf16ps ",
    "avx512_bf16": r"\tvdpbf16ps\t",
    "baseline": r"\tmulps\t",
}


def compiled(source: Path, target: Path, name: str, *options: str) -> Path:
    """The source compiled for an instruction set; skips where this machine has no such compiler."""
    if CXX is None or shutil.which("nm") is None or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs a C++ compiler, nm and x86-64")
    command = [CXX, "-std=gnu++20", "-fPIC", "-Wno-psabi", *FLAGS.get(name, []), *options]
    done = subprocess.run([*command, source, "-o", target], capture_output=True, text=True)
    if "avx512bf16" in done.stderr or "-mamx" in done.stderr:
        pytest.skip(f"the compiler does not know {name}, and the build leaves it out")
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.parametrize(
    ("folder", "name", "symbol"),
    [("cpu/one_pass", name, f"tucker_ops::cpu::kernels_{name}") for name in KERNELS]
    + [("bench/fma", name, f"tucker_ops::bench::fma_{name}") for name in LOOPS],
)
def test_kernel_objects_have_no_weak_symbols(repo_root, tmp_path, folder, name, symbol):
    source = repo_root / "csrc" / f"{folder}_{name}.cpp"
    # Without optimisation nothing is inlined away, so every function that could leave the object shows.
    target = compiled(source, tmp_path / "kernel.o", name, "-O0", "-c")
    output = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
    # "0000 T name": upper case is visible outside the object, W, V and u are weak or unique.
    symbols = [line[17:].split(" ", 1) for line in output.splitlines()]
    visible = {known for kind, known in symbols if kind in "TDBRWVu" and not known.startswith("DW.ref")}
    assert visible == {symbol}


@pytest.mark.parametrize("name", LOOPS)
def test_peak_loops_compute_all_that_they_count(repo_root, tmp_path, name):
    source = repo_root / "csrc" / "bench" / f"fma_{name}.cpp"
    assembly = compiled(source, tmp_path / "loop.s", name, "-O3", "-S").read_text()
    # A compiler computes chains once that it proves equal, and keeps in memory what it has no register for.
    (chains,) = re.findall(r"(?:TUCKER_CHAINS|kChains =) (\d+)", source.read_text())
    operation = OPERATIONS.get(name, r"\tvfmadd\d+ps\t")
    lines = [line for line in assembly.splitlines() if re.match(operation, line)]
    assert len(lines) == int(chains)
    assert not any("(" in line for line in lines)


def test_bf16_kernels_use_the_instructions_they_are_named_for():
    """In the extension as built; without the instruction set no code of that name may exist."""
    if not native.load() or shutil.which("objdump") is None or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs the compiled extension, objdump and x86-64")
    command = ["objdump", "-d", "--no-show-raw-insn", "--demangle", native.LIBRARY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    built = pytest.importorskip("tucker_ops._host").build_info()["cpu_kernels"]
    for isa, instructions in {
        "avx512_bf16": ["vdpbf16ps"],
        "amx_bf16": ["tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg", "tilerelease"],
    }.items():
        for instruction in instructions:
            assert (re.search(rf"\t{instruction}\b", text) is not None) == (isa in built), instruction
