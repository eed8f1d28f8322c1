"""Chooses the backend of each call and registers the public op's implementation.

Automatic choice takes the first backend in `ORDER` that is available, supports the problem, and
measures no slower than the reference on that kind of problem. A backend asked for by name runs or
raises with the reason. Nothing is tuned or timed here, so tracing and capturing are safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.backends import cpu_derivative, native
from tucker_ops.backends.base import Backend, Verdict
from tucker_ops.backends.cpu import CPU
from tucker_ops.backends.cuda import CUDA, MOST_SOURCES
from tucker_ops.backends.reference import REFERENCE
from tucker_ops.backends.triton import TRITON
from tucker_ops.errors import BackendError
from tucker_ops.ops import norm_act
from tucker_ops.ops.block import block_memory_format, block_problem_of, split_call
from tucker_ops.ops.check import problem_of
from tucker_ops.ops.gradient import gradient_problem_of
from tucker_ops.ops.merge import check_merge
from tucker_ops.ops.norm import check_norm, norm_affine
from tucker_ops.ops.reference import memory_format, merge
from tucker_ops.ops.schema import LIBRARY
from tucker_ops.types import BlockProblem, Problem

ORDER: tuple[Backend, ...] = (CUDA, TRITON, CPU, REFERENCE)


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem and how, which computes its gradient, and what each of the others said."""

    problem: Problem
    chosen: str
    how: str
    verdicts: dict[str, Verdict]
    gradient: str
    gradient_verdicts: dict[str, Verdict]

    def __str__(self) -> str:
        lines = [f"{self.chosen} runs {describe(self.problem)}: {self.how}"]
        lines += _reasons(self.verdicts)
        lines.append(f"{self.gradient} computes its gradient")
        lines += _reasons(self.gradient_verdicts)
        return "\n".join(lines)


def _reasons(verdicts: dict[str, Verdict]) -> list[str]:
    return [f"  {name:<10} {'yes' if v.ok else 'no ':<4} {v.reason}" for name, v in verdicts.items()]


@dataclass(frozen=True)
class BackendTable:
    """Every backend, whether it can run on this machine, and why not."""

    rows: tuple[tuple[str, bool, str], ...]

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, name: str) -> Verdict:
        for row, ok, reason in self.rows:
            if row == name:
                return Verdict(ok, reason)
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [f"{'backend':<10} {'available':<10} why"]
        lines += [f"{name:<10} {'yes' if ok else 'no':<10} {reason}" for name, ok, reason in self.rows]
        return "\n".join(lines)

    __repr__ = __str__


def backends() -> BackendTable:
    """The backends of this installation: name, available here or not, and the reason."""
    verdicts = [(backend.name, backend.available()) for backend in ORDER]
    return BackendTable(tuple((name, verdict.ok, verdict.reason) for name, verdict in verdicts))


def describe(problem: Problem) -> str:
    """One line that names a problem."""

    def extents(values):
        return "×".join(str(v) for v in values)

    return (
        f"tucker_conv {problem.in_channels}→{problem.out_channels} channels, ranks "
        f"({problem.rank_in}, {problem.rank_out}), kernel {extents(problem.kernel_size)}, stride "
        f"{extents(problem.stride)}, input {problem.batch}×{extents(problem.input_size)} "
        f"{str(problem.dtype).removeprefix('torch.')} {problem.layout} on {problem.device}"
    )


def explain_problem(problem: Problem, backend: str | None = None) -> Explanation:
    """What `choose` does with `problem`, and every backend's own words."""
    chosen = choose(problem, backend)
    verdicts = {}
    for candidate in ORDER:
        if backend is not None and candidate.name == backend:
            verdicts[candidate.name] = Verdict(True, "asked for by name")
        else:
            verdicts[candidate.name] = _verdict(candidate, problem)
    gradient_verdicts = {b.name: _derivative_verdict(b, problem) for b in ORDER}
    gradient = choose_derivative(problem, backend)
    if gradient.name == backend:
        gradient_verdicts[backend] = Verdict(True, "asked for by name")
    return Explanation(
        problem, chosen.name, chosen.describe(problem), verdicts, gradient.name, gradient_verdicts
    )


def choose(problem: Problem | BlockProblem, name: str | None = None) -> Backend:
    """The backend that runs `problem`: the named one, or the first that may and measures fast enough.

    Raises BackendError for an unknown name and for a named backend that cannot run the problem.
    """
    if name is None:
        return next(backend for backend in ORDER if _verdict(backend, problem))
    for backend in ORDER:
        if backend.name == name:
            verdict = backend.can_run(problem)
            if not verdict:
                what = "this block" if isinstance(problem, BlockProblem) else describe(problem)
                raise BackendError(
                    f"backend {name!r} cannot run {what}: {verdict.reason}; "
                    "leave backend unset to let tucker_ops choose"
                )
            return backend
    raise BackendError(f"unknown backend {name!r}; there are {[backend.name for backend in ORDER]}")


