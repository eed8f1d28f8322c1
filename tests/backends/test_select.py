"""Choice of backend: by name, by predicate, with reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tucker_ops
from tucker_ops.backends import native, select
from tucker_ops.backends.base import Verdict
from tucker_ops.backends.cpu import CPU
from tucker_ops.errors import BackendError
from tucker_ops.nn import TuckerConv2d, TuckerConv3d

MODULE = TuckerConv3d(32, 32, 3, (16, 16), padding=1)
PROBLEM = MODULE.problem((1, 32, 64, 64, 64))


def with_cpu(monkeypatch, **changes):
    order = tuple(replace(b, **changes) if b.name == "cpu" else b for b in select.ORDER)
    monkeypatch.setattr(select, "ORDER", order)


def test_the_table_prints_a_reason_for_every_backend():
    table = tucker_ops.backends()
    assert [name for name, _, _ in table] == ["cuda", "triton", "cpu", "reference"]
    assert all(reason for _, _, reason in table)
    assert table["reference"].ok
    assert "reference" in str(table)
    with pytest.raises(KeyError):
        table["gpu"]


@pytest.mark.parametrize("predicate", ["available", "supports", "prefers"])
def test_automatic_choice_falls_back_and_says_why(monkeypatch, predicate):
    yes, no = (lambda *_: Verdict(True, "yes")), (lambda *_: Verdict(False, "the moon is full"))
    predicates = {name: yes for name in ("available", "supports", "prefers")}
    with_cpu(monkeypatch, **{**predicates, predicate: no})
    explanation = tucker_ops.explain(PROBLEM)
    assert explanation.chosen == "reference"
    assert "the moon is full" in str(explanation)
    with_cpu(monkeypatch, **predicates)
    assert tucker_ops.explain(PROBLEM).chosen == "cpu"


def test_a_named_backend_runs_even_where_it_is_not_preferred(monkeypatch):
    yes, no = (lambda *_: Verdict(True, "yes")), (lambda *_: Verdict(False, "slower"))
    with_cpu(monkeypatch, available=yes, supports=yes, prefers=no)
    assert tucker_ops.explain(PROBLEM, backend="cpu").chosen == "cpu"


def test_explain_takes_the_arguments_of_the_call():
    x = torch.randn(1, 32, 4, 4, 4)
    explanation = tucker_ops.explain(x, MODULE.u_in, MODULE.core, MODULE.u_out, MODULE.bias, padding=1)
    assert explanation.problem == MODULE.problem(x.shape)
    assert "32→32 channels, ranks (16, 16), kernel 3×3×3" in str(explanation)


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_what_measured_slower_than_the_reference_is_declined(isa, monkeypatch):
    monkeypatch.setattr(native, "isa", lambda: isa)
    tiny_slices = TuckerConv2d(256, 512, 3, (256, 512), padding=1).problem((1, 256, 4, 4))
    wide_kernel = TuckerConv3d(320, 160, 5, (80, 40), padding=2).problem((1, 320, 4, 4, 4))
    pointwise = TuckerConv3d(256, 256, 1, (128, 128)).problem((1, 256, 8, 8, 8))
    assert CPU.prefers(PROBLEM)
    for problem in (tiny_slices, wide_kernel, pointwise):
        assert CPU.prefers(problem).ok is (isa != "avx2")
    bfloat16 = replace(PROBLEM, dtype=torch.bfloat16)
    assert CPU.prefers(bfloat16).ok is (isa in ("avx2", "avx512_bf16"))
    # Without instructions for it torch takes a hundred times as long, whatever the problem.
    assert isa != "avx2" or "hundred times" in CPU.prefers(replace(wide_kernel, dtype=torch.bfloat16)).reason


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"])
def test_gradients_that_measured_slower_are_declined(isa, monkeypatch):
    monkeypatch.setattr(native, "isa", lambda: isa)
    prefers = CPU.derivative.prefers
    assert prefers(PROBLEM)
    few_voxels = MODULE.problem((1, 32, 5, 5, 5))
    little = TuckerConv3d(4, 4, 3, (2, 2), padding=1).problem((1, 4, 8, 8, 8))
    for problem in (few_voxels, little):
        assert "little to save" in prefers(problem).reason
        assert prefers(replace(problem, dtype=torch.bfloat16))
    many = TuckerConv3d(8, 8, 3, (4, 4), padding=1).problem((1, 8, 32, 32, 32))
    assert prefers(many)
    assert prefers(replace(many, dtype=torch.bfloat16)).ok is (isa == "avx2")
    # Torch's own is wrong there with AVX-512.
    beyond = TuckerConv3d(4, 4, 5, (2, 2), padding=2).problem((1, 4, 3, 3, 3))
    assert prefers(beyond).ok is (isa == "avx512_bf16")


def test_an_instruction_set_that_was_not_timed_is_not_chosen(monkeypatch):
    if not native.load():
        pytest.skip(native.load().reason)
    monkeypatch.setenv(native.ISA_VARIABLE, "baseline")
    explanation = tucker_ops.explain(PROBLEM)
    assert explanation.chosen == explanation.gradient == "reference"
    for verdicts in (explanation.verdicts, explanation.gradient_verdicts):
        assert "not been timed" in verdicts["cpu"].reason and "baseline" in verdicts["cpu"].reason


def test_explain_says_how():
    if not native.load():
        pytest.skip(native.load().reason)
    assert "core, tiles of" in tucker_ops.explain(PROBLEM, backend="cpu").how
    assert "Winograd F(4×4, 3×3)" in str(tucker_ops.explain(PROBLEM, backend="cpu"))
    strided = replace(PROBLEM, stride=(2, 2, 2))
    assert "direct core" in tucker_ops.explain(strided, backend="cpu").how
    assert tucker_ops.explain(PROBLEM, backend="reference").how


def test_an_unknown_core_is_refused(monkeypatch):
    if not native.load():
        pytest.skip(native.load().reason)
    monkeypatch.setenv(native.CORE_VARIABLE, "fft")
    assert "fft" in tucker_ops.explain(PROBLEM).verdicts["cpu"].reason
    with pytest.raises(BackendError, match="fft"):
        tucker_ops.explain(PROBLEM, backend="cpu")
    with pytest.raises(BackendError, match="fft"):
        native.tiles(PROBLEM)
    operands = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2), torch.zeros(1, 1, 3, 3), torch.zeros(2, 1), None
    with pytest.raises(RuntimeError, match="TUCKER_CPU_CORE=fft is not known"):
        torch.ops.tucker_ops._tucker_conv_cpu(*operands, [1, 1], [0, 0], [1, 1])


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    if not native.load():
        pytest.skip(native.load().reason)
    monkeypatch.setenv(native.ISA_VARIABLE, "avx1024")
    assert "avx1024" in tucker_ops.explain(PROBLEM).verdicts["cpu"].reason
    with pytest.raises(BackendError, match="avx1024"):
        MODULE.cpu()
        x = torch.randn(1, 32, 3, 3, 3)
        tucker_ops.tucker_conv(x, MODULE.u_in, MODULE.core, MODULE.u_out, backend="cpu")
