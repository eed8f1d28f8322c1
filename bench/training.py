"""`python -m bench.training`: the op with its gradient, and training steps of the compressed hippocampus network.

Peers are three convolutions a layer and the dense layer, as torch runs them: contiguous, as nnU-Net does, and
channels-last. Ours runs as it is, and keeping its intermediates for the gradient (TUCKER_KEEP_STAGES=1); the dense
network by our kernels too. Gradients are checked before anything is timed; peers take turns in a shuffled order, and
ratios are taken within each round.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import tucker_ops
from bench.folders import as_json
from bench.network_cases import as_convolutions
from bench.operands import relative_rms
from bench.provenance import REPOSITORY, provenance
from tucker_ops import CompressionConfig
from tucker_ops.nnunet.output import write_file
from tucker_ops.ops.gradient import KEEP_VARIABLE

EXAMPLE = REPOSITORY.joinpath(
    "examples/hippocampus/model/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres"
)
OURS, THREE, DENSE = "tucker_ops", "three convolutions", "dense"
KEPT = f"{OURS}, t and z kept"
FUSED_DENSE = f"{OURS}, dense"
# Relative RMS of a gradient against float64's.
GATE = 1e-4
LAST = torch.channels_last_3d
Step = Callable[[], object]


def op_steps(extent: int) -> dict[tuple[str, str], Step]:
    """32 channels, ranks 16, kernel 3×3×3: gradients of input, weights and bias."""
    torch.manual_seed(0)
    dense = nn.Conv3d(32, 32, 3, padding=1)
    tucker = tucker_ops.nn.TuckerConv3d(32, 32, 3, (16, 16), padding=1)
    three = as_convolutions(nn.Sequential(tucker))
    x = torch.randn(1, 32, *(extent,) * 3)
    grad = torch.randn(1, 32, *(extent,) * 3)
    exact = _gradients(copy.deepcopy(tucker).double(), x.double(), grad.double())
    steps: dict[tuple[str, str], Step] = {}
    for name, module in ((OURS, tucker), (THREE, three), (DENSE, dense)):
        for layout, form in (("contiguous", torch.contiguous_format), ("channels-last", LAST)):
            laid_out = copy.deepcopy(module)
            if name != OURS:
                laid_out = laid_out.to(memory_format=form)
            values = x.contiguous(memory_format=form), grad.contiguous(memory_format=form)
            if name != DENSE:
                _check(f"{name} {layout}", _gradients(laid_out, *values), exact)
            steps[name, layout] = lambda m=laid_out, v=values: _gradients(m, *v)
            if name == OURS:
                steps[KEPT, layout] = _keeping(steps[name, layout])
                _check(f"{KEPT} {layout}", steps[KEPT, layout](), exact)
    return steps


def _keeping(step: Step) -> Step:
    def kept():
        os.environ[KEEP_VARIABLE] = "1"
        try:
            return step()
        finally:
            del os.environ[KEEP_VARIABLE]

    return kept


def _gradients(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(module(x), [x, *module.parameters()], grad))


def _check(name: str, found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, exact, strict=True):
        error = relative_rms(ours.reshape(theirs.shape), theirs)
        if not error <= GATE:
            raise SystemExit(f"{name}: a gradient is off by {error:.1e}, more than {GATE}; nothing was timed")


def network_steps(batch: int, **budget: float) -> dict[tuple[str, str], Step]:
    """The example's trained network at its own patch size; a step: loss and gradients, no optimiser.

    Compressed by ``factor``, or to a share of its ``params``, which leaves the layers at full extents dense.
    """
    from tucker_ops.nnunet.checkpoint import read_checkpoint
    from tucker_ops.nnunet.folder import read_model_folder
    from tucker_ops.nnunet.networks import build_network

    folder = read_model_folder(EXAMPLE)
    dense = build_network(
        folder.architecture, folder.input_channels, folder.num_outputs, deep_supervision=True
    )
    checkpoint = read_checkpoint(folder.checkpoint_path(folder.folds[0]))
    dense.load_state_dict(checkpoint["network_weights"])
    if "params" in budget:
        budget["params"] = int(budget["params"] * sum(p.numel() for p in dense.parameters()))
    tucker = tucker_ops.compress(dense, CompressionConfig(**budget))
    torch.manual_seed(0)
    x = torch.randn(batch, folder.input_channels, *folder.patch_size)
    networks = {
        (OURS, "as nnU-Net"): tucker_ops.fuse(tucker),
        (FUSED_DENSE, "as nnU-Net"): tucker_ops.fuse(dense),
        (THREE, "as nnU-Net"): as_convolutions(tucker),
        (THREE, "channels-last"): as_convolutions(tucker).to(memory_format=LAST),
        (DENSE, "as nnU-Net"): dense,
        (DENSE, "channels-last"): copy.deepcopy(dense).to(memory_format=LAST),
    }
    steps: dict[tuple[str, str], Step] = {}
    for (name, layout), network in networks.items():
        given = x.contiguous(memory_format=LAST) if layout == "channels-last" else x
        network.train()
        steps[name, layout] = lambda n=network, v=given: _step(n, v)
    for name, peer in ((OURS, THREE), (FUSED_DENSE, DENSE)):
        ours, theirs = (_step(networks[n, "as nnU-Net"], x) for n in (name, peer))
        if not abs(ours - theirs) <= 1e-4 * abs(theirs):
            raise SystemExit(f"losses differ: {ours} by {name}, {theirs} by {peer}; nothing was timed")
    return steps


def _step(network: nn.Module, x: Tensor) -> float:
    network.zero_grad(set_to_none=True)
    loss = sum(nn.functional.cross_entropy(out, out.detach().argmax(1)) for out in network(x))
    loss.backward()
    return loss.item()


def measure(case: str, steps: dict[tuple[str, str], Step], rounds: int) -> list[dict]:
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for turn in range(rounds + 1):
        for key in random.Random(turn).sample(list(steps), len(steps)):
            begin = time.perf_counter()
            steps[key]()
            if turn:
                samples[key].append(1e3 * (time.perf_counter() - begin))
    best = {
        name: min((key for key in samples if key[0] == name), key=lambda key: statistics.median(samples[key]))
        for name in (OURS, THREE, DENSE)
    }
    rows = []
    for (name, layout), times in samples.items():
        row = {"case": case, "peer": name, "layout": layout, "rounds": rounds}
        row |= {"median_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times)}
        for other in (THREE, DENSE):
            row[f"ratio_to_best_{other.replace(' ', '_')}"] = _ratio(times, samples[best[other]])
        if (THREE, "as nnU-Net") in samples:
            row["ratio_to_three_convolutions_as_nnunet"] = _ratio(times, samples[THREE, "as nnU-Net"])
        rows.append(row)
    return rows


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--extent", type=int, default=64, help="edge of the op's input in voxels")
    parser.add_argument(
        "--factor", type=float, default=0.5, help="ranks of the network, as a share of channels"
    )
    parser.add_argument(
        "--params", type=float, default=0.12, help="parameters of the network, as a share of the dense one's"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=REPOSITORY / "bench" / "results" / "latest_training"
    )
    options = parser.parse_args(arguments)
    os.environ.pop(KEEP_VARIABLE, None)
    rows = measure(f"op 32ch@{options.extent}³ r16", op_steps(options.extent), options.rounds)
    rows += measure(
        f"hippocampus network, factor {options.factor}",
        network_steps(2, factor=options.factor),
        options.rounds,
    )
    rows += measure(
        f"hippocampus network, {options.params:.0%} of its parameters",
        network_steps(2, params=options.params),
        options.rounds,
    )
    origin = provenance()
    text = _table(rows, origin)
    print(text)
    write_file(options.output / "results.md", text.encode(), force=True)
    write_file(options.output / "results.json", as_json([row | origin for row in rows]).encode(), force=True)
    print(f"Written to {options.output}")


def _onednn() -> str:
    """Torch's own kernels may be held to fewer instructions, to stand for another processor."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"ONEDNN_MAX_CPU_ISA={limit}, " if limit else ""


def _table(rows: Sequence[dict], origin: dict) -> str:
    """Markdown: ratios are medians of time ÷ time within each round, below 1 is faster."""
    lines = [
        "# Gradients on the CPU",
        "",
        f"`python -m bench.training`, commit {origin['commit']}, {origin['cpu']} ({origin['tucker_ops_isa']}), "
        f"{origin['threads']} threads, torch {origin['torch']}, {_onednn()}fp32. "
        f"Ratios are medians over {rows[0]['rounds']} rounds, below 1 is faster.",
        "",
        "| | peer | layout | ms (fastest to slowest) | ÷ best three | ÷ best dense | ÷ three, as nnU-Net |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = [
            row["ratio_to_best_three_convolutions"],
            row["ratio_to_best_dense"],
            row.get("ratio_to_three_convolutions_as_nnunet"),
        ]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        times = f"{row['median_ms']:.0f} ({row['fastest_ms']:.0f} to {row['slowest_ms']:.0f})"
        lines.append(f"| {row['case']} | {row['peer']} | {row['layout']} | {times} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
