"""Conversion of any torch module: choose ranks (plan), substitute (apply), or both (compress)."""

from tucker_ops.convert.apply import apply, apply_with_report, check_runs, compress, substitute
from tucker_ops.convert.calibrate import Calibration, calibrate
from tucker_ops.convert.config import CompressionConfig
from tucker_ops.convert.plan import LayerPlan, Plan, plan
from tucker_ops.convert.refine import Refined, refine

__all__ = [
    "Calibration",
    "CompressionConfig",
    "LayerPlan",
    "Plan",
    "Refined",
    "apply",
    "apply_with_report",
    "calibrate",
    "check_runs",
    "compress",
    "plan",
    "refine",
    "substitute",
]
