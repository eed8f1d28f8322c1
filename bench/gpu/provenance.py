"""On what a figure was measured: card, driver, clocks as found, versions, commit, date. Nothing is set, only read."""

from __future__ import annotations

import subprocess

import torch

from bench.provenance import provenance as of_machine
from tucker_ops.backends import native

SMI = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "most_sm_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
COMMON = (
    "cpu", "cores", "load_average", "torch", "tucker_ops", "python", "system", "commit", "date",
)  # fmt: skip


def provenance(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """Fields that every row carries; a value that cannot be found out is None.

    `commit` is that of a checkout without its history, which cannot tell itself.
    """
    machine = of_machine()
    facts: dict[str, object] = {"device": str(device), **{name: machine[name] for name in COMMON}}
    facts["commit"] = facts["commit"] or commit
    facts["cuda_kernels"] = native.load_cuda().reason
    facts["cuda"] = torch.version.cuda
    facts["cudnn"] = torch.backends.cudnn.version()
    facts["triton"] = _triton()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gb"] = round(properties.total_memory / 1e9, 1)
        facts["l2_mb"] = round(getattr(properties, "L2_cache_size", 0) / 1e6, 1) or None
    return facts | smi(device)


def smi(device: torch.device) -> dict[str, str | None]:
    """What nvidia-smi says of a card at this moment."""
    if device.type != "cuda":
        return dict.fromkeys(SMI)
    try:
        card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except AttributeError:
        card = str(device.index or 0)
    command = [
        "nvidia-smi",
        "-i",
        card,
        f"--query-gpu={','.join(SMI.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
        return dict(zip(SMI, values, strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return dict.fromkeys(SMI)


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
