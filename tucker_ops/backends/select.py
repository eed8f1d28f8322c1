"""Chooses the backend of each call and registers the public op's implementation.

Automatic choice takes the first backend in `ORDER` that is available, supports the problem, and
measures no slower than the reference on that kind of problem. A backend asked for by name runs or
raises with the reason. Nothing is tuned or timed here, so tracing and capturing are safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tucker_ops.backends.base import Backend, Verdict
from tucker_ops.backends.cpu import CPU
from tucker_ops.backends.cuda import CUDA, MOST_SOURCES
from tucker_ops.backends.reference import REFERENCE
from tucker_ops.errors import BackendError
from tucker_ops.ops.block import block_memory_format, block_problem_of, split_call
from tucker_ops.ops.check import problem_of
from tucker_ops.ops.merge import check_merge
from tucker_ops.ops.norm import check_norm, norm_affine
from tucker_ops.ops.reference import merge
from tucker_ops.ops.schema import LIBRARY
from tucker_ops.types import BlockProblem, Problem

ORDER: tuple[Backend, ...] = (CUDA, CPU, REFERENCE)


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem and how, and what each of the others said."""

    problem: Problem
    chosen: str
    how: str
    verdicts: dict[str, Verdict]

    def __str__(self) -> str:
        lines = [f"{self.chosen} runs {describe(self.problem)}: {self.how}"]
        for name, verdict in self.verdicts.items():
            lines.append(f"  {name:<10} {'yes' if verdict.ok else 'no ':<4} {verdict.reason}")
        return "\n".join(lines)


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
    return Explanation(problem, chosen.name, chosen.describe(problem), verdicts)


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


def block_kernels(device: str, dtype: torch.dtype) -> Verdict:
    """Does a kernel, unasked, compute blocks of this dtype on this kind of device? With the reason."""
    problem = BlockProblem(
        batch=1, channels=(1,), factors=((1, 1),), rank_in=1, rank_out=1, out_channels=1, input_size=(1, 1),
        kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), dtype=dtype, device=device,
        rows=(1,), expanded=False, u_out=True, stats="none",
    )  # fmt: skip
    verdicts = {b.name: _verdict(b, problem) for b in ORDER if b is not REFERENCE}
    for name, verdict in verdicts.items():
        if verdict:
            return Verdict(True, f"blocks run on {name}")
    return Verdict(False, "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items()))


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
    if same and few and block_kernels(values[0].device.type, values[0].dtype):
        scale, shift = ([None if t is None else t.contiguous() for t in given] for given in (scale, shift))
        kernel = torch.ops.tucker_ops._tucker_merge_cuda if on_gpu else torch.ops.tucker_ops._tucker_merge_cpu
        return kernel(values, scale, shift, slope, out_slope)
    return merge(values, scale, shift, slope, out_slope).contiguous(memory_format=last)


LIBRARY.impl("tucker_merge", _tucker_merge, "CompositeExplicitAutograd")


def _norm_affine(mean, m2, weight, bias, count, eps):
    check_norm(mean, m2, weight, bias, count)
    if mean.is_cuda and mean.dtype == torch.float32 and block_kernels("cuda", torch.float16):
        mean, m2, weight, bias = (None if t is None else t.contiguous() for t in (mean, m2, weight, bias))
        return torch.ops.tucker_ops._norm_affine_cuda(mean, m2, weight, bias, count, eps)
    return norm_affine(mean, m2, weight, bias, count, eps)


LIBRARY.impl("norm_affine", _norm_affine, "CompositeExplicitAutograd")
