"""How far one network's output is from another's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tucker_ops.errors import ShapeError

# Bytes of logits in a slab: those of a whole CT patch, and what is computed from them, go to memory and back each time.
SLAB = 2**20


def distance(student: Tensor, teacher: Tensor, *, likelihood: str = "softmax") -> Tensor:
    """KL(teacher ‖ student) in nats, mean over voxels, of logits [N, K, *spatial]; computed in float32.

    A softmax over K classes that exclude each other, or ("sigmoid") K independent ones, whose divergences add up. On
    the CPU it is computed slab by slab, and the gradient of `student` with it, unless `teacher` wants one too. Raises
    ShapeError where the two differ in shape.
    """
    if student.shape != teacher.shape:
        raise ShapeError(
            f"logits to compare are {tuple(student.shape)} and {tuple(teacher.shape)}, not of one shape"
        )
    if student.device.type == "cpu" and not teacher.requires_grad and not torch.compiler.is_compiling():
        return _OnSlabs.apply(student, teacher, likelihood)
    divergence = _sigmoid if likelihood == "sigmoid" else _softmax
    return divergence(student.float(), teacher.float()).sum() / _voxels(student)


def _softmax(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)


def _sigmoid(student: Tensor, teacher: Tensor) -> Tensor:
    probability = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, probability, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(teacher, probability, reduction="none")


def _voxels(logits: Tensor) -> int:
    return logits[:, :1].numel()


class _OnSlabs(torch.autograd.Function):
    """The gradient by the student's logits is its probabilities less the teacher's, ÷ voxels, for either likelihood."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, likelihood: str) -> Tensor:
        rows = max(1, SLAB // max(1, 4 * student[:, :, :1].numel()))
        needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student, dtype=torch.float32) if needed else None
        total = 0.0
        for start in range(0, student.shape[2], rows):
            count = min(rows, student.shape[2] - start)
            s, t = (logits.narrow(2, start, count).float() for logits in (student, teacher))
            if likelihood == "sigmoid":
                probability, taught = s.sigmoid(), t.sigmoid()
                divergence = _sigmoid(s, t)
            else:
                s, t = s.log_softmax(1), t.log_softmax(1)
                probability, taught = s.exp(), t.exp()
                divergence = t.sub_(s).mul_(taught)
            total += float(divergence.sum())
            if needed:
                torch.sub(probability, taught, out=gradient.narrow(2, start, count))
        if needed:
            ctx.save_for_backward(gradient)
            ctx.dtype = student.dtype
        return student.new_tensor(total / _voxels(student), dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * (upstream / _voxels(gradient))).to(ctx.dtype), None, None
