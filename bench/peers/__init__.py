"""Who computes a problem: torch, compiled torch, ONNX Runtime, OpenVINO, and tucker_ops' backends.

Input and weights are laid out, and models built and compiled, before the clock starts, so a peer pays only for
the conversions that it makes itself.
"""

from __future__ import annotations

from bench.peers.base import DENSE, LAYOUTS, ONE_PASS, OURS, THREE_CONVS, Call, Peer, PeerError
from bench.peers.compiled import compiled_peers
from bench.peers.eager import our_peers, torch_peers
from bench.peers.openvino import openvino_peers
from bench.peers.ort import ort_peers
from bench.problems import BenchProblem

__all__ = [
    "DENSE",
    "LAYOUTS",
    "ONE_PASS",
    "OURS",
    "THREE_CONVS",
    "Call",
    "Peer",
    "PeerError",
    "peers_of",
    "suite_peers_of",
]


def peers_of(problem: BenchProblem) -> tuple[Peer, ...]:
    """Torch's dense convolution, three torch convolutions, and every backend of tucker_ops."""
    return (*torch_peers(), *our_peers(problem))


def suite_peers_of(problem: BenchProblem) -> tuple[Peer, ...]:
    """The peers that a user would pick. Without the reference backend: it is three convolutions once more."""
    eager = torch_peers()
    ours = [peer for peer in our_peers(problem) if peer.form == ONE_PASS]
    return (*eager, *compiled_peers(eager), *ort_peers(problem), *openvino_peers(problem), *ours)