def choose_derivative(problem: Problem, name: str | None = None) -> Backend:
    """The backend that computes the gradient: the forward's where it was named and can, else as `choose`."""
    named = [backend for backend in ORDER if backend.name == name]
    if name is not None and not named:
        raise BackendError(f"unknown backend {name!r}; there are {[backend.name for backend in ORDER]}")
    if named and named[0].can_derive(problem):
        return named[0]
    return next(backend for backend in ORDER if _derivative_verdict(backend, problem))


def _derivative_verdict(backend: Backend, problem: Problem) -> Verdict:
    verdict = backend.can_derive(problem)
    return verdict and backend.derivative.prefers(problem)


def block_kernels(device: str, dtype: torch.dtype) -> Verdict:
    """Does a kernel, unasked, compute blocks of this dtype on this kind of device? With the reason."""
    verdicts = _block_verdicts(device, dtype)
    for name, verdict in verdicts.items():
        if verdict:
            return Verdict(True, f"blocks run on {name}")
    return Verdict(False, "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items()))


def _block_verdicts(device: str, dtype: torch.dtype) -> dict[str, Verdict]:
    problem = BlockProblem(
        batch=1, channels=(1,), factors=((1, 1),), rank_in=1, rank_out=1, out_channels=1, input_size=(1, 1),
        kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), dtype=dtype, device=device,
        rows=(1,), expanded=False, u_out=True, stats="none",
    )  # fmt: skip
    return {b.name: _verdict(b, problem) for b in ORDER if b is not REFERENCE}


def _compiled(device: str, dtype: torch.dtype) -> bool:
    """Do the compiled kernels, which alone have the small ops around blocks, run there unasked?"""
    name = "cuda" if device == "cuda" else "cpu"
    verdict = _block_verdicts(device, dtype).get(name)
    return verdict is not None and verdict.ok


def _verdict(backend: Backend, problem: Problem | BlockProblem) -> Verdict:
    return backend.can_run(problem) and backend.prefers(problem)


def _tucker_conv(
    input: Tensor,
    u_in: Tensor,
    core: Tensor,
    u_out: Tensor,
    bias: Tensor | None = None,
    stride=(1,),
    padding=(0,),
    dilation=(1,),
    *,
    backend: str | None = None,
) -> Tensor:
    problem = problem_of(input, u_in, core, u_out, bias, stride, padding, dilation)
    run = choose(problem, backend).run
    geometry = (list(problem.stride), list(problem.padding), list(problem.dilation))
    return run(input, u_in, core, u_out, bias, *geometry)


LIBRARY.impl("tucker_conv", _tucker_conv, "CompositeExplicitAutograd")


def _tucker_conv_stages(input, u_in, core, u_out, bias, stride, padding, dilation, *, backend=None):
    problem = problem_of(input, u_in, core, u_out, bias, stride, padding, dilation)
    geometry = (list(problem.stride), list(problem.padding), list(problem.dilation))
    stages = choose_derivative(problem, backend).derivative.stages
    with torch.autocast(problem.device, enabled=False):
        return stages(input, u_in, core, u_out, bias, *geometry)


LIBRARY.impl("tucker_conv_stages", _tucker_conv_stages, "CompositeExplicitAutograd")


def _tucker_conv_backward(
    grad, input, u_in, core, u_out, stride, padding, dilation, output_mask, t=None, z=None, *, backend=None
):
    problem = gradient_problem_of(
        grad, input, u_in, core, u_out, stride, padding, dilation, output_mask, t, z
    )
    geometry = (list(problem.stride), list(problem.padding), list(problem.dilation))
    run = choose_derivative(problem, backend).derivative.run
    # A loss may be differentiated under autocast; the gradient's own products are not to be cast.
    with torch.autocast(problem.device, enabled=False):
        grads = run(grad, input, u_in, core, u_out, *geometry, list(output_mask), t, z)
    layouts = (memory_format(input), *(torch.contiguous_format,) * 4)
    return tuple(
        g.contiguous(memory_format=layout) if wanted else input.new_empty(0)
        for g, wanted, layout in zip(grads, output_mask, layouts, strict=True)
    )


LIBRARY.impl("tucker_conv_backward", _tucker_conv_backward, "CompositeExplicitAutograd")


def _tucker_block(*args, backend=None):
    call, options = split_call(args)
    problem = block_problem_of(*call)
    geometry = (list(problem.stride), list(problem.padding), list(problem.dilation))
    return choose(problem, backend).run_block(*call[:8], *geometry, *call[11:], *options)


