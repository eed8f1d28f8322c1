"""Loads the compiled extension, and remembers why it is absent where it is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from tucker_ops.backends.base import Verdict

_PACKAGE = Path(__file__).resolve().parents[1]
LIBRARY_NAME = "libtucker_ops_native.so"
STATUS_NAME = "_build_status.json"


@cache
def load() -> Verdict:
    """Load the extension once; a no says why not."""
    path = _PACKAGE / LIBRARY_NAME
    if not path.exists():
        return Verdict(False, f"the compiled extension is absent: {build_status()['reason']}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Verdict(False, f"the compiled extension does not load with torch {torch.__version__}: {error}")
    return Verdict(True, f"compiled extension {path.name}")


def build_status() -> dict[str, str]:
    """What setup.py noted about the build: {"native": "built" | "absent", "reason": …}."""
    try:
        return json.loads((_PACKAGE / STATUS_NAME).read_text())
    except (OSError, ValueError):
        return {"native": "absent", "reason": "tucker_ops was not installed; run `pip install .`"}
