"""What a fine-tuning came to: how far from the dense model networks are, on patches as prediction sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tucker_ops.fused import fuse
from tucker_ops.nnunet.patches import random_patch
from tucker_ops.nnunet.training.distillation import distillation_loss

PATCHES = 4


@torch.no_grad()
def distances_to_dense(
    dense: nn.Module,
    networks: Sequence[nn.Module],
    folder: Path,
    cases: Sequence[str],
    size: Sequence[int],
    *,
    regions: bool,
) -> tuple[float, ...]:
    """KL(dense ‖ network) of each of `networks`, mean over voxels in nats, on the same few patches every time.

    Networks run on the CPU in float32, fused; one patch after the other, as outputs of many classes are large.

    Args:
        folder: nnU-Net's preprocessed cases, and `cases` the names of those to draw from.
        size: extents of the patches, those of prediction. Training's own may be smaller, and are augmented: a network
            may come nearer there and drift away here.
        regions: whether the outputs overlap (sigmoid) or exclude each other (softmax).
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    dense, *others = (
        fuse(network.float().eval().requires_grad_(False), precision="fp32") for network in (dense, *networks)
    )
    generator = torch.Generator().manual_seed(0)
    data = infer_dataset_class(str(folder))(str(folder), identifiers=list(cases))
    sums = [0.0] * len(others)
    for number in range(PATCHES):
        name = cases[number * len(cases) // PATCHES]
        volume = torch.from_numpy(np.ascontiguousarray(data.load_case(name)[0][:])).float()
        patch = random_patch(volume, size, generator)[None]
        taught = dense(patch)
        for index, network in enumerate(others):
            sums[index] += float(distillation_loss(network(patch), taught, temperature=1.0, regions=regions))
    return tuple(total / PATCHES for total in sums)
