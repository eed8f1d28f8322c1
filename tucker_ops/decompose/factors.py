"""Tucker over the two channel modes, and over the taps where asked: HOSVD start, then HOOI, by tensorly."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from tucker_ops.decompose.kernel import as_out_in_taps
from tucker_ops.decompose.weighting import Weighting, weighted_kernel
from tucker_ops.errors import ConfigError, RankError
from tucker_ops.types import Ranks


@dataclass(frozen=True)
class TuckerFactors:
    """A kernel as u_out · core · u_in, in the dtype and on the device of the kernel it came from.

    u_in [R_in, C_in] and u_out [C_out, R_out] are orthonormal (before rounding to the dtype); core is
    [R_out, R_in, *kernel], or [R_in, R_out, *kernel] if ``transposed``. With a rank of the taps the core's last axis
    is R_taps, and u_taps [R_taps, taps], orthonormal too, makes taps of it, of ``kernel_size``. ``relative_error`` is
    ||W - Ŵ|| / ||W|| (Frobenius, float64) of these very factors, rounding included; 0 for an all-zero kernel.
    """

    u_in: Tensor
    core: Tensor
    u_out: Tensor
    relative_error: float
    transposed: bool = False
    u_taps: Tensor | None = None
    kernel_size: tuple[int, ...] = ()

    @property
    def ranks(self) -> Ranks:
        """(R_in, R_out), or (R_in, R_out, R_taps)."""
        pair = self.u_in.shape[0], self.u_out.shape[1]
        return pair if self.u_taps is None else (*pair, self.u_taps.shape[0])

    def dense(self) -> Tensor:
        """The kernel Ŵ these factors stand for: shape of the original, float64."""
        formula = "ro,rs...,si->oi..."
        core = self.core.double()
        if self.u_taps is not None:
            core = (core @ self.u_taps.double()).reshape(*core.shape[:2], *self.kernel_size)
        if self.transposed:
            formula, core = "ro,rs...,si->io...", core.transpose(0, 1)
        return torch.einsum(formula, self.u_out.double().T, core, self.u_in.double())


def decompose(
    weight: Tensor,
    ranks: Ranks,
    *,
    transposed: bool = False,
    weighting: Weighting | None = None,
    n_iter_max: int = 30,
    tol: float = 1e-4,
) -> TuckerFactors:
    """Tucker-2 of a convolution kernel over its channel modes, or over its taps too, in float64 on the CPU.

    Starts from the truncated HOSVD and iterates HOOI (De Lathauwer, De Moor, Vandewalle 2000, as in
    tensorly's `partial_tucker`) until the relative error changes by less than `tol`, or `n_iter_max` times.

    Args:
        weight: [C_out, C_in, *kernel] as in torch.nn.ConvNd, or [C_in, C_out, *kernel] if `transposed`;
            float16, bfloat16, float32 or float64, any device.
        ranks: (R_in, R_out), each between 1 and its number of channels, or (R_in, R_out, R_taps), R_taps between 1 and
            the number of taps.
        weighting: minimise W - Ŵ in its metric instead of ||W - Ŵ||; the reported error stays the latter.

    Raises RankError, ShapeError, DtypeError or ConfigError for arguments out of range, ConversionError for a
    kernel with NaN or infinity in it.
    """
    kernel, roots = weighted_kernel(as_out_in_taps(weight, transposed), weighting)
    rank_in, rank_out, *rank_taps = _checked(ranks, (kernel.shape[1], kernel.shape[0], kernel.shape[2]))
    if n_iter_max < 1 or not tol >= 0:
        raise ConfigError(f"n_iter_max must be at least 1 and tol at least 0, got {n_iter_max} and {tol}")
    scale = float(kernel.abs().max())
    if scale == 0:
        wanted = (rank_out, rank_in, *rank_taps)
        bases = [torch.eye(n, r) for n, r in zip(kernel.shape, wanted, strict=False)]
        core = torch.zeros(*wanted, *kernel.shape[len(wanted) :])
    else:
        # Brought to unit size, because squares of values near 1e-170 vanish even in float64.
        core, *bases = _hooi((kernel / scale).numpy(), (rank_out, rank_in, *rank_taps), n_iter_max, tol)
        core = core * scale
        if roots is not None:
            core, *bases = roots.unweighted(core, *bases)
    u_out, u_in, *u_taps = bases
    core = core.transpose(0, 1) if transposed else core
    like = {"device": weight.device, "dtype": weight.dtype}
    factors = TuckerFactors(
        u_in=u_in.T.contiguous().to(**like),
        core=core.reshape(*core.shape[:2], *(rank_taps or weight.shape[2:])).contiguous().to(**like),
        u_out=u_out.contiguous().to(**like),
        relative_error=0.0,
        transposed=transposed,
        u_taps=u_taps[0].T.contiguous().to(**like) if u_taps else None,
        kernel_size=tuple(weight.shape[2:]),
    )
    if scale == 0:
        return factors
    scale = float(weight.detach().abs().max())
    original = weight.detach().double() / scale
    error = torch.linalg.vector_norm(original - factors.dense() / scale) / torch.linalg.vector_norm(original)
    return replace(factors, relative_error=float(error))


def _checked(ranks: Sequence[int], sizes: tuple[int, int, int]) -> tuple[int, ...]:
    try:
        valid = len(ranks) in (2, 3) and all(
            int(r) == r and 1 <= r <= n for r, n in zip(ranks, sizes, strict=False)
        )
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise RankError(
            f"ranks (R_in, R_out) = {ranks!r} must be two integers between 1 and the channels (C_in, C_out) = "
            f"{sizes[:2]}, or three, the last, R_taps, between 1 and the {sizes[2]} taps"
        )
    return tuple(int(r) for r in ranks)


def _hooi(kernel: np.ndarray, ranks: tuple[int, ...], n_iter_max: int, tol: float) -> list[Tensor]:
    """The core and the factors [size, rank] of the leading modes, one for each of `ranks`."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    with warnings.catch_warnings(), tensorly.backend_context(_gram_backend(), local_threadsafe=True):
        # A rank above R_other * taps spans more than the kernel has; tensorly says so and pads orthonormally.
        warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
        (core, factors), _ = partial_tucker(
            kernel,
            ranks,
            modes=list(range(len(ranks))),
            init="svd",
            n_iter_max=n_iter_max,
            tol=tol,
            random_state=0,
        )
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in (core, *factors)]


@cache
def _gram_backend():
    """tensorly's numpy backend with the SVD of wide matrices taken from their Gram matrix.

    An unfolded kernel has tens of times more columns than rows, and only its left singular vectors are
    wanted: eigenvectors of the Gram matrix cost a sixth of the time. They are orthonormal to machine
    precision; what is lost, the order of singular values below 1e-8 of the largest, is below any error here.
    """
    from tensorly.backend.numpy_backend import NumpyBackend

    class GramBackend(NumpyBackend, backend_name="tucker_ops_gram"):
        @staticmethod
        def svd(matrix, full_matrices=True):
            if matrix.shape[0] >= matrix.shape[1] or full_matrices:
                return np.linalg.svd(matrix, full_matrices=full_matrices)
            energy, u = np.linalg.eigh(matrix @ matrix.T)
            # HOOI never looks at the right singular vectors, and they would cost as much as the rest.
            unused = np.empty((matrix.shape[0], 0))
            return u[:, ::-1], np.sqrt(np.clip(energy[::-1], 0, None)), unused

    return GramBackend()
