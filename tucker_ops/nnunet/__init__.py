"""nnU-Net: compress trained model folders, predict with them. Needs ``pip install tucker-ops[nnunet]``.

Modules: `folder` and `checkpoint` read what nnU-Net wrote; `networks` holds the classes that plans.json
names; `compress` writes the compressed folder and `manifest` describes it; `predict` runs nnU-Net's own
predictor.
"""

from __future__ import annotations

import importlib
from typing import Any

# Resolved on first use, because a network class named in plans.json imports this package as well.
_PUBLIC = {
    "ModelFolder": "folder",
    "read_model_folder": "folder",
    "Manifest": "manifest",
    "read_manifest": "manifest",
    "compress_folder": "compress",
    "compress_tree": "compress",
    "PredictionSummary": "predict",
    "predict_folder": "predict",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
