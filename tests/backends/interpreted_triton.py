"""The Triton kernels in Triton's interpreter against float64; `test_triton.py` runs this file in a process of its own.

The interpreter has to be asked for before Triton is imported, and cannot be left again.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

import tucker_ops
from tests.ops import test_gradient, test_tucker_block
from tests.ops.problems import Case, random_cases, reference, relative_rms, tolerance
from tucker_ops.backends import tuned
from tucker_ops.backends.triton import launch, tuning
from tucker_ops.backends.triton.config import CANDIDATES, DEFAULT, Config, Configs
from tucker_ops.errors import BackendError
from tucker_ops.nn import TuckerConv3d
from tucker_ops.ops.reference import memory_format

# The interpreter takes a millisecond an operation: many taps or voxels would take minutes and show nothing else.
CASES = [case for case in random_cases(120) if math.prod(case.kernel) <= 27 and math.prod(case.size) <= 600]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, poisoned):
    kinds = set()
    for case in CASES[:24] if dtype == "fp32" else CASES[24:36]:
        tensors = case.tensors(DTYPES[dtype])
        expected = reference(tensors, case.geometry)
        actual = tucker_ops.tucker_conv(*tensors, *case.geometry, backend="triton")
        assert actual.shape == expected.shape and actual.dtype == DTYPES[dtype]
        assert actual.is_contiguous(memory_format=memory_format(tensors[0]))
        assert relative_rms(actual, expected) <= tolerance(DTYPES[dtype], expected.numel()), case
        kinds |= {case.layout, f"{len(case.size)}D", f"batch {case.batch}", f"stride {max(case.stride)}"}
    if dtype == "fp32":
        assert {"2D", "3D", "batch 0", "batch 3", "stride 1", "stride 2", "transposed", "sliced"} <= kinds


@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype, kept, poisoned):
    for case in CASES[36 + kept :: 9 if dtype != "fp16" else 18]:
        test_gradient.check(case, DTYPES[dtype], "triton", kept=kept)


def test_gradients_alone(poisoned):
    case = Case(0, 1, (5, 4, 3, 6), (3, 4, 3), (3, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), True, "contiguous")
    call = test_gradient.call_of(case, torch.float32)
    whole = torch.ops.tucker_ops.tucker_conv_backward(*call, [True] * 5, backend="triton")
    for alone in range(5):
        mask = [i == alone for i in range(5)]
        part = torch.ops.tucker_ops.tucker_conv_backward(*call, mask, backend="triton")
        torch.testing.assert_close(part[alone], whole[alone])
        assert sum(p.numel() for p in part) == whole[alone].numel()


def test_ranks_and_channels_of_several_blocks(poisoned):
    """More output ranks than a block of the stages has, more channels than a block of each kernel."""
    case = Case(
        3, 1, (130, 33, 140, 150), (2, 3, 4), (1, 3, 1), (1, 1, 1), (0, 1, 0), (1, 1, 1), True, "contiguous"
    )
    tensors = case.tensors(torch.float32)
    actual = tucker_ops.tucker_conv(*tensors, *case.geometry, backend="triton")
    assert relative_rms(actual, reference(tensors, case.geometry)) <= tolerance(torch.float32, 2000)
    test_gradient.check(case, torch.float32, "triton", kept=False)


@pytest.mark.parametrize(
    ("ranks", "kernel", "stride", "padding", "dilation", "together"),
    [
        ((5, 6), (2, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), {1, 3}),
        ((5, 6), (1, 3, 3), (1, 1, 1), (0, 1, 2), (1, 1, 2), {1, 3}),
        ((7, 3), (1, 2, 4), (1, 1, 2), (0, 0, 1), (1, 1, 1), {1, 4}),
        # The gradient's padding is negative.
        ((4, 4), (1, 1, 3), (1, 1, 1), (1, 1, 4), (1, 1, 1), {1, 3}),
        # More steps than an integer has bits, and more ranks than a block of the sum has room for.
        ((2, 2), (4, 8, 2), (1, 1, 1), (2, 4, 1), (1, 1, 1), {1}),
        ((90, 2), (1, 1, 3), (1, 1, 1), (0, 0, 1), (1, 1, 1), {1, 3}),
    ],
)
def test_taps_read_together(ranks, kernel, stride, padding, dilation, together, poisoned, monkeypatch):
    seen = set()

    def recorded(kernel, grid, arguments, constants, config):
        seen.add(constants.get("TOGETHER", 1))
        run(kernel, grid, arguments, constants, config)

    run = launch.launch
    monkeypatch.setattr(launch, "launch", recorded)
    channels = (3, *ranks, 4)
    size = (3, 4, 5) if math.prod(kernel) <= 27 else (1, 2, 2)
    case = Case(0, 2, channels, size, kernel, stride, padding, dilation, True, "channels_last")
    tensors = case.tensors(torch.float32)
    expected = reference(tensors, case.geometry)
    actual = tucker_ops.tucker_conv(*tensors, *case.geometry, backend="triton")
    assert relative_rms(actual, expected) <= tolerance(torch.float32, expected.numel())
    test_gradient.check(case, torch.float32, "triton", kept=False)
    assert seen == together


def test_gradients_are_the_same_every_time():
    case = Case(
        0, 2, (9, 8, 8, 9), (9, 8, 9), (3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), True, "channels_last"
    )
    call = test_gradient.call_of(case, torch.float32)
    first, second = (
        torch.ops.tucker_ops.tucker_conv_backward(*call, [True] * 5, backend="triton") for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks(dtype, poisoned):
    stats = set()
    for seed in range(20) if dtype == "fp32" else range(20, 28):
        call = test_tucker_block.random_call(seed, DTYPES[dtype])
        stats.add(call["stats"])
        try:
            test_tucker_block.check(
                call, DTYPES[dtype], contiguous=seed % 3 == 0, wide=seed % 4 == 0, backend="triton"
            )
        except AssertionError as error:
            raise AssertionError(f"call {seed}: {error}") from error
    assert dtype == "bf16" or stats == {"none", "channel", "covariance"}


def test_statistics_survive_a_large_mean():
    """At |mean| / σ = 1000, over more rows than one block has."""
    x = 1000 + torch.randn(1, 16, 6, 8, 9).contiguous(memory_format=torch.channels_last_3d)
    eye = torch.eye(16).reshape(16, 16, 1, 1, 1)
    values, mean, m2 = torch.ops.tucker_ops.tucker_block(
        [x],
        [None],
        [None],
        [None],
        [1.0],
        [None],
        None,
        eye,
        [1],
        [0],
        [1],
        None,
        None,
        "channel",
        backend="triton",
    )
    exact = x.double().flatten(2)
    assert torch.equal(values, x)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=0)
    torch.testing.assert_close(m2.double(), exact.var(2, correction=0) * exact.shape[2], rtol=1e-4, atol=0)


def test_what_it_cannot_do_is_said():
    module = tucker_ops.nn.TuckerConv3d(600, 600, 1, (520, 16))
    problem = module.problem((1, 600, 4, 4, 4))
    with pytest.raises(tucker_ops.errors.BackendError, match="at most 512 ranks"):
        tucker_ops.explain(problem, backend="triton")
    with pytest.raises(tucker_ops.errors.BackendError, match="float64"):
        tucker_ops.explain(replace(problem, rank_in=16, dtype=torch.float64), backend="triton")
    assert "interpreter is for tests" in str(tucker_ops.explain(replace(problem, rank_in=16)))


class Clock:
    """Runs each call once, and says the microseconds that the test has for the configuration at its turn."""

    def __init__(self, times):
        self.times = iter(times)

    def __call__(self, call):
        call()
        return next(self.times)


def layer():
    return TuckerConv3d(8, 6, (1, 1, 3), (4, 5), padding=(0, 0, 1)).problem((1, 8, 2, 3, 4))


@pytest.mark.parametrize("faster", [0.5, 0.99])
def test_tuning_takes_what_is_faster_by_more_than_noise(faster):
    counts = {field.name: 1 + len(CANDIDATES[field.name]) for field in fields(Configs)}
    times = [t for count in counts.values() for t in [*[100.0] * (count - 1), 100.0 * faster]]
    found = tuning.tune(layer(), timer=Clock(times), target="cpu")
    assert {name: len(kernel) for name, kernel in found.times.items()} == counts
    last = Configs(*(CANDIDATES[field.name][-1] for field in fields(Configs)))
    assert found.best == (last if faster == 0.5 else DEFAULT)


def test_what_the_card_has_no_room_for_is_left_out(monkeypatch):
    start = launch.launch
    without = CANDIDATES["convolve"][0]

    def little(kernel, grid, arguments, constants, config):
        if kernel is launch.convolve_rows and config == without:
            raise OutOfResources(200_000, 100_000, "shared memory")
        start(kernel, grid, arguments, constants, config)

    monkeypatch.setattr(launch, "launch", little)
    found = tuning.tune(layer(), timer=Clock([1.0] * 50), target="cpu")
    assert without not in found.times["convolve"]
    assert len(found.times["convolve"]) == len(CANDIDATES["convolve"])


def test_a_configuration_that_is_wrong_is_never_timed(monkeypatch):
    run = launch.forward

    def wrong(*args, configs=DEFAULT):
        return run(*args, configs=configs) * (1 if configs == DEFAULT else 1.5)

    monkeypatch.setattr(launch, "forward", wrong)
    with pytest.raises(BackendError, match="off by 5"):
        tuning.tune(layer(), timer=Clock([1.0] * 50), target="cpu")


class Elsewhere:
    """A tensor on a card that is not here, as far as a table is asked."""

    is_cuda, dtype = True, torch.float16
    device = torch.device("cuda", 0)

    def __init__(self, *shape):
        self.shape = torch.Size(shape)


def test_a_table_is_read_where_it_was_written(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card, 80GB")
    problem = replace(layer(), dtype=torch.float16)
    best = Configs(Config(64, 32, 2, 4), Config(256, 32, 8, 3), Config(32, 64, 4, 4))
    path = tuning.save([tuning.TritonTuning(problem, {}, best)], False, {"card": "A card, 80GB"})
    # Another version of Triton makes other code of the same configuration.
    assert triton.__version__ in path and str(tmp_path) in path
    core, ones = torch.empty(5, 4, 1, 1, 3), (1, 1, 1)
    call = (core, 6, ones, (0, 0, 1), ones)
    assert tuning.configs_of([Elsewhere(1, 8, 2, 3, 4)], *call) == best
    assert tuning.configs_of([Elsewhere(1, 3, 2, 3, 4), Elsewhere(1, 5, 2, 3, 4)], *call) == best
    assert tuning.configs_of([Elsewhere(2, 8, 2, 3, 4)], *call) == DEFAULT
    assert tuning.configs_of([torch.empty(1, 8, 2, 3, 4)], *call) == DEFAULT
    open(path, "w").write('{"problems": {"x": [1, 2]}}')
    tuning._table.cache_clear()
    with pytest.raises(BackendError, match="delete it"):
        tuning.configs_of([Elsewhere(1, 8, 2, 3, 4)], *call)
    for values, words in (
        ([48, 64, 4, 3] * 3, "rows must be a power of two"),
        ([64, 64, 3, 3] * 3, "warps must be"),
        ([64, 64, 4, 0] * 3, "stages must be"),
        ([64, 8, 4, 3] * 3, "channels must be"),
    ):
        open(path, "w").write(json.dumps({"problems": {"x": values}}))
        tuning._table.cache_clear()
        with pytest.raises(BackendError, match=words):
            tuning.configs_of([Elsewhere(1, 8, 2, 3, 4)], *call)
    tuning._table.cache_clear()


def test_every_call_takes_its_configuration_from_the_table(monkeypatch):
    """Forward, stages, gradient and block, with a configuration of which the launches show that it was taken."""
    mine = Configs(Config(16, 16, 2, 2), Config(32, 16, 2, 2), Config(16, 16, 1, 2))
    seen, start = set(), launch.launch

    def watch(kernel, grid, arguments, constants, config):
        seen.add(config)
        start(kernel, grid, arguments, constants, config)

    monkeypatch.setattr(tuning, "configs_of", lambda *_: mine)
    monkeypatch.setattr(launch, "launch", watch)
    case = Case(0, 1, (8, 4, 5, 6), (2, 3, 4), (3, 3, 3), (1,) * 3, (1,) * 3, (1,) * 3, True, "contiguous")
    x, *weights = case.tensors(torch.float32)
    geometry = [list(g) for g in case.geometry]
    ops = torch.ops.tucker_ops
    out = ops.tucker_conv(x, *weights, *geometry, backend="triton")
    assert seen == {mine.reduce, mine.convolve}
    ops.tucker_conv_stages(x, *weights, *geometry, backend="triton")
    assert seen == {mine.reduce, mine.convolve}
    ops.tucker_conv_backward(out, x, *weights[:3], *geometry, [True] * 5, backend="triton")
    assert seen == {mine.reduce, mine.convolve, mine.outer}
    seen.clear()
    u_in, core, u_out, bias = weights
    none = [None]
    ops.tucker_block(
        [x], none, none, none, [1.0], [u_in], None, core, *geometry, u_out, bias, "none", False, False,
        backend="triton",
    )  # fmt: skip
    assert seen == {mine.reduce, mine.convolve}
