"""How much a change of a kernel matters to a network's output: the metric that data-aware decomposition works in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.errors import ConfigError, ShapeError

# Share of the mean eigenvalue added to every eigenvalue: directions that the calibration data never touched stay
# worth something. From 1e-4 to 1e-2 the hippocampus model's Dice moved by less than 2e-4.
DAMPING = 1e-3


@dataclass(frozen=True)
class Weighting:
    """Kronecker-factored Fisher information of one kernel.

    ``input`` [C_in, C_in], ``output`` [C_out, C_out] and ``taps`` [taps, taps] are E[Σ g gᵀ] over the two other modes
    of the gradient g [C_out, C_in, taps] of the log-likelihood by the kernel, float64; ``energy`` is E||g||², the
    trace of each. To second order a change ΔW costs
    KL(before ‖ after) ≈ ½ E⟨g, ΔW⟩² ≈ ½ ||ΔW ×₁ output^½ ×₂ input^½ ×₃ taps^½||² / energy² nats.
    Images are smooth, so the gradients of neighbouring taps point the same way: the third factor is what tells
    a change that cancels between taps from one that adds up.

    The factors are those of Shampoo for tensors (Gupta, Koren, Singer 2018), of the true Fisher instead of the
    empirical one; why their product approximates it: Morwani et al. 2024. Raises ShapeError and ConfigError for
    matrices that are not square, finite and of the same trace.
    """

    input: Tensor
    output: Tensor
    taps: Tensor
    energy: float

    def __post_init__(self):
        for name in ("input", "output", "taps"):
            matrix = getattr(self, name)
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ShapeError(f"{name} of a weighting must be square, got shape {tuple(matrix.shape)}")
            if not torch.isfinite(matrix).all():
                raise ConfigError(f"{name} of a weighting holds NaN or infinite values; calibrate again")
            trace = float(matrix.trace())
            if abs(trace - self.energy) > 1e-6 * abs(self.energy):
                raise ConfigError(
                    f"{name} of a weighting has the trace {trace:g}, not its energy {self.energy:g}"
                )

    def roots(self) -> Roots:
        """Square roots of the damped factors, and their inverses.

        A kernel that the output does not depend on (energy 0) is weighted evenly.
        """
        output, input, taps = (_root(matrix) for matrix in (self.output, self.input, self.taps))
        return Roots(output, input, taps, 0.5 / self.energy**2 if self.energy else 0.0)


@dataclass(frozen=True)
class Roots:
    """The square root of each factor and its inverse, and nats per unit of the squared norm of a weighted kernel."""

    output: tuple[Tensor, Tensor]
    input: tuple[Tensor, Tensor]
    taps: tuple[Tensor, Tensor]
    nats: float

    def weighted(self, kernel: Tensor) -> Tensor:
        """W ×₁ output^½ ×₂ input^½ ×₃ taps^½ of a kernel W [C_out, C_in, taps]."""
        return torch.einsum("op,pik,ij,kl->ojl", self.output[0], kernel, self.input[0], self.taps[0])

    def unweighted(
        self, core: Tensor, u_out: Tensor, u_in: Tensor, u_taps: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """(core, u_out, u_in) of W from those of the weighted kernel, all factors orthonormal again; u_taps likewise.

        core [R_out, R_in, taps], or [R_out, R_in, R_taps] with u_taps [taps, R_taps]; u_out [C_out, R_out],
        u_in [C_in, R_in]. What is not orthonormal in the factors goes into the core: roots that are nearly singular
        would make entries that half precision cannot hold.
        """
        u_out, remainder_out = torch.linalg.qr(self.output[1] @ u_out)
        u_in, remainder_in = torch.linalg.qr(self.input[1] @ u_in)
        if u_taps is None:
            remainder_taps, bases = self.taps[1], (u_out, u_in)
        else:
            u_taps, remainder_taps = torch.linalg.qr(self.taps[1] @ u_taps)
            bases = (u_out, u_in, u_taps)
        core = torch.einsum("ro,oik,si,lk->rsl", remainder_out, core, remainder_in, remainder_taps)
        return core, *bases


def weighted_kernel(kernel: Tensor, weighting: Weighting | None) -> tuple[Tensor, Roots | None]:
    """The kernel [C_out, C_in, taps] in the metric of `weighting`, and the way back; unchanged without one.

    Raises ShapeError where the weighting is for other numbers of channels.
    """
    if weighting is None:
        return kernel, None
    given = tuple(len(matrix) for matrix in (weighting.output, weighting.input, weighting.taps))
    if given != tuple(kernel.shape):
        raise ShapeError(
            f"the weighting is for (C_out, C_in, taps) = {given}, the kernel has {tuple(kernel.shape)}; calibrate the "
            "model that is decomposed"
        )
    roots = weighting.roots()
    return roots.weighted(kernel), roots


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    size = len(matrix)
    mean = matrix.trace() / size
    if mean == 0:
        return (torch.eye(size, dtype=matrix.dtype),) * 2
    values, vectors = torch.linalg.eigh(matrix)
    root = (values.clamp(min=0) + DAMPING * mean).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
