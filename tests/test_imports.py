"""Imports run one way, and `import tucker_ops` stays lean."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

# A part may import itself and whatever stands left of it in DESIGN's order.
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "cost": {"errors", "types"},
    "ops": {"errors", "types"},
    "decompose": {"errors", "types"},
    "backends": {"errors", "types", "cost", "ops", "decompose"},
}
ALLOWED["functional"] = ALLOWED["backends"] | {"backends"}
ALLOWED["nn"] = ALLOWED["functional"] | {"functional"}
ALLOWED["convert"] = ALLOWED["nn"] | {"nn"}
ALLOWED["fused"] = ALLOWED["nn"] | {"nn"}
ALLOWED["nnunet"] = ALLOWED["convert"] | {"convert", "fused"}
ALLOWED["cli"] = ALLOWED["nnunet"] | {"nnunet"}
ALLOWED["__main__"] = {"cli"}


def part(module: str) -> str:
    return module.removeprefix("tucker_ops").lstrip(".").split(".")[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "tucker_ops":
                yield from (f"tucker_ops.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_imports_run_one_way(repo_root):
    package = repo_root / "tucker_ops"
    files = [p for p in package.rglob("*.py") if p != package / "__init__.py"]
    assert len(files) > 20
    for path in files:
        here = path.relative_to(package).parts[0].removesuffix(".py")
        for module in imports(path):
            if module.split(".")[0] == "tucker_ops" and part(module) not in ("", "__version__"):
                assert part(module) in ALLOWED[here] | {here}, f"{path.relative_to(package)} imports {module}"


def test_only_nnunet_and_cli_know_nnunetv2(repo_root):
    package = repo_root / "tucker_ops"
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in ("nnunet", "cli"):
            for module in imports(path):
                assert module.split(".")[0] not in ("nnunetv2", "dynamic_network_architectures"), path


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_torch_alone_and_never_touches_cuda():
    run(
        """
import importlib.abc, sys
import torch

is_available = torch.cuda.is_available
torch.cuda._lazy_init = torch.cuda.is_available = None  # calling either fails
before = set(sys.modules)

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        banned = ("numpy", "tensorly", "nnunetv2", "rich", "typer", "matplotlib", "pandas", "triton")
        if name.split(".")[0] in banned and name not in before:
            raise ImportError(f"{name} is not needed by import tucker_ops")

sys.meta_path.insert(0, Refuse())
import tucker_ops
x = torch.randn(1, 4, 5, 6)
m = tucker_ops.nn.TuckerConv2d(4, 4, 3, (2, 2))
assert m(x).shape == (1, 4, 3, 4)
tucker_ops.explain(x, m.u_in, m.core, m.u_out)
tucker_ops.fuse(torch.nn.Sequential(m).eval().requires_grad_(False))(x)
torch.cuda.is_available = is_available  # whoever asks for the table asks for the GPU
print(tucker_ops.backends())
"""
    )


@pytest.mark.timeout(120)
def test_import_is_quick():
    code = """
import time, torch
start = time.perf_counter()
import tucker_ops
print(time.perf_counter() - start)
"""
    assert min(float(run(code)) for _ in range(3)) < 1.5


def test_public_names():
    run(
        """
import tucker_ops
for name in tucker_ops.__all__:
    getattr(tucker_ops, name)
import tucker_ops.convert, tucker_ops.decompose, tucker_ops.backends.select
assert callable(tucker_ops.backends) and callable(tucker_ops.decompose) and callable(tucker_ops.plan)
"""
    )
