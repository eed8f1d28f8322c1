"""A problem as an ONNX model: one convolution, or three. Needs `pip install onnx`."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.operands import Operands
from bench.peers.base import DENSE, pointwise

# Old enough for every runtime that is maintained; from opset 22 on, Conv has bfloat16.
OPSET, IR_VERSION = 22, 10
INPUT, OUTPUT = "input", "output"


def onnx_model(operands: Operands, form: str) -> bytes:
    """The serialised model with the weights inside; input and output have the problem's dtype and fixed shapes."""
    from onnx import helper

    problem, dtype = operands.problem, element_type(operands.problem.dtype)
    ndim = problem.spec.ndim
    stride, padding, dilation = operands.geometry
    geometry = {"strides": stride, "pads": padding * 2, "dilations": dilation}
    if form == DENSE:
        layers = [(operands.dense, operands.bias, geometry)]
    else:
        layers = [
            (pointwise(operands.u_in, ndim), None, {}),
            (operands.core, None, geometry),
            (pointwise(operands.u_out, ndim), operands.bias, {}),
        ]
    nodes, weights, value = [], [], INPUT
    for index, (weight, bias, attributes) in enumerate(layers):
        names = [f"weight{index}"] + ([] if bias is None else [f"bias{index}"])
        weights += [_initializer(*pair) for pair in zip(names, (weight, bias), strict=False)]
        result = OUTPUT if index == len(layers) - 1 else f"value{index}"
        kernel = list(weight.shape[2:])
        nodes.append(helper.make_node("Conv", [value, *names], [result], kernel_shape=kernel, **attributes))
        value = result
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info(INPUT, dtype, list(operands.input.shape))],
        [helper.make_tensor_value_info(OUTPUT, dtype, list(problem.output_shape))],
        weights,
    )
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION).SerializeToString()


def element_type(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype."""
    from onnx import TensorProto

    return {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16}[dtype]


def _initializer(name: str, tensor: Tensor):
    from onnx import helper

    # numpy has no bfloat16; its bits travel as integers.
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, element_type(tensor.dtype), list(tensor.shape), data, raw=True)
