"""`cuda`: the one-pass and gather kernels in csrc/cuda, for NVIDIA GPUs from compute capability 7.5 on."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tucker_ops.backends import native, tuned
from tucker_ops.backends.base import Backend, Verdict
from tucker_ops.backends.gpu import countable
from tucker_ops.errors import BackendError
from tucker_ops.ops.block import block_memory_format
from tucker_ops.ops.reference import memory_format
from tucker_ops.types import BlockProblem, Problem

LEAST_CAPABILITY = 75
# bf16 and TF32 units came with this one.
LEAST_CAPABILITY_WIDE = 80
# Capabilities of the cards on which `make gpu` has passed. On others the kernels run where they are asked for by
# name, or with the variable set to 1, and nothing takes them unasked.
PROVEN: frozenset[int] = frozenset()
UNPROVEN_VARIABLE = "TUCKER_CUDA_UNPROVEN"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_SOURCES = 4
# Shared memory of a block and of a multiprocessor where torch does not tell.
_SHARED = {75: (64, 64), 80: (163, 164), 86: (99, 100), 87: (163, 164), 89: (99, 100), 90: (227, 228)}


@dataclass(frozen=True)
class Device:
    """What the choice of kernels depends on: capability such as 90, multiprocessors, bytes of shared memory."""

    capability: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int

    @property
    def numbers(self) -> list[int]:
        return [
            self.capability,
            self.multiprocessors,
            self.shared_per_block,
            self.shared_per_multiprocessor,
        ]


H200 = Device(90, 132, 227 * 1024, 228 * 1024)


@cache
def device_of(index: int) -> Device:
    """The GPU of this number, as torch describes it."""
    properties = torch.cuda.get_device_properties(index)
    # Code for an older card lacks the forms that only newer ones have.
    capability = min(properties.major * 10 + properties.minor, _compiled_for(index)[0])
    block, multiprocessor = _SHARED.get(capability, _SHARED[80 if capability < 90 else 90])
    return Device(
        capability,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", block * 1024),
        getattr(properties, "shared_memory_per_multiprocessor", multiprocessor * 1024),
    )


@dataclass(frozen=True)
class Choice:
    """How a problem is computed: by the one-pass kernel, in a form and with blocks of `chunk` planes, or by stages.

    `text` says it in words; microseconds are the cost model's, not measured.
    """

    one_pass: bool
    form: int
    chunk: int
    text: str
    microseconds: float


@cache
def _functions() -> ctypes.CDLL:
    return ctypes.CDLL(str(native.CUDA_LIBRARY))


def tf32_allowed() -> bool:
    """Does torch's setting for convolutions in float32 allow TF32?"""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def _kind(dtype: torch.dtype, tf32: bool) -> int:
    return {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2 if tf32 else 3}[dtype]


