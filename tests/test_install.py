"""Installation: a repaired wheel without a compiler, and no extension at all."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

RUN_OP = """
import torch, tucker_ops
x = torch.randn(1, 8, 6, 7, 8)
module = tucker_ops.nn.TuckerConv3d(8, 8, 3, (4, 4), padding=1)
expected = tucker_ops.tucker_conv(x, module.u_in, module.core, module.u_out, module.bias, 1, 1, backend="reference")
torch.testing.assert_close(module(x), expected)
"""


def pip(*arguments: str | Path, python: Path | None = None, **environment: str):
    command = [
        sys.executable,
        "-m",
        "pip",
        *(["--python", str(python)] if python else []),
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's torch, but no tucker_ops, and has no pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A .pth file inside a folder that a .pth file names is not read: our own editable install stays out.
    Path(packages, "torch_from_outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def run_without_compiler(python: Path, code: str) -> str:
    environment = {
        "PATH": str(python.parent),
        "CXX": "none",
        "CC": "none",
        "HOME": os.environ.get("HOME", "/"),
    }
    result = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, cwd=python.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module", autouse=True)
def _build_tools():
    missing = [
        name for name in ("cmake", "setuptools", "wheel", "auditwheel") if not importlib.util.find_spec(name)
    ]
    if missing or not shutil.which("make"):
        pytest.skip(
            f"building a wheel needs make and {missing or 'nothing else'}, which this environment lacks"
        )


def test_repaired_wheel_runs_without_a_compiler(repo_root, tmp_path):
    dist = tmp_path / "dist"
    bin_folder = Path(sys.executable).parent
    command = ["make", "-o", ".venv/.ready", "wheel", f"BIN={bin_folder}", f"DIST={dist}"]
    built = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = dist.glob("tucker_ops-*.whl")
    assert "manylinux" in wheel.name
    assert wheel.stat().st_size < 20e6, "the wheel must not carry torch's libraries"

    python = fresh_environment(tmp_path / "env")
    installed = pip("install", "-q", "--no-deps", wheel, python=python)
    assert installed.returncode == 0, installed.stderr
    code = f"""{RUN_OP}
assert tucker_ops.backends()["cpu"].ok, tucker_ops.backends()
tucker_ops.tucker_conv(x, module.u_in, module.core, module.u_out, backend="cpu")
from tucker_ops import _host
assert _host.build_info()["cpu_kernels"]
print(tucker_ops.__file__)"""
    assert str(tmp_path) in run_without_compiler(python, code)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TUCKER_NATIVE": "0"}, "switched off by TUCKER_NATIVE=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (looked for no-such-compiler)"),
        ({"CXX": "false"}, "error"),
    ],
    ids=["switched off", "no compiler", "broken compiler"],
)
def test_without_the_extension_the_reference_works_and_says_so(repo_root, tmp_path, environment, reason):
    python = fresh_environment(tmp_path / "env")
    # A copy, because pip builds in place and would leave its outcome in the checkout.
    source = copy_of_sources(repo_root, tmp_path / "source")
    installed = pip(
        "install", "-q", "--no-build-isolation", "--no-deps", source, python=python, **environment
    )
    assert installed.returncode == 0, installed.stderr
    code = f"""{RUN_OP}
print(tucker_ops.backends()["cpu"].reason)
print(tucker_ops.explain(module.problem((1, 8, 6, 7, 8))).chosen)
try:
    tucker_ops.tucker_conv(x, module.u_in, module.core, module.u_out, backend="cpu")
except tucker_ops.errors.BackendError as error:
    print(error)"""
    out = run_without_compiler(python, code)
    assert out.lower().count(reason.lower()) >= 2
    assert "\nreference\n" in out


def test_an_unknown_switch_is_refused(repo_root, tmp_path):
    source = copy_of_sources(repo_root, tmp_path / "source")
    failed = pip(
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        tmp_path,
        source,
        TUCKER_NATIVE="off",
    )
    assert failed.returncode != 0 and "must be 0, 1 or unset" in failed.stderr + failed.stdout


@pytest.mark.parametrize(
    "switches", [{"TUCKER_NATIVE": "off"}, {"TUCKER_CUDA": "2"}, {"TUCKER_NATIVE": "0", "TUCKER_CUDA": "1"}]
)
def test_a_refused_build_leaves_what_is_there(repo_root, tmp_path, switches):
    source = copy_of_sources(repo_root, tmp_path / "source")
    built = source / "tucker_ops" / "libtucker_ops_native.so"
    built.write_text("built before")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env={**os.environ, **switches}, capture_output=True, text=True)
    assert done.returncode != 0 and "tucker_ops: TUCKER_" in done.stderr
    assert built.read_text() == "built before"


def test_strict_installation_fails_where_the_extension_cannot_be_built(repo_root, tmp_path):
    source = copy_of_sources(repo_root, tmp_path / "source")
    target = tmp_path / "target"
    arguments = ("install", "-q", "--no-build-isolation", "--no-deps", "--target", target, source)
    failed = pip(*arguments, TUCKER_NATIVE="1", CXX="no-such-compiler")
    assert failed.returncode != 0
    assert "TUCKER_NATIVE=1" in failed.stderr + failed.stdout
    assert not (target / "tucker_ops").exists()


def copy_of_sources(root: Path, destination: Path) -> Path:
    ignore = shutil.ignore_patterns("*.so", "_build_status.json", "__pycache__")
    destination.mkdir()
    for folder in ("csrc", "tucker_ops"):
        shutil.copytree(root / folder, destination / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, destination)
    return destination
