"""What a fine-tuning came to: how far from the dense model a network is, on patches as prediction sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tucker_ops.fused import fuse
from tucker_ops.nnunet.patches import random_patch
from tucker_ops.nnunet.training.distillation import distillation_loss

PATCHES = 4


class DistanceToDense:
    """KL(dense ‖ network), mean over voxels in nats, on the same few patches whenever it is asked.

    Args:
        dense: the teacher, of which only the output is used.
        folder: nnU-Net's preprocessed cases, and `cases` the names of those to draw from.
        size: extents of the patches, those of prediction. Training's own may be smaller, and are augmented: a network
            may come nearer there and drift away here.
        regions: whether the outputs overlap (sigmoid) or exclude each other (softmax).

    Networks run on the CPU in float32, fused; they are put into evaluation mode, without gradients.
    """

    def __init__(
        self, dense: nn.Module, folder: Path, cases: Sequence[str], size: Sequence[int], *, regions: bool
    ):
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        generator = torch.Generator().manual_seed(0)
        data = infer_dataset_class(str(folder))(str(folder), identifiers=list(cases))
        self._patches: list[Tensor] = []
        for number in range(PATCHES):
            name = cases[number * len(cases) // PATCHES]
            volume = torch.from_numpy(np.ascontiguousarray(data.load_case(name)[0][:])).float()
            self._patches.append(random_patch(volume, size, generator)[None])
        self._regions = regions
        self._taught = self._outputs(dense)

    def of(self, network: nn.Module) -> float:
        """The distance of `network`."""
        pairs = zip(self._outputs(network), self._taught, strict=True)
        losses = [distillation_loss(a, b, temperature=1.0, regions=self._regions) for a, b in pairs]
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> list[Tensor]:
        fused = fuse(network.float().eval().requires_grad_(False), precision="fp32")
        return [fused(patch) for patch in self._patches]
