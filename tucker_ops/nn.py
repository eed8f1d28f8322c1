"""Modules: Tucker-factorised convolutions that stand in for torch.nn's."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tucker_ops.errors import ConversionError, RankError, ShapeError
from tucker_ops.functional import tucker_conv
from tucker_ops.ops.check import ntuple
from tucker_ops.types import ConvSpec, Problem, Ranks

if TYPE_CHECKING:
    from tucker_ops.decompose import TuckerFactors

IntOrInts = int | Sequence[int]

_DENSE = {
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def spec_of(conv: nn.Module) -> ConvSpec:
    """The `ConvSpec` of a torch convolution (2D or 3D, normal or transposed) or of its Tucker counterpart.

    padding="same" and "valid" become numbers. Raises ConversionError, with the reason, where the layer is
    something else, pads with anything but zeros, or needs more padding on one side than on the other.
    """
    if isinstance(conv, _TuckerConv):
        return conv.spec
    transposed = isinstance(conv, nn.ConvTranspose2d | nn.ConvTranspose3d)
    if not transposed and not isinstance(conv, nn.Conv2d | nn.Conv3d):
        raise ConversionError(f"{type(conv).__name__} is not a 2D or 3D convolution")
    if conv.padding_mode != "zeros":
        raise ConversionError(f"pads with {conv.padding_mode!r}; only zero padding can be factorised")
    padding = conv.padding
    if padding == "valid":
        padding = (0,) * len(conv.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ConversionError(f"padding='same' with kernel {tuple(conv.kernel_size)} pads unevenly")
        padding = tuple(t // 2 for t in total)
    return ConvSpec(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=_ints(conv.kernel_size),
        stride=_ints(conv.stride),
        padding=_ints(padding),
        dilation=_ints(conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        transposed=transposed,
        output_padding=_ints(conv.output_padding) if transposed else (),
    )


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    """Python's integers from torch's or numpy's."""
    return tuple(int(v) for v in values)


