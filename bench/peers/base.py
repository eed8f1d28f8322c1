"""What a peer is, and the names that the harness knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.operands import Operands
from bench.problems import BenchProblem
from tucker_ops.cost import Cost, dense_cost, one_pass_cost, three_conv_cost

LAYOUTS = ("contiguous", "channels_last")
DENSE = "dense"
THREE_CONVS = "three_convs"
ONE_PASS = "one_pass"
OURS = "tucker_ops:"

Call = Callable[[], Tensor]


class PeerError(Exception):
    """A runtime does not run this layer; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One way to compute a problem in one layout.

    prepare makes, from operands, the call that is timed, or raises PeerError; unavailable says why there is none
    here. form is what is computed: DENSE, THREE_CONVS or ONE_PASS. automatic: tucker_ops takes this backend for this
    problem and layout where none is named. judged_by: whether a call would take too long is asked of this
    peer, which is quicker to prepare.
    """

    name: str
    layout: str
    prepare: Callable[[Operands], Call]
    unavailable: str | None = None
    automatic: bool = False
    form: str = ONE_PASS
    judged_by: Peer | None = None

    @property
    def key(self) -> str:
        return f"{self.name}-{self.layout}"

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    def cost(self, problem: BenchProblem) -> Cost:
        """By tucker_ops.cost: arithmetic without the halos that a kernel computes twice, least traffic of the form."""
        size = {"batch": problem.batch, "itemsize": problem.dtype.itemsize}
        if self.form == DENSE:
            return dense_cost(problem.spec, problem.size, **size)
        if self.form == THREE_CONVS:
            return three_conv_cost(problem.spec, problem.ranks, problem.size, **size)
        return one_pass_cost(problem.spec, problem.ranks, problem.size, **size)

    def floor_cost(self, problem: BenchProblem) -> Cost:
        """The cost that no implementation gets below: the dense layer's for DENSE, else that of one pass."""
        form = self.form if self.form == DENSE else ONE_PASS
        return Peer(self.name, self.layout, self.prepare, form=form).cost(problem)


def conv_of(problem: BenchProblem) -> Callable[..., Tensor]:
    return F.conv2d if problem.spec.ndim == 2 else F.conv3d


def laid_out(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    channels_last = torch.channels_last if tensors[0].dim() == 4 else torch.channels_last_3d
    memory_format = channels_last if layout == "channels_last" else torch.contiguous_format
    return tuple(tensor.contiguous(memory_format=memory_format) for tensor in tensors)


def pointwise(factor: Tensor, ndim: int) -> Tensor:
    """A factor [out, in] as the kernel of a convolution: [out, in, 1, …]."""
    return factor.reshape(*factor.shape, *(1,) * ndim)
