"""Every wrong argument raises a typed error, in Python, that names what was given and what to do."""

from __future__ import annotations

import pytest
import torch

import tucker_ops
from tucker_ops import errors


def arguments(dtype=torch.float32, **changes):
    given = {
        "input": torch.randn(1, 5, 6, 7, 8, dtype=dtype),
        "u_in": torch.randn(4, 5, dtype=dtype),
        "core": torch.randn(3, 4, 3, 3, 3, dtype=dtype),
        "u_out": torch.randn(6, 3, dtype=dtype),
        "bias": torch.randn(6, dtype=dtype),
    }
    return {**given, **changes}


WRONG = {
    "input channels": ({"input": torch.randn(1, 4, 6, 7, 8)}, errors.ShapeError, "the input has 4"),
    "input axes": ({"input": torch.randn(5, 6)}, errors.ShapeError, r"\[N, C_in, \*spatial\]"),
    "core axes": ({"core": torch.randn(3, 4, 3)}, errors.ShapeError, "2 or 3 kernel axes"),
    "core ranks": ({"core": torch.randn(3, 5, 3, 3, 3)}, errors.ShapeError, "R_in = 4"),
    "u_out ranks": ({"u_out": torch.randn(6, 2)}, errors.ShapeError, "R_out = 2"),
    "u_in axes": ({"u_in": torch.randn(4, 5, 1)}, errors.ShapeError, r"\[R_in, C_in\]"),
    "bias": ({"bias": torch.randn(5)}, errors.ShapeError, r"\[6\]"),
    "zero rank": (
        {"u_in": torch.randn(0, 5), "core": torch.randn(3, 0, 3, 3, 3)},
        errors.RankError,
        "at least 1",
    ),
    "mixed dtypes": (
        {"core": torch.randn(3, 4, 3, 3, 3, dtype=torch.float64)},
        errors.DtypeError,
        "autocast",
    ),
    "device": ({"u_in": torch.randn(4, 5, device="meta")}, errors.DeviceError, "meta"),
    "not a tensor": ({"input": [1.0]}, errors.DtypeError, "list"),
    "stride 0": ({"stride": 0}, errors.ShapeError, "stride must lie between 1"),
    "stride length": ({"stride": (1, 2)}, errors.ShapeError, "2 entries"),
    "stride type": ({"stride": 1.5}, errors.ShapeError, "1.5"),
    "padding negative": ({"padding": (-1, 0, 0)}, errors.ShapeError, "padding"),
    "dilation": ({"dilation": 0}, errors.ShapeError, "dilation"),
    "kernel does not fit": ({"input": torch.randn(1, 5, 2, 7, 8)}, errors.ShapeError, "pad more"),
    "empty extent": ({"input": torch.randn(1, 5, 0, 7, 8), "padding": 3}, errors.ShapeError, "at least 1"),
    "u_in is a list": ({"u_in": [1.0]}, errors.DtypeError, "u_in must be a torch.Tensor, got list"),
    "bias is a number": ({"bias": 1.0}, errors.DtypeError, "bias must be a torch.Tensor, got float"),
    "sparse": ({"input": torch.randn(1, 5, 6, 7, 8).to_sparse()}, errors.DtypeError, "sparse"),
    "huge padding": ({"padding": 2**62}, errors.ShapeError, "2147483647"),
    "backend is no name": ({"backend": 3}, errors.BackendError, "must be a name"),
    "unknown backend": ({"backend": "gpu"}, errors.BackendError, "reference"),
}


@pytest.mark.parametrize(("changes", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_argument(changes, error, words):
    with pytest.raises(error, match=words) as caught:
        tucker_ops.tucker_conv(**arguments(**changes))
    assert isinstance(caught.value, (ValueError, TypeError))
    assert not isinstance(caught.value, RuntimeError)


def test_integer_tensors_are_refused():
    given = {k: v.to(torch.int32) for k, v in arguments().items()}
    with pytest.raises(errors.DtypeError, match="int32"):
        tucker_ops.tucker_conv(**given)


def test_a_named_backend_that_cannot_run_says_why():
    if not tucker_ops.backends()["cpu"].ok:
        pytest.skip(tucker_ops.backends()["cpu"].reason)
    with pytest.raises(errors.BackendError, match="float32 and bfloat16, not float64"):
        tucker_ops.tucker_conv(**arguments(torch.float64), backend="cpu")


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    given = arguments()
    plain = tucker_ops.tucker_conv(**given, stride=(1, 2, 1), padding=1)
    other = tucker_ops.tucker_conv(**given, stride=(1, numpy.int64(2), 1), padding=numpy.int32(1))
    assert torch.equal(plain, other)


def test_a_ring_that_does_not_fit_goes_to_the_reference():
    if not tucker_ops.backends()["cpu"].ok:
        pytest.skip(tucker_ops.backends()["cpu"].reason)
    far = 2**20
    given = arguments(core=torch.randn(3, 4, 2, 2, 2), stride=far, padding=far, dilation=far)
    assert tucker_ops.explain(**given).chosen == "reference"
    with pytest.raises(errors.BackendError, match="bytes of intermediate"):
        tucker_ops.tucker_conv(**given, backend="cpu")


def test_the_private_op_guards_itself():
    """It may be called without our Python checks, by an exported program: it must not crash or overread."""
    if not tucker_ops.backends()["cpu"].ok:
        pytest.skip(tucker_ops.backends()["cpu"].reason)
    x, u_in, core, u_out, bias = arguments().values()
    ones, zeros = [1, 1, 1], [0, 0, 0]
    call = torch.ops.tucker_ops._tucker_conv_cpu
    wrong = {
        "zero rank": (x, u_in[:0], core[:, :0], u_out, bias, ones, zeros, ones),
        "no channels": (x[:, :0], u_in[:, :0], core, u_out, bias, ones, zeros, ones),
        "empty kernel": (x, u_in, core[..., :0], u_out, bias, ones, zeros, ones),
        "bias shape": (x, u_in, core, u_out, bias[None], ones, zeros, ones),
        "geometry": (x, u_in, core, u_out, bias, [2**61] * 3, [2**61] * 3, [2**61] * 3),
    }
    for what, args in wrong.items():
        with pytest.raises(RuntimeError, match="_tucker_conv_cpu"):
            call(*args)
            pytest.fail(what)


def test_the_raw_op_checks_too():
    given = arguments(u_out=torch.randn(6, 2))
    with pytest.raises(errors.ShapeError, match="R_out = 2"):
        torch.ops.tucker_ops.tucker_conv(*given.values())


def test_out_of_memory_passes_unchanged(monkeypatch):
    from tucker_ops.backends import select

    def exhausted(*args):
        raise torch.OutOfMemoryError("no memory")

    reference = select.ORDER[-1]
    monkeypatch.setattr(select, "ORDER", (select.Backend(**{**vars(reference), "run": exhausted}),))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        tucker_ops.tucker_conv(**arguments())


def test_every_error_class_is_a_value_or_type_error():
    classes = [c for c in vars(errors).values() if isinstance(c, type) and c is not errors.TuckerOpsError]
    assert len(classes) > 8
    for error in classes:
        assert issubclass(error, errors.TuckerOpsError)
        assert issubclass(error, (ValueError, TypeError)) and not issubclass(error, RuntimeError)
