"""In what training on a CPU multiplies."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def processor_multiplies_bf16() -> bool:
    """Does this CPU have instructions that multiply bfloat16? Elsewhere oneDNN emulates them, at a multiple of fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
