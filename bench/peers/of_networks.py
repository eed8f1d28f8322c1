"""What a user would run a whole network with: prepared on a `Case`, then called again and again."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bench.network_cases import OUTPUTS, Case, as_convolutions
from bench.peers.onnx_model import INPUT, OUTPUT
from bench.peers.ort import BoundSession, session_of
from bench.peers.runtimes import missing, unlimited
from tucker_ops import fuse
from tucker_ops.backends import native
from tucker_ops.fused import explain

AS_NNUNET = "eager"
OURS = "fused"
# Minutes each.
IN_FULL_ONLY = ("channels-last", "onnxruntime", "compile")

Call = Callable[[], Tensor]


def _eager(case: Case, dtype: torch.dtype) -> Call:
    network, x = as_convolutions(case.network()).to(dtype), case.input().to(dtype)
    return lambda: network(x)


def _channels_last(case: Case, dtype: torch.dtype) -> Call:
    layout = torch.channels_last_3d
    network = as_convolutions(case.network()).to(dtype).to(memory_format=layout)
    x = case.input().to(dtype).contiguous(memory_format=layout)
    return lambda: network(x)


def _compiled(case: Case, dtype: torch.dtype) -> Call:
    network, x = torch.compile(as_convolutions(case.network()).to(dtype)), case.input().to(dtype)
    return lambda: network(x)


def _openvino(case: Case, dtype: torch.dtype) -> Call:
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    core, x = openvino.Core(), case.input()
    # Traced on a small patch: it runs the network several times.
    model = openvino.convert_model(
        as_convolutions(case.network()), example_input=x[:, :, :64, :32, :32], input=[x.shape]
    )
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    output = torch.empty(1, OUTPUTS, *x.shape[2:])
    # The request does not keep the memory of either alive.
    shared = [openvino.Tensor(tensor.numpy(), shared_memory=True) for tensor in (x, output)]
    request.set_input_tensor(0, shared[0])
    request.set_output_tensor(0, shared[1])

    def call(kept=(x, shared)) -> Tensor:
        request.infer(share_outputs=True)
        return output

    return call


def _onnxruntime(case: Case, dtype: torch.dtype) -> Call:
    x, model = case.input(), io.BytesIO()
    with warnings.catch_warnings():
        # The exporter's successor needs a package more and writes the same model.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            as_convolutions(case.network()),
            (x,),
            model,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamo=False,
        )
    return BoundSession(session_of(model.getvalue()), x, torch.empty(1, OUTPUTS, *x.shape[2:]))


def _fused(case: Case, dtype: torch.dtype) -> Call:
    network = fuse(copy.deepcopy(case.network()), precision="bf16" if dtype == torch.bfloat16 else "fp32")
    x = case.input()
    used = explain(network).used
    if not used:
        raise RuntimeError(used.reason)
    return lambda: network(x)


PEERS: dict[str, Callable[[Case, torch.dtype], Call]] = {
    AS_NNUNET: _eager,
    "channels-last": _channels_last,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "compile": _compiled,
    OURS: _fused,
}


def why_not(peer: str, dtype: torch.dtype, full: bool) -> str | None:
    """Why a peer has no place in this run; None where it has one."""
    if peer in IN_FULL_ONLY and not full:
        return "in --full only: it takes minutes"
    if peer == "openvino" and (reason := missing("openvino")):
        return reason
    if peer == "onnxruntime":
        if reason := missing("onnxruntime", "onnx") or unlimited("ONNX Runtime"):
            return reason
        if dtype != torch.float32:
            return "computes float32 on the CPU"
    if dtype == torch.bfloat16 and peer != OURS and not native.multiplies_bfloat16():
        return (
            "this processor has no bfloat16 instructions: torch takes minutes, OpenVINO computes in float32"
        )
    return None
