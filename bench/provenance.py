"""On what a figure was measured: processor, instruction sets, versions, commit, date."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import tucker_ops
from tucker_ops.backends import native

REPOSITORY = Path(__file__).resolve().parents[1]
CPU_INFO = Path("/proc/cpuinfo")
MEASURED_CODE = ("bench", "csrc", "tucker_ops")


def provenance() -> dict[str, str | int | float | None]:
    """Fields that every row carries; a value that cannot be found out is None."""
    return {
        "device": "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "tucker_ops_isa": native.isa() if native.load() else None,
        "torch": torch.__version__,
        "onednn": _onednn_version(),
        "onnxruntime": _version("onnxruntime"),
        "openvino": _version("openvino"),
        "tucker_ops": tucker_ops.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    if CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    return platform.processor() or None


def _onednn_version() -> str | None:
    found = re.search(r"(?:MKL-DNN|oneDNN) v(\S+)", torch.__config__.show())
    return found.group(1) if found else None


def _commit() -> str | None:
    """Short hash of the checkout, with "+" where the measured code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *MEASURED_CODE)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