def _numbers(problem: Problem, device: Device, tf32: bool) -> ctypes.Array:
    def three(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
        return (fill,) * (3 - len(values)) + tuple(values)

    numbers = [_kind(problem.dtype, tf32), *device.numbers, problem.batch, problem.in_channels]
    numbers += [problem.rank_in, problem.rank_out, problem.out_channels]
    for values in (problem.input_size, problem.output_size, problem.kernel_size, problem.stride):
        numbers += three(values, 1)
    numbers += [*three(problem.padding, 0), *three(problem.dilation, 1)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def choice_of(problem: Problem, device: Device, tf32: bool = False) -> Choice:
    """What the cost model chooses for a problem on a device. Needs the compiled CUDA kernels, not a GPU."""
    result, text = (ctypes.c_int64 * 6)(), ctypes.create_string_buffer(400)
    chosen = _functions().tucker_ops_cuda_plan(_numbers(problem, device, tf32), result, text, 400)
    if chosen < 0:
        raise BackendError(f"the CUDA kernels know no problem like {problem}")
    if chosen == 0:
        return Choice(False, 0, 0, f"two or three launches: {text.value.decode()}", result[5] / 1000)
    form, chunk, height, width, nanoseconds = result[:5]
    text = f"one pass, tiles of {height}×{width} outputs, {chunk} planes a block"
    return Choice(True, form, chunk, text, nanoseconds / 1000)


def forms_of(problem: Problem, device: Device, tf32: bool = False) -> list[int]:
    """Forms of the one-pass kernel that compute this problem on this device: what tuning tries."""
    forms = (ctypes.c_int64 * 64)()
    count = _functions().tucker_ops_cuda_forms
    count.restype = ctypes.c_int64
    return list(forms[: count(_numbers(problem, device, tf32), forms, 64)])


@dataclass(frozen=True)
class Form:
    """One compiled form of the one-pass kernel: ranks in steps of 32 bytes, kernel and strides, tile of outputs.

    shared_bytes: of a block, for the channels that were asked about, with statistics.
    """

    steps_in: int
    steps_out: int
    depth: int
    stride_depth: int
    stride: int
    height: int
    width: int
    least_capability: int
    shared_bytes: int


def form(dtype: torch.dtype, number: int, channels: int, tf32: bool = False) -> Form | None:
    """The form of this number; None beyond the last."""
    result = (ctypes.c_int64 * 9)()
    ask = _functions().tucker_ops_cuda_form
    ask.argtypes = [ctypes.c_int64] * 3 + [ctypes.POINTER(ctypes.c_int64)]
    return Form(*result) if ask(_kind(dtype, tf32), number, channels, result) else None


def _available() -> Verdict:
    library = native.load_cuda()
    if not library:
        return library
    if not torch.cuda.is_available():
        return Verdict(False, "the CUDA kernels are compiled, but torch finds no NVIDIA GPU and driver here")
    capability, error = _compiled_for(torch.cuda.current_device())
    if error:
        return Verdict(False, f"the compiled CUDA kernels do not run on this GPU and driver: {error}")
    return Verdict(True, f"{library.reason}, for compute capability {capability / 10} here")


@cache
def _compiled_for(index: int) -> tuple[int, str]:
    """The capability whose code GPU `index` runs, and an empty string; or what the CUDA runtime said."""
    text = ctypes.create_string_buffer(400)
    capability = _functions().tucker_ops_cuda_probe(index, text, ctypes.c_int64(400))
    return capability, "" if capability > 0 else text.value.decode()


def _supports_dtype(dtype: torch.dtype) -> Verdict:
    if dtype not in DTYPES:
        return Verdict(
            False, f"computes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
        )
    return _supports_capability(dtype, device_of(torch.cuda.current_device()).capability)


def _supports_capability(dtype: torch.dtype, capability: int) -> Verdict:
    if capability < LEAST_CAPABILITY:
        return Verdict(
            False, f"needs compute capability 7.5 or later, this GPU has {capability // 10}.{capability % 10}"
        )
    if dtype != torch.float16 and capability < LEAST_CAPABILITY_WIDE:
        unit = "bf16" if dtype == torch.bfloat16 else "TF32"
        return Verdict(
            False,
            f"a GPU of compute capability {capability // 10}.{capability % 10} has no {unit} units; use float16",
        )
    return Verdict(True, f"compute capability {capability // 10}.{capability % 10}")


def _fits(problem: Problem | BlockProblem) -> Verdict:
    return countable(problem, (problem.input_size, problem.output_size))


def _supports(problem: Problem) -> Verdict:
    return _supports_dtype(problem.dtype) and _fits(problem)


def proven(capability: int) -> Verdict:
    """Have the kernels passed their tests on a card like this, or does the user take them as they are?"""
    if capability in PROVEN:
        return Verdict(True, f"the kernels have passed their tests on compute capability {capability / 10}")
    if os.environ.get(UNPROVEN_VARIABLE) == "1":
        return Verdict(True, f"{UNPROVEN_VARIABLE}=1")
    return Verdict(
        False,
        f"the CUDA kernels have passed their tests in emulation, but on no card of compute capability "
        f"{capability / 10} yet: run `make gpu`, then set {UNPROVEN_VARIABLE}=1, or ask for backend 'cuda' by name",
    )


def _prefers(problem: Problem | BlockProblem) -> Verdict:
    known = proven(device_of(torch.cuda.current_device()).capability)
    if not known or isinstance(problem, BlockProblem):
        return known
    choice = choice_of(problem, device_of(torch.cuda.current_device()), tf32_allowed())
    if choice.one_pass:
        return Verdict(True, "one pass moves the input and the output only; not timed on this card yet")
    return Verdict(False, f"not timed against cuDNN yet where it needs several launches ({choice.text})")


def _describe(problem: Problem) -> str:
    device = device_of(torch.cuda.current_device())
    layout = "" if problem.layout == "channels_last" else "; the input is copied to channels-last first"
    return choice_of(problem, device, tf32_allowed()).text + layout


def _supports_block(problem: BlockProblem) -> Verdict:
    dtype = _supports_dtype(problem.dtype)
    if not dtype:
        return dtype
    if problem.stats == "covariance" and problem.u_out:
        return Verdict(False, "takes the covariance of the core's output only: leave u_out to the reader")
    if len(problem.channels) > MOST_SOURCES:
        return Verdict(False, f"reads at most {MOST_SOURCES} sources, not {len(problem.channels)}")
    if len({factor for factor in problem.factors if math.prod(factor) > 1}) > 1:
        return Verdict(
            False, f"reads sources at one fraction of the extents, not at several: {problem.factors}"
        )
    return _fits(problem)


def _facts(tensor: Tensor) -> Device:
    device = device_of(tensor.device.index)
    verdict = _supports_capability(tensor.dtype, device.capability)
    if not verdict:
        # Another GPU than torch's current one, which was asked before.
        raise BackendError(f"backend 'cuda' cannot run on {tensor.device}: {verdict.reason}")
    return device


def _run(input, u_in, core, u_out, bias, stride, padding, dilation) -> Tensor:
    device = _facts(input)
    channels = (*input.shape[:2], *reversed(core.shape[:2]), u_out.shape[0])
    sizes = (channels, input.shape[2:], core, stride, padding, dilation)
    choice = tuned.choice(input.device.index, input.dtype, *sizes, tf32_allowed())
    return run_on(device, choice, input, u_in, core, u_out, bias, stride, padding, dilation)


def run_on(device: Device, choice: list[int], input, u_in, core, u_out, bias, *geometry) -> Tensor:
    """`tucker_conv` by the compiled op, on a device and by a choice that are given; in the input's layout."""
    x = input.contiguous(memory_format=block_memory_format(core.dim() - 2, False))
    weights = [None if t is None else t.contiguous() for t in (u_in, core, u_out, bias)]
    out = torch.ops.tucker_ops._tucker_conv_cuda(x, *weights, *geometry, device.numbers, choice)
    return out.contiguous(memory_format=memory_format(input))


def _run_block(*args) -> tuple[Tensor, Tensor, Tensor]:
    sources, expand, reduce, core, u_out = args[0], args[1], args[5], args[7], args[11]
    first, tf32 = sources[0], tf32_allowed()
    choice = [int(tf32)]
    if u_out is not None:
        wide = [s.shape[1] if u is None else u.shape[0] for s, u in zip(sources, expand, strict=True)]
        channels = (first.shape[0], sum(wide), *reversed(core.shape[:2]), u_out.shape[0])
        factor = (
            reduce[0].shape[:-2] if reduce[0] is not None and reduce[0].dim() > 2 else [1] * (core.dim() - 2)
        )
        size = [n * f for n, f in zip(first.shape[2:], factor, strict=True)]
        choice = tuned.choice(first.device.index, first.dtype, channels, size, core, *args[8:11], tf32)
    return run_block_on(_facts(first), choice, *args)


def run_block_on(
    device: Device, choice: list[int], sources, expand, scale, shift, slope, reduce, in_bias, core, stride, padding,
    dilation, u_out, bias, stats, contiguous, float32_values,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`tucker_block`, likewise."""
    layout = block_memory_format(core.dim() - 2, False)
    sources = [source.contiguous(memory_format=layout) for source in sources]
    expand, scale, shift, reduce = (
        [None if t is None else t.contiguous() for t in given] for given in (expand, scale, shift, reduce)
    )
    in_bias, core, u_out, bias = (None if t is None else t.contiguous() for t in (in_bias, core, u_out, bias))
    # A covariance is taken of channels-last values.
    at_once = contiguous and stats != "covariance"
    values, mean, m2 = torch.ops.tucker_ops._tucker_block_cuda(
        sources, expand, scale, shift, slope, reduce, in_bias, core, stride, padding, dilation, u_out, bias, stats,
        at_once, float32_values, device.numbers, choice,
    )  # fmt: skip
    return (values.contiguous() if contiguous else values), mean, m2


# At import, as the CPU's: it opens a file, and touches no GPU.
native.load_cuda()

CUDA = Backend(
    name="cuda",
    device="cuda",
    available=_available,
    supports=_supports,
    prefers=_prefers,
    run=_run,
    describe=_describe,
    supports_block=_supports_block,
    run_block=_run_block,
)
