"""`tucker_conv_backward` and `tucker_conv_stages`: what is kept, what is asked for, second order, torch's machinery."""

from __future__ import annotations

import itertools

import pytest
import torch

import tucker_ops
from tests.ops.problems import Case, random_cases, relative_rms, tolerance
from tucker_ops.errors import ConfigError, DtypeError, ShapeError
from tucker_ops.ops.reference import memory_format, three_convs_backward, three_stages

CASES = random_cases(60, seed=2)
SMALL = Case(0, 2, (5, 4, 3, 6), (4, 5, 6), (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), True, "contiguous")
# As everywhere: float64 gradients of the same rounded operands (tests/ops/problems.py), here by dtype. Measured: fp32
# 6e-7, bf16 5e-3, fp16, of which Triton alone has gradients, 7e-4 in its interpreter.
# Gradients are in the hundreds here, and their rounding depends on where in memory operands lie.
OPCHECK = {"atol": 1e-3, "rtol": 1e-5}
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ON_CPU = (torch.float32, torch.bfloat16)


def call_of(case: Case, dtype: torch.dtype) -> tuple:
    """grad, input, u_in, core, u_out, stride, padding, dilation."""
    x, u_in, core, u_out, bias = case.tensors(dtype)
    geometry = [list(g) for g in case.geometry]
    out = tucker_ops.tucker_conv(x, u_in, core, u_out, bias, *geometry, backend="reference")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    if case.seed % 2:
        grad = grad.to(memory_format=torch.channels_last if grad.dim() == 4 else torch.channels_last_3d)
    return grad, x, u_in, core, u_out, *geometry


def check(case: Case, dtype: torch.dtype, backend: str | None, *, kept: bool) -> None:
    call = call_of(case, dtype)
    exact = three_convs_backward(*(t.double() for t in call[:5]), *call[5:], [True] * 5)
    stages = ()
    if kept:
        stages = torch.ops.tucker_ops.tucker_conv_stages(*call[1:5], None, *call[5:], backend=backend)[1:]
    actual = torch.ops.tucker_ops.tucker_conv_backward(*call, [True] * 5, *stages, backend=backend)
    assert actual[0].is_contiguous(memory_format=memory_format(call[1]))
    for name, found, wanted in zip(("input", "u_in", "core", "u_out", "bias"), actual, exact, strict=True):
        assert found.dtype == dtype and found.shape == wanted.shape
        error = relative_rms(found, wanted)
        assert error <= tolerance(dtype, wanted.numel(), LIMITS), f"{case}: {name} is off by {error:.1e}"


def backends() -> list[str]:
    return ["cpu", "reference"]


@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", ON_CPU, ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", backends())
def test_gradients_match_float64(backend, dtype, kept, poisoned):
    if not tucker_ops.backends()[backend].ok:
        pytest.skip(tucker_ops.backends()[backend].reason)
    cases = CASES if dtype == torch.float32 else CASES[::3]
    for case in cases:
        check(case, dtype, backend, kept=kept)