def spatial_core(core: Tensor, u_taps: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """The core [*, *, *kernel] that convolves, of a core [*, *, R_taps] and u_taps [R_taps, taps].

    Half precision is multiplied out in float32 and rounded once.
    """
    wide = torch.float64 if core.dtype == torch.float64 else torch.float32
    device = core.device.type
    # The meta device, on which sizes are found, has no autocast to switch off.
    exact = (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    )
    with exact:
        product = core.to(wide) @ u_taps.to(wide)
    return product.to(core.dtype).reshape(*core.shape[:2], *kernel_size)


class _TuckerConv(nn.Module):
    """Parameters u_in [R_in, C_in], core, u_taps or None, u_out [C_out, R_out] and bias [C_out] or None.

    core is [R_out, R_in, *kernel], transposed [R_in, R_out, *kernel]; with a rank of the taps its last axis is R_taps
    and u_taps is [R_taps, taps].
    """

    ndim: int
    transposed: bool

    def __init__(self, spec: ConvSpec, ranks: Ranks, device=None, dtype=None):
        super().__init__()
        rank_in, rank_out, *rank_taps = _checked_ranks(spec, ranks)
        self.in_channels, self.out_channels = spec.in_channels, spec.out_channels
        self.kernel_size, self.stride = spec.kernel_size, spec.stride
        self.padding, self.dilation = spec.padding, spec.dilation
        self.output_padding = spec.output_padding
        leading = (rank_in, rank_out) if self.transposed else (rank_out, rank_in)

        def register(name: str, *size: int, given: bool = True) -> None:
            values = torch.empty(size, device=device, dtype=dtype) if given else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))

        register("u_in", rank_in, spec.in_channels)
        register("core", *leading, *(rank_taps or spec.kernel_size))
        # Flat: a tensor of four dimensions in a 3D network could not be converted to channels-last.
        register("u_taps", *rank_taps, math.prod(spec.kernel_size), given=bool(rank_taps))
        register("u_out", spec.out_channels, rank_out)
        register("bias", spec.out_channels, given=spec.bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights whose product has the variance that torch gives the dense layer's."""
        rank_in, rank_out, *rank_taps = self.ranks
        fan_in = self.in_channels * math.prod(self.kernel_size)
        nn.init.normal_(self.u_in, std=rank_in**-0.5)
        nn.init.normal_(self.core, std=(3 * fan_in) ** -0.5)
        if rank_taps:
            nn.init.normal_(self.u_taps, std=rank_taps[0] ** -0.5)
        nn.init.normal_(self.u_out, std=rank_out**-0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(fan_in**-0.5), fan_in**-0.5)

    @property
    def ranks(self) -> Ranks:
        """(R_in, R_out), or (R_in, R_out, R_taps)."""
        pair = self.u_in.shape[0], self.u_out.shape[1]
        return pair if self.u_taps is None else (*pair, self.u_taps.shape[0])

    @property
    def spatial_core(self) -> Tensor:
        """The core with which the op convolves: [R_out, R_in, *kernel], transposed [R_in, R_out, *kernel]."""
        return self.core if self.u_taps is None else spatial_core(self.core, self.u_taps, self.kernel_size)

    @property
    def spec(self) -> ConvSpec:
        return ConvSpec(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            bias=self.bias is not None,
            transposed=self.transposed,
            output_padding=self.output_padding,
        )

    @classmethod
    def from_conv(cls, conv: nn.Module, ranks: Ranks, factors: TuckerFactors | None = None):
        """Factorise a torch convolution of this class's kind.

        Args:
            conv: the dense layer; left as it is.
            ranks: (R_in, R_out), each at most its number of channels, or (R_in, R_out, R_taps), R_taps at most the
                number of the kernel's taps.
            factors: of conv.weight at these ranks, if they are known already; else `tucker_ops.decompose`
                computes them.

        Returns the new module with conv's dtype, device, requires_grad and training flag. Raises
        ConversionError for a layer that cannot be factorised and RankError for ranks out of range.
        """
        dense = _DENSE[cls.ndim, cls.transposed]
        if not isinstance(conv, dense):
            raise ConversionError(
                f"{cls.__name__}.from_conv takes nn.{dense.__name__}, got {type(conv).__name__}"
            )
        if type(conv).forward is not dense.forward:
            raise ConversionError(
                f"{type(conv).__name__} has a forward of its own, which factors of its weight would not reproduce"
            )
        spec = spec_of(conv)
        weight = conv.weight.detach()
        ranks = _checked_ranks(spec, ranks)
        if factors is None:
            from tucker_ops.decompose import decompose

            factors = decompose(weight, ranks, transposed=cls.transposed)
        module = cls._of_spec(spec, ranks, device="meta")
        for name in ("u_in", "core", "u_taps", "u_out"):
            value, expected = (getattr(factors, name), getattr(module, name))
            shapes = [None if t is None else tuple(t.shape) for t in (value, expected)]
            if shapes[0] != shapes[1]:
                raise ShapeError(
                    f"factor {name} has shape {shapes[0]}, expected {shapes[1]} for ranks {ranks}"
                )
            if value is None:
                continue
            value = value.detach().to(device=weight.device, dtype=weight.dtype).contiguous().clone()
            setattr(module, name, nn.Parameter(value, requires_grad=conv.weight.requires_grad))
        if conv.bias is not None:
            module.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
        return module.train(conv.training)

    @classmethod
    def _of_spec(cls, spec: ConvSpec, ranks: Ranks, device=None, dtype=None):
        module = cls.__new__(cls)
        _TuckerConv.__init__(module, spec, ranks, device=device, dtype=dtype)
        return module

    def to_dense(self) -> nn.Module:
        """The torch convolution this module equals, with the kernel multiplied out."""
        spec = self.spec
        extra = {"output_padding": spec.output_padding} if self.transposed else {}
        dense = _DENSE[self.ndim, self.transposed](
            spec.in_channels,
            spec.out_channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            bias=spec.bias,
            device="meta",
            dtype=self.core.dtype,
            **extra,
        )
        formula = "si,sr...,or->io..." if self.transposed else "or,rs...,si->oi..."
        with torch.no_grad():
            core = self.core.double()
            if self.u_taps is not None:
                core = spatial_core(core, self.u_taps.double(), self.kernel_size)
            u_in, u_out = self.u_in.double(), self.u_out.double()
            factors = (u_in, core, u_out) if self.transposed else (u_out, core, u_in)
            weight = torch.einsum(formula, *factors).to(self.core)
            dense.weight = nn.Parameter(weight, requires_grad=self.core.requires_grad)
            if self.bias is not None:
                dense.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def problem(self, size: Sequence[int], layout: str = "contiguous") -> Problem:
        """The `Problem` that an input [N, C_in, *spatial] of this `size` makes, for `tucker_ops.explain`."""
        return Problem(
            batch=size[0],
            in_channels=self.in_channels,
            rank_in=self.ranks[0],
            rank_out=self.ranks[1],
            out_channels=self.out_channels,
            input_size=tuple(size[2:]),
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            dtype=self.core.dtype,
            device=self.core.device.type,
            layout=layout,
            bias=self.bias is not None,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, ranks={self.ranks}"
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
            if any(v != default for v in getattr(self, name)):
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else text + ", bias=False"


class _Forward(_TuckerConv):
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        ranks: Ranks,
        stride: IntOrInts = 1,
        padding: IntOrInts = 0,
        dilation: IntOrInts = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        spec = ConvSpec(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=tuple(ntuple(kernel_size, self.ndim, "kernel_size", 1)),
            stride=tuple(ntuple(stride, self.ndim, "stride", 1)),
            padding=tuple(ntuple(padding, self.ndim, "padding", 0)),
            dilation=tuple(ntuple(dilation, self.ndim, "dilation", 1)),
            bias=bias,
        )
        super().__init__(spec, ranks, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return tucker_conv(
            input,
            self.u_in,
            self.spatial_core,
            self.u_out,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
        )


class _Transposed(_TuckerConv):
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        ranks: Ranks,
        stride: IntOrInts = 1,
        padding: IntOrInts = 0,
        output_padding: IntOrInts = 0,
        bias: bool = True,
        dilation: IntOrInts = 1,
        device=None,
        dtype=None,
    ):
        spec = ConvSpec(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=tuple(ntuple(kernel_size, self.ndim, "kernel_size", 1)),
            stride=tuple(ntuple(stride, self.ndim, "stride", 1)),
            padding=tuple(ntuple(padding, self.ndim, "padding", 0)),
            dilation=tuple(ntuple(dilation, self.ndim, "dilation", 1)),
            output_padding=tuple(ntuple(output_padding, self.ndim, "output_padding", 0)),
            bias=bias,
            transposed=True,
        )
        super().__init__(spec, ranks, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        ones = (1,) * self.ndim
        conv, transposed = (
            (F.conv2d, F.conv_transpose2d) if self.ndim == 2 else (F.conv3d, F.conv_transpose3d)
        )
        t = conv(input, self.u_in.reshape(*self.u_in.shape, *ones))
        z = transposed(
            t,
            self.spatial_core,
            None,
            self.stride,
            self.padding,
            self.output_padding,
            dilation=self.dilation,
        )
        return conv(z, self.u_out.reshape(*self.u_out.shape, *ones), self.bias)


class TuckerConv2d(_Forward):
    """torch.nn.Conv2d with its kernel in Tucker-2 form; input [N, C_in, H, W]. See `tucker_ops.tucker_conv`.

    ``ranks`` is (R_in, R_out), each between 1 and its number of channels, or (R_in, R_out, R_taps), R_taps between 1
    and the number of taps: fewer parameters, the same convolutions. Raises RankError otherwise.
    """

    ndim = 2


class TuckerConv3d(_Forward):
    """torch.nn.Conv3d with its kernel in Tucker-2 form; input [N, C_in, D, H, W]. See `tucker_ops.tucker_conv`.

    ``ranks`` is (R_in, R_out), each between 1 and its number of channels, or (R_in, R_out, R_taps), R_taps between 1
    and the number of taps: fewer parameters, the same convolutions. Raises RankError otherwise.
    """

    ndim = 3


class TuckerConvTranspose2d(_Transposed):
    """torch.nn.ConvTranspose2d in Tucker-2 form: 1x1, transposed core [R_in, R_out, *kernel], 1x1 with the bias.

    Runs on torch's own convolutions. ``ranks`` is (R_in, R_out), or (R_in, R_out, R_taps); raises RankError if out
    of range.
    """

    ndim = 2


class TuckerConvTranspose3d(_Transposed):
    """torch.nn.ConvTranspose3d in Tucker-2 form: 1x1, transposed core [R_in, R_out, *kernel], 1x1 with the bias.

    Runs on torch's own convolutions. ``ranks`` is (R_in, R_out), or (R_in, R_out, R_taps); raises RankError if out
    of range.
    """

    ndim = 3


_TUCKER = {
    (cls.ndim, cls.transposed): cls for cls in _Forward.__subclasses__() + _Transposed.__subclasses__()
}


def tucker_class(spec: ConvSpec) -> type[_TuckerConv]:
    """The module class that stands in for layers of this spec."""
    return _TUCKER[spec.ndim, spec.transposed]


def tucker_module(spec: ConvSpec, ranks: Ranks, device=None, dtype=None) -> _TuckerConv:
    """A freshly initialised module for `spec` at `ranks`; raises ConversionError for grouped layers."""
    return tucker_class(spec)._of_spec(spec, ranks, device=device, dtype=dtype)


def _checked_ranks(spec: ConvSpec, ranks: Ranks) -> Ranks:
    if spec.groups != 1:
        raise ConversionError(
            f"a convolution with {spec.groups} groups cannot be factorised over its channels"
        )
    try:
        rank_in, rank_out, *rank_taps = (operator.index(r) for r in ranks)
    except (TypeError, ValueError):
        rank_in, rank_out, rank_taps = 0, 0, [0, 0]
    if len(rank_taps) > 1:
        raise RankError(
            f"ranks must be two integers (R_in, R_out), or three (R_in, R_out, R_taps), got {ranks!r}"
        )
    if not 1 <= rank_in <= spec.in_channels or not 1 <= rank_out <= spec.out_channels:
        raise RankError(
            f"ranks (R_in, R_out) = {(rank_in, rank_out)} must lie between 1 and the channels "
            f"(C_in, C_out) = {(spec.in_channels, spec.out_channels)}"
        )
    taps = math.prod(spec.kernel_size)
    if rank_taps and not 1 <= rank_taps[0] <= taps:
        raise RankError(
            f"R_taps = {rank_taps[0]} must lie between 1 and the {taps} taps of a kernel of {spec.kernel_size}"
        )
    return rank_in, rank_out, *rank_taps
