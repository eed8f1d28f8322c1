"""nnU-Net's predictor with the sum over tiles in float32, which the CPU adds ten times faster than float16."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor

# Of the memory that is free, what sums over tiles may take; where they take more, nnU-Net's float16 is left alone.
LARGEST_SHARE = 0.25


class Predictor(nnUNetPredictor):
    """Overrides the loop over tiles, on the CPU only. Tiles, weights and mirroring are nnU-Net's own."""

    @torch.inference_mode()
    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple], do_on_device: bool = True
    ) -> Tensor:
        """Logits [outputs, *spatial] in float32: the mean over tiles, weighted by nnU-Net's gaussian."""
        shape = (self.label_manager.num_segmentation_heads, *data.shape[1:])
        if self.device.type != "cpu" or not _fits(shape):
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        gaussian = torch.ones(())
        if self.use_gaussian:
            patch = tuple(self.configuration_manager.patch_size)
            gaussian = compute_gaussian(
                patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=self.device
            ).float()
        logits, weights = torch.zeros(shape), torch.zeros(shape[1:])
        for tile in slicers:
            prediction = self._internal_maybe_mirror_and_predict(data[tile][None].contiguous())[0]
            logits[tile].addcmul_(prediction.float(), gaussian)
            weights[tile[1:]] += gaussian
        logits /= weights
        if torch.isinf(logits).any():
            # As nnU-Net does, in its words: some callers look for them.
            raise RuntimeError("Encountered inf in predicted array. Aborting...")
        return logits


def _fits(shape: Sequence[int]) -> bool:
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return True
    return 4 * math.prod(shape) <= LARGEST_SHARE * free
