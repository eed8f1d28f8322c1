"""Tucker-compressed convolutions for 2D and 3D networks: one op, a converter, and nnU-Net around it."""

from __future__ import annotations

import importlib

from tucker_ops.backends.select import backends
from tucker_ops.decompose import TuckerFactors, decompose
from tucker_ops.functional import explain, tucker_conv

__version__ = "0.1.0"

# `backends` and `decompose` are functions here and packages below: imported now, so that the functions win.
# The rest is imported at first use, so that `import tucker_ops` needs torch alone and stays quick.
_LAZY = {
    "nn": ("tucker_ops.nn", None),
    "Calibration": ("tucker_ops.convert", "Calibration"),
    "CompressionConfig": ("tucker_ops.convert", "CompressionConfig"),
    "Plan": ("tucker_ops.convert", "Plan"),
    "plan": ("tucker_ops.convert", "plan"),
    "calibrate": ("tucker_ops.convert", "calibrate"),
    "refine": ("tucker_ops.convert", "refine"),
    "apply": ("tucker_ops.convert", "apply"),
    "compress": ("tucker_ops.convert", "compress"),
    "fuse": ("tucker_ops.fused", "fuse"),
}

__all__ = ["TuckerFactors", "__version__", "backends", "decompose", "explain", "tucker_conv", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
