"""What a backend is: a name, predicates that give their reason, and functions that run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tucker_ops.types import BlockProblem, Problem


@dataclass(frozen=True)
class Verdict:
    """A yes or a no, with the reason in words a user can act on."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Derivative:
    """How a backend computes the gradient of `tucker_conv`; called only where the backend is available.

    supports, prefers: as the backend's own, asked about the forward's problem. run: `three_convs_backward` with
    geometry as one integer per axis; t and z may be None. stages: `three_stages`, t and z channels-last.
    """

    supports: Callable[[Problem], Verdict]
    prefers: Callable[[Problem], Verdict]
    run: Callable[..., tuple[Tensor | None, ...]]
    stages: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Backend:
    """One way to compute `tucker_conv` and `tucker_block`.

    device: the kind of device whose tensors it takes, "cpu" or "cuda", or None for any; the others are not asked about
    tensors elsewhere. available: can it run on this machine at all? supports: can it run this problem? prefers: does it
    measure at least as fast as the reference on this kind of problem? run: computes it; called only
    where available and supports say yes, with geometry as one integer per axis. describe: how `run` would go
    about a problem it supports, for `explain`. supports_block and run_block: the same for `tucker_block`. derivative:
    None where it computes no gradients.
    """

    name: str
    device: str | None
    available: Callable[[], Verdict]
    supports: Callable[[Problem], Verdict]
    prefers: Callable[[Problem | BlockProblem], Verdict]
    run: Callable[..., Tensor]
    describe: Callable[[Problem], str]
    supports_block: Callable[[BlockProblem], Verdict]
    run_block: Callable[..., tuple[Tensor, Tensor, Tensor]]
    derivative: Derivative | None = None

    def can_run(self, problem: Problem | BlockProblem) -> Verdict:
        """`supports` (of a block `supports_block`) on a machine where the backend is available; else why it is not."""
        if self.device not in (None, problem.device):
            return Verdict(False, f"tensors are on {problem.device}; this backend computes on {self.device}")
        supports = self.supports_block if isinstance(problem, BlockProblem) else self.supports
        return self.available() and supports(problem)

    def can_derive(self, problem: Problem) -> Verdict:
        """As `can_run`, for the gradient."""
        if self.derivative is None:
            return Verdict(False, "computes no gradients")
        if self.device not in (None, problem.device):
            return Verdict(False, f"tensors are on {problem.device}; this backend computes on {self.device}")
        return self.available() and self.derivative.supports(problem)
