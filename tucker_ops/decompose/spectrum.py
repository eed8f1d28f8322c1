"""The truncation error of a kernel at all ranks, from one full HOSVD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.decompose.kernel import as_out_in_taps
from tucker_ops.decompose.weighting import Weighting, weighted_kernel
from tucker_ops.errors import RankError
from tucker_ops.types import Ranks


@dataclass(frozen=True)
class Spectrum:
    """Energy (squared core entries) of a kernel's full HOSVD.

    ``energy`` is [C_in, C_out, taps], float64, each mode in order of falling singular value. Truncation at
    (R_in, R_out), or (R_in, R_out, R_taps), keeps the leading block, and because all factors are orthonormal the
    squared error is exactly the energy outside of it. HOOI only improves on that. Of a weighted kernel all errors are
    those in the weighted norm, and ``nats`` is what losing the whole kernel would cost (see `Weighting`); else None.
    ``taps_summed``: the last axis is one long, the sum over the taps, of which no rank can then be judged.
    """

    energy: Tensor
    nats: float | None = None
    taps_summed: bool = False

    def without_taps(self) -> Spectrum:
        """The same of the channels alone, which is as many times smaller as a kernel has taps."""
        return Spectrum(self.energy.sum(-1, keepdim=True), self.nats, taps_summed=True)

    def share_kept(self) -> tuple[Tensor, Tensor]:
        """Cumulative share of the squared singular values per mode: ([C_in], [C_out]), rising to 1."""
        return tuple(_share(self.energy.sum(dim)) for dim in ((1, 2), (0, 2)))

    def squared_errors(self) -> Tensor:
        """||W - Ŵ||² / ||W||² of the truncated HOSVD at (R_in, R_out, R_taps), [C_in, C_out, taps].

        Ranks stand in the entry one less; those with all taps in the last.
        """
        total = self.energy.sum()
        if total == 0:
            return torch.zeros_like(self.energy)
        lost = 1 - self.energy.cumsum(0).cumsum(1).cumsum(2) / total
        return lost.clamp_(0, 1)

    def relative_error(self, ranks: Ranks) -> float:
        """||W - Ŵ|| / ||W|| of the truncated HOSVD at ranks (R_in, R_out) or (R_in, R_out, R_taps)."""
        rank_in, rank_out, *rank_taps = ranks
        if rank_taps and self.taps_summed:
            raise RankError(
                f"ranks {ranks} name one of the taps, which this spectrum has summed; use spectrum()'s"
            )
        total = float(self.energy.sum())
        if total == 0:
            return 0.0
        # Summed over what is dropped, which stays exact where 1 - kept would cancel.
        lost = self.energy[rank_in:].sum() + self.energy[:rank_in, rank_out:].sum()
        for rank in rank_taps:
            lost = lost + self.energy[:rank_in, :rank_out, rank:].sum()
        lost = float(lost)
        return (lost / total) ** 0.5


def spectrum(weight: Tensor, *, transposed: bool = False, weighting: Weighting | None = None) -> Spectrum:
    """Spectrum of a kernel [C_out, C_in, *kernel], or [C_in, C_out, *kernel] if `transposed`.

    Raises as `decompose` does for weights that cannot be decomposed, or a weighting of other channels.
    """
    kernel, roots = weighted_kernel(as_out_in_taps(weight, transposed), weighting)
    nats = None if roots is None else float(roots.nats * kernel.square().sum())
    scale = kernel.abs().max()
    if scale > 0:
        kernel = kernel / scale
    u_out = _left_singular_vectors(kernel.flatten(1))
    u_in = _left_singular_vectors(kernel.transpose(0, 1).flatten(1))
    core = torch.einsum("oik,ir->rok", kernel, u_in)
    core = torch.einsum("rok,os->rsk", core, u_out)
    # Turning the channels leaves the Gram matrix of the taps as it was, so the turned core gives their vectors too.
    core = core @ _left_singular_vectors(core.flatten(0, 1).T)
    return Spectrum(core.square_(), nats)


def _left_singular_vectors(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)


def _share(energy: Tensor) -> Tensor:
    total = energy.sum()
    if total == 0:
        return torch.ones_like(energy)
    return (energy.cumsum(0) / total).clamp_(max=1)
