"""`tucker_merge` against float64: tensors with norms and activations pending, summed up."""

from __future__ import annotations

import random

import pytest
import torch

import tucker_ops  # noqa: F401
from tests.ops.problems import TOLERANCE, relative_rms
from tucker_ops.errors import DtypeError, ShapeError, TuckerOpsError
from tucker_ops.ops.reference import merge

merge_op = torch.ops.tucker_ops.tucker_merge


def random_call(seed: int, dtype: torch.dtype) -> list:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size = [rng.choice([1, 2, 0, 1]), rng.choice([1, 3, 8, 33])]
    size += [rng.choice([1, 4, 7]) for _ in range(rng.choice([2, 3]))]
    count = rng.choice([1, 2, 3])
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    values = [normal(*size).to(dtype) for _ in range(count)]
    if rng.random() < 0.6:
        values = [
            v.to(memory_format=(torch.channels_last, torch.channels_last_3d)[len(size) - 4]) for v in values
        ]
    scale, shift = (
        [normal(*size[:2]).to(wide) if rng.random() < 0.6 else None for _ in values] for _ in range(2)
    )
    return [values, scale, shift, [rng.choice([1.0, 0.01]) for _ in values], rng.choice([1.0, 0.2])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_matches_float64(dtype, poisoned):
    for seed in range(60):
        call = random_call(seed, dtype)
        actual = merge_op(*call)
        wide = [[None if t is None else t.double() for t in given] for given in call[:3]]
        expected = merge(*wide, *call[3:])
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert actual.is_contiguous(
            memory_format=(torch.channels_last, torch.channels_last_3d)[actual.dim() - 4]
        )
        assert relative_rms(actual, expected) <= TOLERANCE[dtype], seed


def test_shapes_broadcast_as_in_an_addition():
    x, gate = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 1)
    out = merge_op([x, gate], [None, torch.full((2, 3), 2.0)], [None] * 2, [1.0] * 2, 1.0)
    torch.testing.assert_close(out, x + 2 * gate)
    call = [[x, gate], [None] * 2, [None] * 2, [1.0] * 2, 1.0]
    torch.library.opcheck(merge_op, call, test_utils=("test_schema", "test_faketensor"))


def test_nan_and_infinity_pass_through():
    x = torch.randn(1, 3, 4, 4)
    x[0, 1, 2, 3], x[0, 2, 0, 0] = float("nan"), float("-inf")
    out = merge_op([x, x.abs()], [None] * 2, [None] * 2, [0.01, 1.0], 0.01)
    assert out.isnan().nonzero().tolist() == [[0, 1, 2, 3], [0, 2, 0, 0]]  # -inf + inf
    assert merge_op([x], [None], [None], [0.01], 1.0)[0, 2, 0, 0] == float("-inf")


def test_opcheck():
    for seed in (1, 2, 3):
        call = random_call(seed, torch.float32)
        torch.library.opcheck(merge_op, call, test_utils=("test_schema", "test_faketensor"))


def test_it_has_no_derivative_and_says_so():
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(TuckerOpsError, match="no derivative"):
        merge_op([x], [None], [None], [1.0], 1.0).sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ([[], [], [], [], 1.0], ShapeError, "one or more tensors"),
        ([[torch.zeros(1, 2, 3, 3)], [None], [None], [], 1.0], ShapeError, "got 1, 1, 1 and 0"),
        ([[torch.zeros(1, 2, 3, n) for n in (3, 4)], [None] * 2, [None] * 2, [1.0] * 2, 1.0], ShapeError, "broadcast"),
        ([[torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 3)], [None], [1.0], 1.0], ShapeError, "scale and shift"),
        ([[torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 2).half()], [None], [1.0], 1.0], DtypeError, "torch.float32"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        merge_op(*call)
