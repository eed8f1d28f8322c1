"""The benchmark of GPUs, tiny and on the CPU: rows, refusals, failures, the table. Its times mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import tucker_ops
from bench.gpu import blocks, clock, gradients, networks, ops, output, turns
from bench.gpu.__main__ import PARTS, conclude, main, run_part
from bench.gpu.ceilings import float32_by
from bench.gpu.clock import Clock
from bench.gpu.problems import TARGETS, gradient_cases, op_cases
from bench.gpu.provenance import provenance
from bench.gpu.turns import FAILED, OURS, Peer, Settings
from bench.gpu.unet import PlainConvUNet
from bench.measure import LEFT_OUT, MEASURED, REFUSED
from tucker_ops import CompressionConfig
from tucker_ops.backends import native
from tucker_ops.backends.cuda import tf32_allowed

CPU = torch.device("cpu")
FEATURES = (8, 16)


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setattr(turns, "MOST_ROUNDS", 2)
    monkeypatch.setattr(turns, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(clock, "IN_A_ROW", 1)
    # Threads take longer to meet than these sizes to compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Settings(CPU, seconds=0, compile=False, backend="reference", shrink=32)
    torch.set_num_threads(threads)


@pytest.fixture
def in_float32(settings):
    """In which networks are fused on a processor as well."""
    if not native.load():
        pytest.skip(native.load().reason)
    return replace(settings, backend=None, dtype=torch.float32)


def test_ceilings(settings):
    (row,) = PARTS["ceilings"](replace(settings, shrink=64))
    assert row["copy_gb_per_s"] > 0 and set(row["tflop_per_s"]) == {"float16", "bfloat16", "tf32", "float32"}
    assert not row["reasons"] and all(rate > 0 for rate in row["tflop_per_s"].values())


def test_every_layer_and_peer_of_the_op(settings, monkeypatch):
    cases = [case for case in op_cases(32) if case.name in ("stage0", "down1")]
    monkeypatch.setattr(ops, "op_cases", lambda shrink: cases)
    rows = list(ops.measure_ops(settings))
    assert len(rows) == len(cases) * 8
    for row in rows:
        if "torch.compile" in row["peer"]:
            assert row["status"] == LEFT_OUT and "turned off" in row["reason"]
            continue
        assert row["status"] == MEASURED, row
        assert 0 < row["relative_rms"] <= row["gate"]
        assert row["q1_us"] <= row["median_us"] <= row["q3_us"] and row["dense_ratio"] > 0
    assert {row["case"] for row in rows if row["targets"]} == {"stage0"}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_peer_of_the_gradient(kind, settings, monkeypatch):
    # Not smaller: see `onednn_errs`.
    cases = [replace(c, problem=replace(c.problem, dtype_name=kind), kind=kind) for c in gradient_cases(16)]
    assert [str(case.problem) for case in gradient_cases()] == ["32→32 3³ @128³ r16", "64→64 3³ @64³ r32"]
    monkeypatch.setattr(gradients, "gradient_cases", lambda shrink: cases)
    rows = list(PARTS["gradient"](settings))
    assert len(rows) == len(cases) * 6
    for row in rows:
        assert row["status"] == MEASURED, row
        assert 0 < row["relative_rms"] <= row["gate"] and row["three_ratio"] > 0
    lines = output.summary(output.with_floors(rows, None, {}))
    assert sum("tucker_conv" in line for line in lines) == len(cases)


def test_a_gradient_that_is_wrong_is_refused(settings, monkeypatch):
    real = gradients._ours
    monkeypatch.setattr(
        gradients, "_ours", lambda *args: (lambda *t: 1.01 * real(*args)[0](*t), real(*args)[1])
    )
    rows = list(PARTS["gradient"](settings))
    assert {row["peer"] for row in rows if row["status"] == REFUSED} == {"tucker_conv"}


def test_the_layers_are_those_asked_for():
    cases = {(case.problem.name, case.kind): case for case in op_cases()}
    assert len(cases) == 13 and set(TARGETS) <= set(cases)
    texts = [str(case.problem) for case in cases.values() if case.kind == "float16"]
    assert texts == [
        "32→32 3³ @128³ r16", "64→64 3³ @64³ r32", "128→128 3³ @32³ r64", "256→256 3³ @16³ r128",
        "320→320 3³ @8³ r160", "32→64 3³ /2³ @128³ r16/32", "64→32 3³ @128³ r32/16",
    ]  # fmt: skip
    assert cases["stage0_128", "float16"].copied_bytes == 2 * 32 * 128**3 * 2


def test_tf32_is_switched_for_the_backend_as_well():
    before = tf32_allowed()
    for tf32 in (True, False):
        with float32_by(tf32):
            assert tf32_allowed() == tf32
    assert tf32_allowed() == before


def test_block(in_float32, monkeypatch):
    monkeypatch.setattr(blocks, "EXTENT", 8)
    rows = list(blocks.measure_blocks(replace(in_float32, shrink=1)))
    for row in rows:
        if "torch.compile" in row["peer"]:
            assert row["status"] == LEFT_OUT
        else:
            assert row["status"] == MEASURED and 0 < row["relative_rms"] < 1e-5, row
    assert [row["peer"] for row in rows if row["targets"]] == ["tucker_block"]
    assert [row["peer"] for row in rows if row["shown"]] == [
        "tucker_block", "tucker_block, then scale and shift of the norm", "fuse",
    ]  # fmt: skip


def test_network(in_float32):
    rows = {row["peer"]: row for row in networks.measure_networks(in_float32, FEATURES)}
    for peer, row in rows.items():
        if "graph" in peer:
            assert row["status"] == FAILED and "on a GPU" in row["reason"]
        elif "torch.compile" in peer:
            assert row["status"] == LEFT_OUT
        else:
            assert row["status"] == MEASURED and row["relative_rms"] > 0, row
    assert rows["fused"]["targets"]["peak"] == 0.5 and rows["fused, CUDA graph"]["targets"]["ms"] == 2.5
    assert rows["fused"]["dense_peer"] == "dense, autocast, as nnU-Net runs it, NCDHW"


def test_what_no_kernel_fuses_is_no_figure_of_ours(settings):
    rows = {row["peer"]: row for row in networks.measure_networks(settings, FEATURES)}
    assert rows["fused"]["status"] == FAILED and "not fused" in rows["fused"]["reason"]
    assert rows["three convolutions, half"]["status"] == MEASURED


def test_floor_of_a_network(settings):
    _, tucker = blocks.networks(lambda: PlainConvUNet(features=FEATURES), settings)
    x = torch.zeros(1, 1, 8, 8, 8).half()
    weights = sum(
        p.numel() for name, p in tucker.named_parameters() if "all_modules" not in name and "norm" not in name
    )
    fine, coarse = 8**3, 4**3
    read = (1 + 8) * fine + 8 * fine + 16 * coarse + (8 * fine + 16 * coarse) + 8 * fine + 8 * fine
    written = 8 * fine * 2 + 16 * coarse * 2 + 8 * fine * 2 + 25 * fine
    assert networks.floor_of(tucker, x)[0] == 2 * (read + written + weights)


def test_the_twin_equals_nnunets_network():
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    features = (8, 8, 16)
    original = unet.PlainConvUNet(
        1, 3, features, torch.nn.Conv3d, 3, (1, 2, 2), 2, 25, 2, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    ).eval()  # fmt: skip
    twin = PlainConvUNet(features=features).eval()
    assert list(twin.state_dict()) == list(original.state_dict())
    twin.load_state_dict(original.state_dict())
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        assert torch.equal(twin(x), original(x))


def test_the_twin_compresses_and_fuses_whole():
    pytest.importorskip("tensorly")
    twin = PlainConvUNet(features=(8, 16, 16)).eval().requires_grad_(False)
    tucker_ops.compress(twin, CompressionConfig(factor=0.5))
    layers = tucker_ops.fused.explain(twin).layers
    assert len(layers) == 3 * 2 * 5 + 2 + 1 and all(layer.fused for layer in layers)
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(tucker_ops.fuse(twin)(x), twin(x), rtol=1e-3, atol=1e-3)


ABOUT = {
    "part": "op", "case": "stage0", "layer": "a layer", "kind": "float16", "gate": 1e-3, "floor_bytes": 1000,
    "floor_macs": 10, "copied_bytes": 1000, "how": "one pass",
    "predicted_us": 3.25,
}  # fmt: skip


def measured(settings, **calls):
    peers = []
    for name, (call, error) in calls.items():
        ours = name == "ours"
        group, targets = (OURS, {"floor": 1e9, "dense": 1e9}) if ours else ("dense", {})
        peers.append(Peer(name, "", group, lambda call=call: call, error, shown=ours, targets=targets))
    return turns.measure(peers, 1e-3, Clock(CPU, apart=True), settings, ABOUT)


def test_wrong_and_failing_peers_stop_nobody(settings):
    def broken():
        raise ValueError("no such kernel\nand more")

    x = torch.ones(4)
    right, wrong, nan, failed = measured(
        settings,
        right=(lambda: x.clone(), lambda result: float((result - 1).abs().max())),
        wrong=(lambda: x.clone(), lambda result: 0.1),
        nan=(lambda: x.clone(), lambda result: float("nan")),
        failed=(broken, lambda result: 0.0),
    )
    assert right["status"] == MEASURED and right["rounds"] == 2
    assert (
        wrong["status"] == nan["status"] == REFUSED and not wrong["rounds"] and "the gate is" in nan["reason"]
    )
    assert failed["status"] == FAILED and failed["reason"] == "ValueError: no such kernel"


def test_a_result_that_nobody_writes_is_refused(settings):
    kept = torch.ones(4)
    times = []

    def once():
        # As a graph that captured nothing: its output stays what it was.
        if not times:
            kept.fill_(1)
        times.append(1)
        return kept

    (row,) = measured(settings, ours=(once, lambda result: float((result - 1).abs().max())))
    assert row["status"] == REFUSED


def test_slow_preparation_is_given_up(settings):
    def endless():
        try:
            while True:
                time.sleep(0.01)
        except Exception:
            return lambda: None

    kept = []
    peers = [
        Peer("slow", "", "dense, compiled", endless, lambda result: 0.0, slow=True),
        Peer("ours", "", OURS, lambda: lambda: torch.ones(9), lambda result: 0.0),
    ]
    hasty = replace(settings, compile=True, compile_seconds=0.2, keep=kept.append)
    slow, ours = turns.measure(peers, 1e-3, Clock(CPU, apart=True), hasty, ABOUT)
    assert slow["status"] == LEFT_OUT and "not ready after" in slow["reason"] and ours["status"] == MEASURED
    # What was known before it.
    ((early,),) = kept
    assert early["peer"] == "ours" and early["rounds"] == 2


def test_nothing_is_begun_after_the_deadline(settings):
    late = replace(settings, deadline=time.monotonic() - 1)
    rows = list(networks.measure_networks(late, FEATURES))
    assert rows and all(row["status"] == LEFT_OUT for row in rows)


def test_table_files_and_exit_code(settings, tmp_path, capsys):
    def rows_of(error):
        call = lambda: torch.ones(1000)  # noqa: E731
        return measured(settings, ours=(call, lambda result: error), dense=(call, lambda result: 0.0))

    ceilings = {"part": "ceilings", "reasons": {}, "copy_gb_per_s": 10.0, "tflop_per_s": {"float16": 1.0}}
    origin = provenance(CPU, "abcdef")
    folder = tmp_path / "out"
    assert conclude([ceilings, *rows_of(1e-4)], origin, folder) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("| stage0 | a layer | float16 | ours: one pass |")
    assert (
        "÷ copy ≤ 1e+09" in printed
        and "met" in printed
        and "dense ≥ 1e+09" in printed
        and "MISSED" in printed
    )
    written = json.loads((folder / output.JSON_NAME).read_text())
    assert all(row["commit"] and "driver" in row for row in written) and len(written) == 3
    assert "## All peers" in (folder / output.TABLE_NAME).read_text()
    # A second run replaces the first, and a wrong result is told by the exit code.
    stopped = {"part": "network", "status": LEFT_OUT, "reason": "ended after 140 s"}
    assert conclude([*rows_of(0.1), stopped], origin, folder) == 1
    printed = capsys.readouterr().out
    assert "ours () refused: relative RMS error 1.0e-01" in printed and "ended after 140 s" in printed
    assert "not measured" in printed.splitlines()[-1]
    (folder / "mine.txt").touch()
    conclude(rows_of(1e-4), origin, folder)
    assert "is not replaced" in capsys.readouterr().err and (folder / "mine.txt").exists()


def test_a_part_that_breaks_leaves_a_row(settings, monkeypatch):
    def broken(settings):
        yield {"part": "op", "status": MEASURED}
        raise RuntimeError("out of memory")

    monkeypatch.setitem(PARTS, "op", broken)
    rows = list(run_part("op", settings))
    assert [row["status"] for row in rows] == [MEASURED, FAILED] and "out of memory" in rows[1]["reason"]
    torch.backends.cudnn.benchmark = False


def test_a_part_in_its_own_process(tmp_path, capsys):
    arguments = ["--part", "ceilings", "--device", "cpu", "--shrink", "64", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "Ceilings: copy " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / output.JSON_NAME).read_text())[0]["device"] == "cpu"


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU here")
    assert main([]) == 2 and "NVIDIA GPU" in capsys.readouterr().err


def test_instructions_are_counted_without_a_gpu():
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from bench.gpu.instructions import Code, _executed, table
    from tucker_ops.backends.triton import launch

    run = launch.launch
    lines = table(32, 16, 64, torch.float16, 90).splitlines()
    assert launch.launch is run
    assert [line.split(" | ")[:2] for line in lines[4:6]] == [
        ["| forward", "reduce_rows"],
        ["| forward", "convolve_rows"],
    ]
    assert len(lines) == 11
    for line in lines[4:]:
        *_, registers, spills, shared, instructions = (
            int(word) for word in line.strip("| ").split(" | ")[2:]
        )
        assert 16 <= registers <= 255 and spills == 0 and 0 < shared <= 99 and instructions >= 4
    # 100 instructions, of which 20 run nine times and 30 twice: 100 + 8 · 20 + 30.
    code = Code(32, 0, 100, ((20, False), (30, True)))
    constants = {"BLOCK_K": 64, "BLOCK_C": 32, "TOGETHER": 3, "UNIT_K": 8, "UNIT_C": 8}
    constants |= {f"KERNEL_{axis}": 3 for axis in "DHW"}
    assert _executed("convolve_rows", code, constants, {"RANK_IN": 2, "CHANNELS": 8}) == 290


def test_it_needs_neither_nnunet_nor_plots(repo_root):
    absent = ["nnunetv2", "dynamic_network_architectures", "tensorly", "matplotlib", "rich", "typer", "onnx"]
    code = f"import sys\nfor name in {absent}: sys.modules[name] = None\nimport bench.gpu.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True)
