"""What a compressed network learns from the dense one: its probabilities, and its encoder's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tucker_ops.convert.divergence import distance

EPS = 1e-5


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float, regions: bool) -> Tensor:
    """KL(teacher ‖ student) per voxel, times temperature² so that gradients keep their size (Hinton et al. 2015).

    Both are logits [N, K, *spatial]; a softmax over K, or with `regions` a sigmoid for each of K.
    """
    likelihood = "sigmoid" if regions else "softmax"
    softened = (logits.float() / temperature for logits in (student, teacher))
    return distance(*softened, likelihood=likelihood) * temperature**2


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared distance of features [N, C, *spatial], each channel in units of the teacher's deviation."""
    losses = []
    for s, t in zip(student, teacher, strict=True):
        spatial = tuple(range(2, t.ndim))
        variance = t.float().var(spatial, keepdim=True, unbiased=False)
        losses.append(((s.float() - t.float()).square() / (variance + EPS)).mean())
    return torch.stack(losses).mean()


@contextmanager
def encoder_features(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that each forward pass fills with the outputs of the encoder's stages."""
    features: list[Tensor] = []

    def keep(module, args, output):
        features.append(output)

    handles = [stage.register_forward_hook(keep) for stage in network.encoder.stages]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
