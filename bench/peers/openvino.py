"""OpenVINO on the CPU, of the dense convolution and of three convolutions. Apache-2.0, maintained by Intel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bench.operands import Operands
from bench.peers.base import DENSE, THREE_CONVS, Call, Peer, PeerError
from bench.peers.onnx_model import onnx_model
from bench.peers.runtimes import missing
from bench.problems import BenchProblem

OPENVINO = "openvino:"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def openvino_peers(problem: BenchProblem) -> list[Peer]:
    """Contiguous only, like the ONNX model; the runtime lays tensors out anew inside."""
    reason = missing("openvino", "onnx")
    if reason is None and problem.dtype == torch.bfloat16 and "BF16" not in _capabilities():
        reason = "OpenVINO computes bfloat16 models in float32 on this processor"
    return [
        Peer(f"{OPENVINO}{form}", "contiguous", _Request(form), unavailable=reason, form=form)
        for form in (DENSE, THREE_CONVS)
    ]


@dataclass(frozen=True)
class _Request:
    form: str

    def __call__(self, operands: Operands) -> Call:
        precision = PRECISIONS[operands.problem.dtype]
        options = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        core = _core()
        try:
            model = core.compile_model(core.read_model(onnx_model(operands, self.form)), "CPU", options)
        except RuntimeError as error:
            raise PeerError(f"OpenVINO: {str(error).strip()[:200]}") from error
        used = model.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used != precision:
            raise PeerError(f"OpenVINO computes in {used} where {precision} is asked for")
        input = operands.input.contiguous()
        output = torch.empty(operands.problem.output_shape, dtype=input.dtype)
        request = model.create_infer_request()
        request.set_input_tensor(0, _shared(input))
        request.set_output_tensor(0, _shared(output))

        def call() -> Tensor:
            request.infer(share_outputs=True)
            return output

        return call


@cache
def _core():
    import openvino

    return openvino.Core()


@cache
def _capabilities() -> tuple[str, ...]:
    return tuple(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _shared(tensor: Tensor):
    """The same memory as an OpenVINO tensor."""
    import openvino

    if tensor.dtype == torch.float32:
        return openvino.Tensor(tensor.numpy(), shared_memory=True)
    # numpy has no bfloat16.
    return openvino.Tensor(
        tensor.view(torch.int16).numpy(), openvino.Shape(list(tensor.shape)), openvino.Type.bf16
    )
