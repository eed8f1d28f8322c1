"""The configuration: what it accepts, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tucker_ops.convert import CompressionConfig
from tucker_ops.errors import ConfigError


def test_defaults():
    config = CompressionConfig()
    assert (config.policy, config.factor, config.min_rank, config.align) == ("factor", 0.5, 8, 8)
    assert hash(config) == hash(CompressionConfig(factor=0.5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"factor": 0}, r"factor must be in \(0, 1\], got 0"),
        ({"factor": 1.01}, r"factor must be in \(0, 1\], got 1.01"),
        ({"factor": -0.5}, "factor"),
        ({"factor": float("nan")}, "factor must be a number"),
        ({"factor": "half"}, "factor must be a number"),
        ({"factor": True}, "factor must be a number"),
        ({"energy": 2}, r"energy must be in \(0, 1\]"),
        ({"params": 0}, "params must be above 0"),
        ({"macs": -1}, "macs must be above 0"),
        ({"factor": 0.5, "energy": 0.5}, "got factor and energy"),
        ({"min_rank": 0}, "min_rank"),
        ({"min_rank": 4.0}, "min_rank"),
        ({"align": True}, "align"),
        ({"rounding": "floor"}, "'floor'"),
        ({"skip_heads": 1}, "skip_heads"),
        ({"params": 0.3, "tap_ranks": 1}, "tap_ranks must be True, False or None"),
        ({"macs": 0.3, "tap_ranks": True}, "goes with params=, not macs="),
        ({"exclude": "decoder.*"}, "exclude"),
        ({"exclude": (1,)}, "exclude"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig(**arguments)


def test_ranks_of_the_taps_go_with_a_budget_of_parameters():
    assert CompressionConfig(params=0.3).gives_tap_ranks
    assert CompressionConfig(params=0.3, tap_ranks=True).gives_tap_ranks
    assert not CompressionConfig(params=0.3, tap_ranks=False).gives_tap_ranks
    assert not any(CompressionConfig(**{p: 0.5}).gives_tap_ranks for p in ("factor", "energy", "macs"))
    assert dataclasses.replace(CompressionConfig(params=0.3), params=None, macs=0.5).policy == "macs"
    assert dataclasses.replace(CompressionConfig(macs=0.3), macs=None, params=0.5).gives_tap_ranks
    # What wrote version 1 knew none.
    old = CompressionConfig(params=0.3).to_dict() | {"version": 1}
    del old["tap_ranks"]
    assert CompressionConfig.from_dict(old) == CompressionConfig(params=0.3, tap_ranks=False)
    assert CompressionConfig.from_dict({"version": 2, "params": 0.3}).gives_tap_ranks
    old = CompressionConfig(macs=0.3).to_dict() | {"version": 1}
    del old["tap_ranks"]
    assert CompressionConfig.from_dict(old) == CompressionConfig(macs=0.3)


@pytest.mark.parametrize(
    "config",
    [
        CompressionConfig(),
        CompressionConfig(energy=0.9, align=4, exclude=["decoder.*"]),
        CompressionConfig(params=2_000_000),
        CompressionConfig(params=0.3, tap_ranks=False),
        CompressionConfig(macs=0.3, only_if_cheaper=False, skip_transposed=True),
        CompressionConfig.weber2024(0.3),
    ],
)
def test_survives_json(config):
    assert CompressionConfig.from_json(config.to_json()) == config
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 3}, "version 3 cannot be read"),
        ({"version": None}, "version None"),
        ({"rank": 3}, "unknown keys in a compression config: rank"),
        ({"factor": 3}, "factor"),
    ],
)
def test_from_dict_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        CompressionConfig.from_dict({**CompressionConfig().to_dict(), **change})


@pytest.mark.parametrize("text", ["", "[1]", "{'version': 1}"])
def test_from_json_refuses(text):
    with pytest.raises(ConfigError, match="JSON object"):
        CompressionConfig.from_json(text)