LIBRARY.impl("tucker_block", _tucker_block, "CompositeExplicitAutograd")


def _tucker_merge(values, scale, shift, slope, out_slope):
    check_merge(values, scale, shift, slope, out_slope)
    last = block_memory_format(values[0].dim() - 2, False)
    values = [value.contiguous(memory_format=last) for value in values]
    same = all(value.shape == values[0].shape for value in values)
    on_gpu = values[0].is_cuda
    few = not on_gpu or len(values) <= MOST_SOURCES
    if same and few and _compiled(values[0].device.type, values[0].dtype):
        scale, shift = ([None if t is None else t.contiguous() for t in given] for given in (scale, shift))
        kernel = torch.ops.tucker_ops._tucker_merge_cuda if on_gpu else torch.ops.tucker_ops._tucker_merge_cpu
        return kernel(values, scale, shift, slope, out_slope)
    return merge(values, scale, shift, slope, out_slope).contiguous(memory_format=last)


LIBRARY.impl("tucker_merge", _tucker_merge, "CompositeExplicitAutograd")


def _norm_affine(mean, m2, weight, bias, count, eps):
    check_norm(mean, m2, weight, bias, count)
    if mean.is_cuda and mean.dtype == torch.float32 and _compiled("cuda", torch.float16):
        mean, m2, weight, bias = (None if t is None else t.contiguous() for t in (mean, m2, weight, bias))
        return torch.ops.tucker_ops._norm_affine_cuda(mean, m2, weight, bias, count, eps)
    return norm_affine(mean, m2, weight, bias, count, eps)


LIBRARY.impl("norm_affine", _norm_affine, "CompositeExplicitAutograd")


def pointwise_kernels(input: Tensor) -> Verdict:
    """Do the compiled kernels compute products at every voxel of tensors like this? With the reason."""
    if input.device.type != "cpu":
        return Verdict(False, f"compiled for the CPU, and tensors are on {input.device.type}")
    if input.dtype not in (torch.float32, torch.bfloat16):
        return Verdict(False, f"computes float32 and bfloat16, not {str(input.dtype).removeprefix('torch.')}")
    return CPU.available()


def dense_kernels(input: Tensor, weight: Tensor, padding) -> Verdict:
    """Do the compiled kernels train a dense convolution at stride 1, with 3×3 taps in the plane? With the reason."""
    able = pointwise_kernels(input)
    if not able:
        return able
    if input.dtype == torch.bfloat16 and not native.multiplies_bfloat16():
        return Verdict(False, "has not been timed in bfloat16 on processors that do not multiply it")
    if cpu_derivative.dense_is_faster(input, weight, padding):
        return Verdict(True, "measures faster than torch's")
    return Verdict(False, "too few voxels: torch's measures faster")


def norm_act_kernels(input: Tensor) -> Verdict:
    """Do the compiled kernels train norm and activation of tensors like this? With the reason."""
    if memory_format(input) == torch.contiguous_format:
        return Verdict(False, "computes channels-last tensors; torch's own norm is as fast on others")
    return pointwise_kernels(input)


def _norm_act(input, weight, bias, eps, slope):
    norm_act.check_norm_act(input, weight, bias)
    if norm_act_kernels(input):
        weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
        return torch.ops.tucker_ops._norm_act_cpu(input, weight, bias, eps, slope)
    values, mean, rstd = norm_act.reference(input, weight, bias, eps, slope)
    return values.contiguous(memory_format=memory_format(input)), mean, rstd


LIBRARY.impl("norm_act", _norm_act, "CompositeExplicitAutograd")


def _norm_act_backward(grad, input, mean, rstd, weight, bias, eps, slope, output_mask):
    norm_act.check_norm_act(input, weight, bias)
    layout = memory_format(input)
    if norm_act_kernels(input):
        w, b = (None if t is None else t.float().contiguous() for t in (weight, bias))
        grads = torch.ops.tucker_ops._norm_act_backward_cpu(
            grad.contiguous(memory_format=layout), input, mean, rstd, w, b, slope, output_mask[0]
        )
    else:
        grads = norm_act.reference_backward(grad, input, weight, bias, eps, slope, output_mask)
    dtypes = [input.dtype, *(input.dtype if t is None else t.dtype for t in (weight, bias))]
    layouts = (layout, torch.contiguous_format, torch.contiguous_format)
    return tuple(
        g.to(dtype).contiguous(memory_format=to) if wanted else input.new_empty(0)
        for g, wanted, dtype, to in zip(grads, output_mask, dtypes, layouts, strict=True)
    )


LIBRARY.impl("norm_act_backward", _norm_act_backward, "CompositeExplicitAutograd")
