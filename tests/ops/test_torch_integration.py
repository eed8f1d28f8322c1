"""The op inside torch's machinery: opcheck, autocast, compile, export."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import tucker_ops
from tests.ops.problems import Case, random_cases, reference, relative_rms, tolerance
from tucker_ops.nn import TuckerConv2d, TuckerConv3d

CASES = [case for case in random_cases(60, seed=7) if case.batch > 0]
OP = torch.ops.tucker_ops.tucker_conv
CASE = Case(1, 2, (5, 4, 3, 6), (6, 5, 7), (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1), True, "contiguous")


@pytest.mark.parametrize("case", CASES[:6], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(case, requires_grad):
    arguments = (*case.tensors(torch.float32, requires_grad), *(list(g) for g in case.geometry))
    # Gradients are in the hundreds here, and their rounding depends on where in memory operands lie.
    torch.library.opcheck(OP, arguments, atol=1e-3, rtol=1e-5)


def test_opcheck_of_the_private_cpu_op():
    if not tucker_ops.backends()["cpu"].ok:
        pytest.skip(tucker_ops.backends()["cpu"].reason)
    for case in CASES[:6]:
        arguments = (*case.tensors(torch.float32), *(list(g) for g in case.geometry))
        torch.library.opcheck(torch.ops.tucker_ops._tucker_conv_cpu, arguments)


def test_defaults_of_the_raw_op():
    x, u_in, core, u_out, _ = CASE.tensors(torch.float32)
    torch.testing.assert_close(OP(x, u_in, core, u_out), tucker_ops.tucker_conv(x, u_in, core, u_out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_float32_weights(dtype):
    x, *weights = CASE.tensors(torch.float32)
    rounded = [x.to(dtype), *(w.to(dtype) for w in weights)]
    expected = reference(rounded, CASE.geometry)
    for given in (x, x.to(dtype)):
        with torch.autocast("cpu", dtype):
            out = tucker_ops.tucker_conv(given, *weights, *CASE.geometry)
        assert out.dtype == dtype
        assert relative_rms(out, expected) <= tolerance(dtype, out.numel())


def test_autocast_gradients_reach_float32_weights():
    tensors = CASE.tensors(torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tucker_ops.tucker_conv(*tensors, *CASE.geometry).float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = TuckerConv3d(3, 8, 3, (2, 4), padding=1)
        self.second = TuckerConv3d(8, 6, (1, 3, 3), (4, 4), stride=(1, 2, 2), bias=False)

    def forward(self, x):
        return self.second(torch.nn.functional.leaky_relu(self.first(x), 0.01))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_forward_and_backward(dynamic):
    torch._dynamo.reset()
    network, x = Network(), torch.randn(1, 3, 6, 9, 8)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (x.shape, (1, 3, 7, 11, 8)):
        x = torch.randn(size)
        expected, actual = network(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        expected.sum().backward()
        actual.sum().backward()
    torch.testing.assert_close(compiled.first.core.grad, network.first.core.grad)


def test_compile_with_inductor_keeps_one_opaque_node():
    torch._dynamo.reset()
    network, x = Network().eval(), torch.randn(1, 3, 6, 9, 8)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(network, fullgraph=True)(x), network(x))


def test_export_keeps_the_op_and_takes_other_sizes():
    network = Network().eval()
    x = torch.randn(1, 3, 6, 9, 8)
    dims = {2: torch.export.Dim("depth", min=2, max=32), 3: torch.export.Dim("height", min=5, max=32)}
    program = torch.export.export(network, (x,), dynamic_shapes=(dims,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("tucker_ops.tucker_conv.default") == 2
    other = torch.randn(1, 3, 9, 13, 8)
    torch.testing.assert_close(program.module()(other), network(other))


@pytest.mark.slow
def test_ahead_of_time_package(tmp_path):
    network, x = Network().eval(), torch.randn(1, 3, 6, 7, 8)
    with torch.no_grad():
        program = torch.export.export(network, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), network(x))


def test_channels_last_is_kept_through_compile():
    torch._dynamo.reset()
    network = TuckerConv2d(4, 6, 3, (3, 3), padding=1).eval()
    x = torch.randn(2, 4, 8, 9).to(memory_format=torch.channels_last)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert compiled(x).stride() == network(x).stride()


def test_modules_copy_pickle_and_load():
    network = Network()
    again = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    other = Network()
    other.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(1, 3, 6, 9, 8)
    assert torch.equal(again(x), network(x)) and torch.equal(other(x), network(x))