@pytest.mark.parametrize("dtype", ON_CPU, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(3, 5, 1), (4, 5, 1), (2, 3, 1), (6, 7, 2), (9, 1, 2)], ids=str
)
def test_kernels_of_whose_weights_onednn_errs(size, kernel, stride, dtype):
    """Wrong in torch itself with AVX-512, where the choice must not fall on the reference either."""
    if not tucker_ops.backends()["cpu"].ok:
        pytest.skip(tucker_ops.backends()["cpu"].reason)
    geometry = ((stride,) * 3, (kernel // 2,) * 3, (1,) * 3)
    case = Case(0, 1, (16, 16, 16, 16), (size,) * 3, (kernel,) * 3, *geometry, True, "channels_last")
    check(case, dtype, "cpu", kept=False)


def test_stages_are_what_they_are_said_to_be():
    for case, backend in itertools.product(CASES[:20], backends()):
        tensors = case.tensors(torch.float32)
        geometry = [list(g) for g in case.geometry]
        exact = three_stages(*(None if t is None else t.double() for t in tensors), *geometry)
        actual = torch.ops.tucker_ops.tucker_conv_stages(*tensors, *geometry, backend=backend)
        for found, wanted in zip(actual, exact, strict=True):
            assert relative_rms(found, wanted) <= tolerance(torch.float32, wanted.numel())


@pytest.mark.parametrize("backend", backends())
def test_each_gradient_alone_is_the_same(backend):
    call = call_of(SMALL, torch.float32)
    whole = torch.ops.tucker_ops.tucker_conv_backward(*call, [True] * 5, backend=backend)
    for mask in itertools.product([False, True], repeat=5):
        part = torch.ops.tucker_ops.tucker_conv_backward(*call, list(mask), backend=backend)
        for wanted, found, all_at_once in zip(mask, part, whole, strict=True):
            assert found.numel() == (all_at_once.numel() if wanted else 0)
            if wanted:
                assert relative_rms(found, all_at_once.double()) <= LIMITS[torch.float32]


def saved_bytes(call) -> int:
    """Bytes of the distinct storages that autograd keeps, those of leaves included."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_backward(monkeypatch):
    """At 32 channels and rank 16 three convolutions keep the input, t and z; the op the input alone."""
    case = Case(
        0, 1, (32, 16, 16, 32), (16, 16, 16), (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, True, "channels_last"
    )
    tensors = case.tensors(torch.float32, requires_grad=True)
    geometry = [list(g) for g in case.geometry]
    three = saved_bytes(lambda: tucker_ops.ops.reference.three_convs(*tensors, *geometry))
    ours = saved_bytes(lambda: tucker_ops.tucker_conv(*tensors, *geometry))
    assert ours <= 0.55 * three
    monkeypatch.setenv("TUCKER_KEEP_STAGES", "1")
    assert saved_bytes(lambda: tucker_ops.tucker_conv(*tensors, *geometry)) == pytest.approx(three, rel=0.01)


def test_kept_stages_give_the_same_gradients(monkeypatch):
    results = []
    for kept in ("0", "1"):
        monkeypatch.setenv("TUCKER_KEEP_STAGES", kept)
        tensors = SMALL.tensors(torch.float32, requires_grad=True)
        tucker_ops.tucker_conv(*tensors, *SMALL.geometry).square().sum().backward()
        results.append([t.grad for t in tensors])
    for recomputed, kept in zip(*results, strict=True):
        assert relative_rms(kept, recomputed.double()) <= LIMITS[torch.float32]


def test_a_wrong_setting_is_named(monkeypatch):
    monkeypatch.setenv("TUCKER_KEEP_STAGES", "yes")
    with pytest.raises(ConfigError, match="TUCKER_KEEP_STAGES"):
        tucker_ops.tucker_conv(*SMALL.tensors(torch.float32, requires_grad=True), *SMALL.geometry)


@pytest.mark.parametrize("op", ["backward", "stages"])
def test_opcheck(op):
    *tensors, stride, padding, dilation = call_of(SMALL, torch.float32)
    tensors = [t.requires_grad_() for t in tensors]
    if op == "stages":
        torch.library.opcheck(
            torch.ops.tucker_ops.tucker_conv_stages.default, (*tensors[1:], None, stride, padding, dilation)
        )
    else:
        torch.library.opcheck(
            torch.ops.tucker_ops.tucker_conv_backward.default,
            (*tensors, stride, padding, dilation, [True] * 5),
            **OPCHECK,
        )


@pytest.mark.parametrize("kept", ["0", "1"])
def test_gradcheck_first_and_second_order(kept, monkeypatch):
    monkeypatch.setenv("TUCKER_KEEP_STAGES", kept)
    case = Case(0, 1, (2, 2, 2, 3), (3, 4, 3), (2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), True, "contiguous")
    tensors = case.tensors(torch.float64, requires_grad=True)

    def call(*args):
        return tucker_ops.tucker_conv(*args, *case.geometry)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_compile_fullgraph_with_kept_stages(monkeypatch):
    monkeypatch.setenv("TUCKER_KEEP_STAGES", "1")
    tensors = SMALL.tensors(torch.float32, requires_grad=True)

    def loss(*args):
        return tucker_ops.tucker_conv(*args, *SMALL.geometry).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert relative_rms(found, wanted.double()) <= LIMITS[torch.float32]


def test_explain_names_who_computes_the_gradient():
    text = str(tucker_ops.explain(*SMALL.tensors(torch.float64), *SMALL.geometry))
    assert "reference computes its gradient" in text


def test_arguments_that_do_not_fit_are_named():
    call = call_of(SMALL, torch.float32)
    backward = torch.ops.tucker_ops.tucker_conv_backward
    with pytest.raises(ShapeError, match="grad must be"):
        backward(call[0][:, :-1], *call[1:], [True] * 5)
    with pytest.raises(DtypeError, match="grad must be"):
        backward(call[0].double(), *call[1:], [True] * 5)
    with pytest.raises(ShapeError, match="output_mask"):
        backward(*call, [True] * 4)
    with pytest.raises(ShapeError, match="t must be"):
        backward(*call, [True] * 5, call[1])
