"""The benchmark harness: complete rows, wrong answers refused before timing, memory, the written files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

# The harness lives in the repository, not in the wheel; appended, so that an installed tucker_ops stays first.
sys.path.append(str(Path(__file__).resolve().parents[1]))
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench.__main__ import main
from bench.measure import LEFT_OUT, MEASURED, REFUSED, Effort, gate, measure, rows_of
from bench.memory import CLEAR_REFS, measure_peak
from bench.operands import float64_reference, make_operands, relative_rms
from bench.output import check_replaceable, write
from bench.peers import DENSE, THREE_CONVS, Peer, peers_of
from bench.problems import FULL, SMALL, BenchProblem, select
from tucker_ops.errors import ConfigError, OutputExistsError
from tucker_ops.types import ConvSpec

QUICK = Effort(seconds=0.2, fewest_rounds=3, most_rounds=5, longest_call=10, memory=False)


def tiny(**changes) -> BenchProblem:
    spec = ConvSpec(16, 12, (3, 3, 3), (1, 2, 1), (1, 1, 1), (1, 1, 1))
    return dataclasses.replace(BenchProblem("tiny", "a test", spec, (8, 8), (6, 9, 7)), **changes)


@pytest.fixture(scope="module")
def measurements():
    return measure(tiny(), effort=QUICK)


def test_every_peer_is_measured_or_says_why_not(measurements):
    names = {(entry.peer.name, entry.peer.layout) for entry in measurements}
    layouts = ("contiguous", "channels_last")
    ours = ("tucker_ops:cuda", "tucker_ops:triton", "tucker_ops:cpu", "tucker_ops:reference")
    assert {(n, x) for n in (DENSE, THREE_CONVS, *ours) for x in layouts} == names
    for layout in layouts:
        chosen = [entry for entry in measurements if entry.peer.layout == layout and entry.peer.automatic]
        assert len(chosen) == 1 and chosen[0].status == MEASURED
    for entry in measurements:
        if entry.status == LEFT_OUT:
            assert entry.peer.name in ours[:-1] and entry.reason
        else:
            assert entry.status == MEASURED
            assert QUICK.fewest_rounds <= len(entry.seconds) <= QUICK.most_rounds
            assert 0 <= entry.relative_rms <= gate(tiny())


def test_rows_are_complete(measurements):
    rows = json.loads(json.dumps(rows_of(measurements)))
    for row in rows:
        assert row["device"] == "cpu" and row["torch"] == torch.__version__ and row["date"]
        assert row["threads"] == torch.get_num_threads()
        assert row["torch_isa"] and row["dtype"] == "float32" and row["input_size"] == [6, 9, 7]
        if row["status"] == MEASURED:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["gflop_per_s"] == pytest.approx(row["gflop"] / row["median_ms"] * 1e3)
            assert row["ratio_to_dense"] > 0 and row["ratio_to_three_convs"] > 0
    dense = next(row for row in rows if row["peer"] == DENSE)
    # 6 × 5 × 7 outputs, two operations a multiply-accumulate.
    assert dense["gflop"] == pytest.approx(2 * 6 * 5 * 7 * 12 * 16 * 27 / 1e9)


def test_ratios_are_to_the_faster_layout(measurements):
    for name, ratio in ((DENSE, "ratio_to_dense"), (THREE_CONVS, "ratio_to_three_convs")):
        both = [entry for entry in measurements if entry.peer.name == name]
        best = min(both, key=lambda entry: entry.median)
        assert getattr(best, ratio) == 1 and best.best_layout
        assert [entry.best_layout for entry in both].count(True) == 1
        assert {getattr(entry, f"{name}_layout") for entry in measurements} == {best.peer.layout}


class CountedPeer:
    """Prepares calls that return the float64 answer times `factor`, and counts how often they run."""

    def __init__(self, factor: float):
        self.factor = factor
        self.runs = 0

    def __call__(self, operands):
        def call():
            if operands.problem == tiny():
                self.runs += 1
            return (float64_reference(operands) * self.factor).float()

        return call


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_wrong_result_is_refused_and_never_timed(factor):
    wrong, right = CountedPeer(factor), CountedPeer(1.0)
    peers = [Peer("wrong", "contiguous", wrong), Peer("right", "contiguous", right)]
    refused, accepted = measure(tiny(), peers, QUICK)
    assert refused.status == REFUSED and refused.seconds == () and "gate" in refused.reason
    assert accepted.status == MEASURED and right.runs >= 1 + QUICK.fewest_rounds
    assert wrong.runs == 1
    assert rows_of([refused])[0]["median_ms"] is None


def test_a_wrong_shape_is_refused():
    peer = Peer("wrong", "contiguous", lambda operands: lambda: torch.zeros(1, 12, 1, 1, 1))
    (refused,) = measure(tiny(), [peer], QUICK)
    assert refused.status == REFUSED and "(1, 12, 1, 1, 1)" in refused.reason


def test_a_peer_that_would_take_too_long_is_left_out_with_the_estimate():
    impatient = dataclasses.replace(QUICK, longest_call=1e-9)
    large = tiny(size=(12, 12, 12))
    dense = next(peer for peer in peers_of(large) if peer.name == DENSE)
    (entry,) = measure(large, [dense], impatient)
    assert entry.status == LEFT_OUT and "judged by a crop of 4×4×4" in entry.reason


def test_the_float64_reference_is_the_dense_convolution_with_the_composed_kernel(monkeypatch):
    # Small slabs, so that halos and borders between them are met.
    monkeypatch.setattr("bench.operands.REFERENCE_COLUMN_BYTES", 1)
    for stride in ((1, 1, 1), (2, 1, 3)):
        spec = dataclasses.replace(tiny().spec, stride=stride, dilation=(2, 1, 1), padding=(2, 1, 0))
        operands = make_operands(tiny(spec=spec, batch=2))
        u_in, core, u_out, bias = (tensor.double() for tensor in operands.factors)
        kernel = torch.einsum("or,rsxyz,si->oixyz", u_out, core, u_in)
        expected = F.conv3d(operands.input.double(), kernel, bias, *operands.geometry)
        assert relative_rms(float64_reference(operands), expected) < 1e-13


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the high-water mark can be set back on Linux only")
def test_memory_of_three_convolutions_holds_both_intermediates():
    spec = ConvSpec(8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    problem = BenchProblem("memory", "a test", spec, (8, 8), (64, 64, 64))
    three = next(p for p in peers_of(problem) if p.name == THREE_CONVS and p.layout == "contiguous")
    intermediate = 8 * 64**3 * 4
    # The first intermediate is freed before the last convolution, so at least one, and the output is not counted.
    assert intermediate * 0.9 < measure_peak(problem, three).extra_bytes < 8 * intermediate


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the high-water mark can be set back on Linux only")
def test_memory_that_cannot_be_measured_has_a_reason():
    spec = dataclasses.replace(tiny().spec, padding=(-1, 1, 1))
    peak = measure_peak(tiny(spec=spec), peers_of(tiny())[0])
    assert peak.extra_bytes is None and "negative padding" in peak.reason


def test_files_appear_whole_and_foreign_folders_are_kept(measurements, tmp_path):
    rows = rows_of(measurements)
    write(rows, tmp_path / "results")
    write(rows, tmp_path / "results")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "results", "results.json", "results.md", "results.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results" / "results.json").read_text())[0]["problem"] == "tiny"
    (tmp_path / "results" / "thesis.tex").touch()
    with pytest.raises(OutputExistsError, match="holds more"):
        write(rows, tmp_path / "results")
    with pytest.raises(OutputExistsError, match="--force"):
        check_replaceable(tmp_path, force=False)


def test_problem_names_are_unique_and_selected_by_name():
    assert len({problem.name for problem in FULL}) == len(FULL)
    assert select("small") == SMALL
    assert [problem.name for problem in select("small", ["stage2", "stage0"])] == ["stage2", "stage0"]
    with pytest.raises(ConfigError, match=r"stage9.*it has stage0"):
        select("small", ["stage9"])


def test_command_line_end_to_end(repo_root, tmp_path):
    pytest.importorskip("pytest_benchmark")
    output = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "bench",
        "--problem",
        "hippocampus3",
        "--seconds",
        "0.1",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(repo_root)])}
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=repo_root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hippocampus3" in done.stdout and "Written to" in done.stdout
    rows = json.loads((output / "results.json").read_text())
    assert {row["threads"] for row in rows} == {1}
    assert all(row["ratio_to_dense"] > 0 for row in rows if row["status"] == MEASURED)
    assert "| hippocampus3 |" in (output / "results.md").read_text()
    picture = (output / "results.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 9000


def test_command_line_refuses_before_measuring(tmp_path, capsys):
    (tmp_path / "results.json").touch()
    assert main(["--output", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["--problem", "stage9"]) == 2
    assert "stage9" in capsys.readouterr().err


def test_bench_command_says_where_the_benchmarks_are_when_absent(monkeypatch, tmp_path):
    pytest.importorskip("typer")
    import tucker_ops
    from tucker_ops.cli.timing import bench

    monkeypatch.setattr(tucker_ops, "__file__", str(tmp_path / "site" / "tucker_ops" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="clone the repository"):
        bench()
