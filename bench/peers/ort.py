"""ONNX Runtime on the CPU, of the dense convolution and of three convolutions. MIT, maintained by Microsoft."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from bench.operands import Operands, make_operands
from bench.peers.base import DENSE, THREE_CONVS, Call, Peer, PeerError
from bench.peers.onnx_model import INPUT, OUTPUT, element_type, onnx_model
from bench.peers.runtimes import missing, unlimited
from bench.problems import SMALL, BenchProblem

ORT = "onnxruntime:"


def ort_peers(problem: BenchProblem) -> list[Peer]:
    """Contiguous only: ONNX has no other layout, and the runtime lays tensors out anew inside."""
    reason = missing("onnxruntime", "onnx") or unlimited("ONNX Runtime")
    if reason is None and problem.dtype != torch.float32:
        reason = _unable(problem.dtype_name)
    return [
        Peer(f"{ORT}{form}", "contiguous", _Session(form), unavailable=reason, form=form)
        for form in (DENSE, THREE_CONVS)
    ]


@dataclass(frozen=True)
class _Session:
    form: str

    def __call__(self, operands: Operands) -> Call:
        session = session_of(onnx_model(operands, self.form))
        input = operands.input.contiguous()
        return BoundSession(session, input, torch.empty(operands.problem.output_shape, dtype=input.dtype))


def session_of(model: bytes):
    """A session on torch's number of threads; PeerError where the runtime refuses the model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads would go on spinning after a call, while the next peer has its turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Its exceptions have no common base below Exception.
        raise PeerError(f"ONNX Runtime: {str(error).split(' : ')[-1].strip()[:200]}") from error


class BoundSession:
    """A call that reads and writes torch's memory, of which the runtime knows the addresses only."""

    def __init__(self, session, input: Tensor, output: Tensor) -> None:
        self._session, self._input, self._output = session, input, output
        self._binding, dtype = session.io_binding(), element_type(input.dtype)
        self._binding.bind_input(INPUT, "cpu", 0, dtype, list(input.shape), input.data_ptr())
        self._binding.bind_output(OUTPUT, "cpu", 0, dtype, list(output.shape), output.data_ptr())

    def __call__(self) -> Tensor:
        self._session.run_with_iobinding(self._binding)
        return self._output


@cache
def _unable(dtype_name: str) -> str | None:
    """Why it cannot convolve this dtype here, asked of a small layer."""
    problem = replace(SMALL[0].cropped(4), dtype_name=dtype_name)
    try:
        _Session(DENSE)(make_operands(problem))
    except PeerError as error:
        return f"computes no {dtype_name} convolution on this processor ({error})"
    return None
