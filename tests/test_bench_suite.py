"""The suites of the benchmark: ceilings and floors, the peers outside torch, and runs that go on after a kill."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The harness lives in the repository, not in the wheel; appended, so that an installed tucker_ops stays first.
sys.path.append(str(Path(__file__).resolve().parents[1]))
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import suite
from bench.ceilings import WIDENED, Ceilings, measure_ceilings, with_ceilings
from bench.journal import Journal
from bench.measure import LEFT_OUT, MEASURED, Effort, gate, measure, rows_of
from bench.operands import float64_reference, make_operands, relative_rms
from bench.output import ROOFLINE_NAME, _ceilings, markdown, write
from bench.peers import DENSE, ONE_PASS, THREE_CONVS, Peer, PeerError, peers_of, suite_peers_of
from bench.peers.ort import ort_peers
from bench.problems import CPU, CPU_FULL, BenchProblem
from tucker_ops.errors import ConfigError
from tucker_ops.types import ConvSpec

QUICK = Effort(seconds=0.1, fewest_rounds=3, most_rounds=5, longest_call=10, memory=False)


def tiny(**changes) -> BenchProblem:
    spec = ConvSpec(16, 12, (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1))
    return dataclasses.replace(BenchProblem("tiny", "a test", spec, (8, 4), (6, 9, 7)), **changes)


@pytest.fixture(scope="module")
def host():
    module = pytest.importorskip("tucker_ops._host")
    if not hasattr(module, "peaks"):
        pytest.skip("the host module was built before it measured ceilings")
    return module


@pytest.fixture(scope="module")
def rows():
    return rows_of(measure(tiny(), peers_of(tiny()), QUICK))


def test_peaks_are_those_of_this_processor(host):
    loops = host.peaks()
    assert ("baseline", "float32") in loops
    rates = {loop: max(host.peak(*loop, 1, 0.02) for _ in range(3)) for loop in loops}
    assert all(0 < rate < 10_000 for rate in rates.values())
    if ("avx2", "float32") in loops:
        assert rates["avx2", "float32"] > 1.2 * rates["baseline", "float32"]


def test_a_copy_has_a_speed(host):
    assert 0.1 < host.copy(2, 1 << 24, 0.02) < 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("avx1024", "float32", 1, 0.01), "no loop for avx1024 float32; they have .*baseline float32"),
        (("baseline", "float16", 1, 0.01), "no loop for baseline float16"),
        (("baseline", "float32", 0, 0.01), "threads must be 1 to"),
        (("baseline", "float32", 1, math.nan), "seconds must be positive"),
    ],
)
def test_impossible_loops_are_refused(host, arguments, message):
    with pytest.raises(ValueError, match=message):
        host.peak(*arguments)
    with pytest.raises(ValueError, match="at least one a thread"):
        host.copy(2, 1, 0.01)


def test_ceilings_hold_every_dtype(host, monkeypatch):
    monkeypatch.setattr("bench.ceilings.LEAST_COPY_BYTES", 1 << 20)
    monkeypatch.setattr("bench.ceilings.COPY_CACHES", 0)
    monkeypatch.setattr("bench.ceilings.COPY_BYTES_A_THREAD", 0)
    measured = measure_ceilings("baseline")
    assert measured.reason is None and measured.copy_gb_per_s > 0
    assert measured.threads == torch.get_num_threads()
    assert measured.gflop_per_s["bfloat16"] == measured.gflop_per_s["float32"] > 0
    assert measured.loops == {"float32": "baseline float32", "bfloat16": WIDENED}
    assert "no loop for avx1024" in measure_ceilings("avx1024").reason


def test_without_the_host_module_there_are_rows_without_floors(rows, monkeypatch):
    monkeypatch.setattr("bench.ceilings._host", lambda: None)
    measured = measure_ceilings()
    assert "host module is absent" in measured.reason and "pip install" in measured.reason
    complete = with_ceilings(rows, [measured])
    assert all(row["floor_ms"] is None and row["share_of_peak"] is None for row in complete)
    assert "Ceilings unknown" in markdown(complete)


def test_floor_and_shares_by_hand():
    row = {"dtype": "float32", "floor_gflop": 2.0, "floor_bytes": 3e8, "median_ms": 40.0, "gflop_per_s": 75.0}
    start = Ceilings(2, "then", {"float32": 100.0}, {"float32": "avx2 float32"}, 20.0)
    end = Ceilings(2, "now", {"float32": 80.0}, {"float32": "avx2 float32"}, 30.0)
    (complete,) = with_ceilings([row], [start, end])
    # 2 GFLOP at 100 GFLOP/s are 20 ms; 0.3 GB at 30 GB/s are 10 ms.
    assert complete["floor_ms"] == pytest.approx(20) and complete["floor_bound"] == "arithmetic"
    assert complete["share_of_floor"] == pytest.approx(0.5)
    assert complete["share_of_peak"] == pytest.approx(0.75)
    assert [ceilings["date"] for ceilings in complete["ceilings"]] == ["then", "now"]
    assert complete["free_share"] is None
    (busy,) = with_ceilings([{**row, "peak_around": 60.0}], [start, end])
    assert busy["free_share"] == pytest.approx(0.6)
    assert "moved between 80 and 100 GFLOP/s" in " ".join(_ceilings(complete))
    assert not any("busy" in line for line in _ceilings(with_ceilings([row], [start])[0]))
    (slow_memory,) = with_ceilings([{**row, "floor_bytes": 3e9}], [start, end])
    assert slow_memory["floor_ms"] == pytest.approx(100) and slow_memory["floor_bound"] == "memory"


def test_rows_count_the_arithmetic_and_traffic_of_their_form(rows):
    voxels, out_voxels = 6 * 9 * 7, 6 * 5 * 7
    input, output = 16 * voxels, 12 * out_voxels
    weights = 16 * 8 + 8 * 4 * 27 + 4 * 12 + 12
    dense_macs, dense_bytes = out_voxels * 12 * 16 * 27, 4 * (input + output + 12 * 16 * 27 + 12)
    macs = voxels * 16 * 8 + out_voxels * (8 * 4 * 27 + 4 * 12)
    one_pass_bytes = 4 * (input + output + weights)
    three_bytes = one_pass_bytes + 8 * (8 * voxels + 4 * out_voxels)
    expected = {
        DENSE: (dense_macs, dense_bytes, dense_macs, dense_bytes),
        THREE_CONVS: (macs, three_bytes, macs, one_pass_bytes),
        ONE_PASS: (macs, one_pass_bytes, macs, one_pass_bytes),
    }
    for row in rows:
        macs, bytes, floor_macs, floor_bytes = expected[row["form"]]
        assert row["gflop"] == pytest.approx(2e-9 * macs) and row["bytes"] == bytes
        assert row["floor_gflop"] == pytest.approx(2e-9 * floor_macs) and row["floor_bytes"] == floor_bytes
        if row["status"] == MEASURED:
            assert row["gb_per_s"] == pytest.approx(bytes / row["median_ms"] / 1e6)


def test_the_strongest_peer_is_the_fastest_that_is_not_ours(rows):
    others = [row for row in rows if not row["peer"].startswith("tucker_ops:")]
    best = min(others, key=lambda row: row["median_ms"])
    assert {row["strongest_peer"] for row in rows} == {f"{best['peer']}-{best['layout']}"}
    assert best["ratio_to_strongest"] == 1


PROBLEMS = {
    "strided": tiny(),
    "dilated": tiny(spec=dataclasses.replace(tiny().spec, dilation=(1, 2, 1), padding=(0, 2, 1)), batch=2),
    "slice": tiny(spec=ConvSpec(8, 8, (3, 3), (1, 1), (1, 1), (1, 1)), size=(9, 10)),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
def test_runtimes_compute_the_float64_answer(family, problem):
    peers = [peer for peer in suite_peers_of(problem) if peer.name.startswith(f"{family}:")]
    assert {peer.form for peer in peers} == {DENSE, THREE_CONVS}
    if peers[0].unavailable:
        pytest.skip(peers[0].unavailable)
    operands = make_operands(problem)
    for peer in peers:
        result = peer.prepare(operands)()
        assert result.shape == problem.output_shape
        assert relative_rms(result, float64_reference(operands)) <= gate(problem)


@pytest.mark.parametrize("family", ["onnxruntime", "openvino"])
def test_runtimes_compute_bf16_or_say_why_not(family):
    problem = tiny(dtype_name="bfloat16")
    peers = [peer for peer in suite_peers_of(problem) if peer.name.startswith(f"{family}:")]
    for entry in measure(problem, peers, QUICK):
        assert entry.status == MEASURED or (entry.status == LEFT_OUT and entry.reason)


def test_compiled_layers_are_judged_by_the_eager_ones():
    peers = [peer for peer in suite_peers_of(tiny()) if peer.name.startswith("compile:")]
    assert [peer.judged_by.key for peer in peers] == [peer.key.removeprefix("compile:") for peer in peers]


def test_a_peer_is_not_prepared_where_its_judge_is_too_slow():
    def unwanted(operands):
        raise AssertionError("prepared")

    problem = tiny(size=(12, 12, 12))
    judge = next(peer for peer in peers_of(problem) if peer.name == DENSE)
    peer = Peer("compile:dense", "contiguous", unwanted, form=DENSE, judged_by=judge)
    (entry,) = measure(problem, [peer], dataclasses.replace(QUICK, longest_call=1e-9))
    assert entry.status == LEFT_OUT and "a call would take" in entry.reason


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    for peer in ort_peers(tiny()):
        assert "onnxruntime not installed; pip install" in peer.unavailable
        assert "[bench-peers]" in peer.unavailable


def test_a_runtime_that_fails_is_left_out():
    def failing(operands):
        raise PeerError("it cannot")

    (entry,) = measure(tiny(), [Peer("failing", "contiguous", failing)], QUICK)
    assert entry.status == LEFT_OUT and entry.reason == "it cannot"


def test_a_peer_far_behind_is_left_out(monkeypatch):
    import time

    def patient(operands):
        answer = float64_reference(operands).float()
        return lambda: time.sleep(0.2) or answer

    monkeypatch.setattr("bench.measure.NOTICEABLE", 0.01)
    quick = next(peer for peer in peers_of(tiny()) if peer.name == DENSE)
    quick.prepare(make_operands(tiny()))()
    peers = [Peer("patient", "contiguous", patient), quick]
    slow, fast = measure(tiny(), peers, dataclasses.replace(QUICK, most_times_fastest=5))
    assert fast.status == MEASURED
    assert slow.status == LEFT_OUT and "times as long as the fastest" in slow.reason


def test_short_calls_run_untimed_before_each_sample():
    runs = []

    def counted(operands):
        answer = float64_reference(operands).float()
        return lambda: runs.append(1) or answer

    effort = dataclasses.replace(QUICK, seconds=0, fewest_rounds=4, settle=0.005)
    (entry,) = measure(tiny(), [Peer("counted", "contiguous", counted)], effort)
    # Nothing is known of a call before its first sample.
    assert len(entry.seconds) == 4 and len(runs) > 3 * 10


def test_suites_hold_the_layers_of_both_networks():
    assert len({problem.name for problem in CPU_FULL}) == len(CPU_FULL)
    assert [(str(problem), problem.dtype_name) for problem in CPU][::2] == [
        (layer, "float32")
        for layer in (
            "32→32 3³ @128³ r16", "64→32 3³ @128³ r32/16", "32→64 3³ /2³ @128³ r16/32", "64→64 3³ @64³ r32",
            "128→128 3³ @32³ r64", "256→256 3³ @16³ r128", "320→320 3³ @8³ r160",
        )
    ]  # fmt: skip
    assert [problem.dtype_name for problem in CPU[1::2]] == ["bfloat16"] * 7
    layers = {str(problem) for problem in CPU_FULL}
    assert {"640→320 3³ @8³ r320/160", "320→320 3³ /2³ @8³ r80", "256→256 3³ @5×7×5 r88"} <= layers
    assert all(rank % 8 == 0 and rank >= 8 for problem in CPU_FULL for rank in problem.ranks)


def test_configurations_leave_out_what_would_repeat_the_machine(monkeypatch):
    def names(isas, cores, **changes):
        monkeypatch.setattr(suite, "instruction_sets", lambda: isas)
        monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
        return [(c.name, c.threads) for c in suite.Plan("cpu-full", **changes).configurations]

    assert names(("avx512", "avx2"), 8) == [("machine", None), ("one_thread", 1), ("avx2", None)]
    assert names(("avx2", "baseline"), 8) == [("machine", None), ("one_thread", 1)]
    assert names(("avx2", "baseline"), 1) == [("machine", None)]
    assert names(("avx512", "avx2"), 8, threads=4) == [("machine", 4), ("avx2", 4)]


def test_a_journal_belongs_to_one_run(tmp_path):
    path = Journal.beside(tmp_path / "latest")
    Journal(path, {"suite": "cpu", "problems": ("a",)}).add_rows("machine", "a", [{"ms": 1}])
    again = Journal(path, {"suite": "cpu", "problems": ("a",)})
    assert again.finished("machine") == {"a"} and again.rows("machine") == [{"ms": 1}]
    assert again.finished("avx2") == set()
    with pytest.raises(ConfigError, match=r"suite cpu, not cpu-full.*--restart"):
        Journal(path, {"suite": "cpu-full", "problems": ("a",)})


def test_a_kill_while_writing_leaves_the_old_journal_whole(tmp_path, monkeypatch):
    path = Journal.beside(tmp_path / "latest")
    journal = Journal(path, {"suite": "cpu"})
    journal.add_rows("machine", "a", [])
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        journal.add_rows("machine", "b", [])
    assert path.read_text() == before and Journal(path).finished("machine") == {"a"}


def test_a_killed_run_goes_on_with_the_rest(repo_root, tmp_path, monkeypatch, host):
    output = tmp_path / "results"
    path = Journal.beside(output)
    done, rest = "stage3_hippocampus_quarter", "stage3_hippocampus_third"
    plan = suite.Plan("cpu-full", (done, rest), seconds=0.05, threads=1)

    def killed_at_the_second(problem, peers, effort):
        if problem.name == rest:
            raise KeyboardInterrupt
        return measure(problem, peers_of(problem)[:2], QUICK)

    Journal(path, plan.identity())
    threads = torch.get_num_threads()
    monkeypatch.setattr(suite, "measure", killed_at_the_second)
    try:
        with pytest.raises(KeyboardInterrupt):
            suite.work(path, "machine", plan)
    finally:
        torch.set_num_threads(threads)
    kept = Journal(path).rows("machine")
    assert {row["problem"] for row in kept} == {done}

    command = [sys.executable, "-m", "bench", "--suite", "cpu-full", "--seconds", "0.05", "--threads", "1"]
    command += ["--problem", done, "--problem", rest, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(repo_root)])}
    ran = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"1/1 {rest}" in ran.stdout and not path.exists()
    rows = json.loads((output / "results.json").read_text())
    # A processor with more than AVX2 has them once more, held to AVX2.
    rows = [row for row in rows if row["configuration"] == "machine"]
    without_ceilings = [{key: row[key] for key in kept[0]} for row in rows if row["problem"] == done]
    assert without_ceilings == kept
    assert {row["problem"] for row in rows} == {done, rest}
    # One at each start, one at the end that was reached.
    assert all(
        len(row["ceilings"]) == 3 and row["floor_ms"] > 0 and 0 < row["free_share"] <= 1 for row in rows
    )
    for row in rows:
        if row["peer"].startswith("compile:"):
            assert row["status"] == MEASURED or "torch.compile fails" in row["reason"]
    families = {row["peer"].split(":")[0] for row in rows if row["problem"] == rest}
    assert families == {"dense", "three_convs", "compile", "onnxruntime", "openvino", "tucker_ops"}
    assert (output / ROOFLINE_NAME).read_bytes().startswith(b"\x89PNG")


def test_the_roofline_is_drawn_where_ceilings_are_known(rows, tmp_path):
    ceilings = Ceilings(2, "now", {"float32": 100.0}, {"float32": "avx2 float32"}, 20.0)
    write(with_ceilings(rows, [ceilings]), tmp_path / "known", ratios=False)
    assert sorted(path.name for path in (tmp_path / "known").iterdir()) == [
        "results.json", "results.md", ROOFLINE_NAME,
    ]  # fmt: skip
    assert "% floor" in (tmp_path / "known" / "results.md").read_text()
    write(rows, tmp_path / "unknown", ratios=False)
    assert not (tmp_path / "unknown" / ROOFLINE_NAME).exists()
