"""Tables of timed choices, made by the kernels on the emulated multiprocessor with a clock of the test's own."""

from __future__ import annotations

import json

import pytest
import torch

import tucker_ops
from tucker_ops.backends import autotune, cuda, tuned
from tucker_ops.errors import BackendError
from tucker_ops.nn import TuckerConv3d


def problem():
    return TuckerConv3d(32, 32, 3, (16, 16), padding=1).half().problem((1, 32, 3, 13, 20))


class Clock:
    """Says the given microseconds in turn, and runs each call once."""

    def __init__(self, *times):
        self.times = list(times)

    def __call__(self, call):
        call()
        return self.times.pop(0)


def test_the_fastest_candidate_wins_by_more_than_noise(emulated):
    count = len(autotune.candidates(problem(), cuda.H200, False))
    assert count >= 4
    for fastest in range(count):
        times = [100.0] * count
        times[fastest] = 50.0
        found = autotune.tune(problem(), cuda.H200, timer=Clock(*times), target="cpu")
        assert found.times[found.best] == 50.0
    times = [100.0] * count
    times[0] = 99.0
    found = autotune.tune(problem(), cuda.H200, timer=Clock(*times), target="cpu")
    assert found.best == found.modelled


def test_a_kernel_that_is_wrong_is_never_timed(emulated, monkeypatch):
    run = cuda.run_on

    def wrong(device, choice, *args):
        return run(device, choice, *args) * (1.5 if choice[1] else 1)

    monkeypatch.setattr(cuda, "run_on", wrong)
    with pytest.raises(BackendError, match="off by 5"):
        autotune.tune(problem(), cuda.H200, timer=Clock(*[1.0] * 50), target="cpu")


def test_a_table_is_read_where_it_was_written(emulated, monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path))
    properties = type("Properties", (), {"name": "A card, 80GB", "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    found = autotune.Tuning(problem(), {(0, 0, 0): 9.0, (1, 2, 4): 5.0}, (0, 0, 0))
    path = autotune.save([found], False, {"card": properties.name})
    assert json.loads(open(path).read())["notes"] == {"card": properties.name}
    core = torch.empty(16, 16, 3, 3, 3)
    sizes = ((1, 32, 16, 16, 32), (3, 13, 20), core, (1, 1, 1), (1, 1, 1), (1, 1, 1))
    assert tuned.choice(0, torch.float16, *sizes, False) == [0, tuned.PREFERRED, 2, 4]
    assert tuned.choice(0, torch.bfloat16, *sizes, False) == [0]
    autotune.save([autotune.Tuning(problem(), {(0, 0, 0): 9.0}, (0, 0, 0))], False, {})
    assert tuned.choice(0, torch.float32, *sizes, True) == [1]
    assert tuned.choice(0, torch.float16, *sizes, False) == [0, 0]
    open(path, "w").write('{"problems": {"x": [1, 2]}}')
    tuned._table.cache_clear()
    with pytest.raises(BackendError, match="delete it"):
        tuned.choice(0, torch.float16, *sizes, False)
    tuned._table.cache_clear()


def test_a_preferred_form_gives_way_where_it_does_not_fit(emulated):
    module = TuckerConv3d(32, 32, 3, (16, 16), padding=1).half()
    x = torch.randn(1, 32, 3, 13, 20).half()
    results = []
    for choice in ([0], [0, tuned.PREFERRED, 99, 1], [0, tuned.PREFERRED, 2, 2]):
        emulated(choice)
        results.append(tucker_ops.tucker_conv(x, module.u_in, module.core, module.u_out, padding=1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=2e-3)


def test_tuning_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    tuning = pytest.importorskip("tucker_ops.nnunet.tuning")
    assert tuning.backend_to_tune() == "cuda"
    for backend in ("cuda", "triton"):
        with pytest.raises(BackendError, match="nothing to tune"):
            tuning.problems_of(tmp_path, backend=backend)


def test_nothing_takes_kernels_unasked_on_a_card_they_have_not_passed_on(monkeypatch):
    monkeypatch.setattr(cuda, "PROVEN", frozenset({90}))
    assert cuda.proven(90)
    assert "make gpu" in cuda.proven(80).reason
    monkeypatch.setenv(cuda.UNPROVEN_VARIABLE, "1")
    assert cuda.proven(80)
