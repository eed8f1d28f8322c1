"""What to compress and how far: a frozen, versioned, serialisable configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tucker_ops.errors import ConfigError

# Version 1 knew no rank of the taps.
VERSION = 2
POLICIES = ("factor", "energy", "params", "macs", "latency_ms")
BUDGETS = ("params", "macs", "latency_ms")


@dataclass(frozen=True)
class CompressionConfig:
    """How ranks are chosen, and which convolutions are left dense.

    Exactly one of the five policies; factor=0.5 where none is given:
        factor: in (0, 1]; rank = channels·factor to the nearest multiple of `align` (ties up), or to the next
            one where `rounding` is "ceil", then clamped to [min_rank, channels].
        energy: in (0, 1]; per layer and mode the least multiple of `align` that keeps this share of the
            squared singular values, clamped likewise; of the weighted kernel where there is a calibration.
        params: parameters of the whole network; up to 1 a fraction of the dense network's, above it absolute.
        macs: multiply-accumulates of all convolutions for one input; read like `params`. Absolute values
            need `input_shape` in `plan`.
        latency_ms: milliseconds of one forward pass, by times of the layers that `plan` is given.
    The last three share one budget out among all layers, where it keeps most of the weights' energy per unit, or of
    what a calibration found to matter.
        tap_ranks: a layer may get a third rank, of its kernel's taps. The parameters it saves pay for larger ranks of
            the channels: nearer to the dense network at the same parameters, for more multiply-accumulates. For
            `params` only, where it is the default (None); it saves nothing else.

    Left dense, apart from what cannot be factorised:
        only_if_cheaper: layers whose factorised form is not cheaper in both parameters and MACs.
        skip_first: convolutions that read the network's input, if it has at most `min_rank` channels.
        skip_heads: pointwise convolutions whose output the network returns, or that run last.
        skip_transposed: transposed convolutions.
        exclude: layers with a name (or alias) that matches one of these patterns, as in a shell.

    Raises ConfigError for values out of range.
    """

    factor: float | None = None
    energy: float | None = None
    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    min_rank: int = 8
    align: int = 8
    tap_ranks: bool | None = None
    rounding: str = "nearest"
    only_if_cheaper: bool = True
    skip_transposed: bool = False
    skip_first: bool = True
    skip_heads: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self):
        given = [name for name in POLICIES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"one policy at a time: got {' and '.join(given)}; give one of {', '.join(POLICIES)}"
            )
        if not given:
            object.__setattr__(self, "factor", 0.5)
        value = getattr(self, self.policy)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{self.policy} must be a number, got {value!r}")
        if value <= 0 or (self.policy in ("factor", "energy") and value > 1):
            limit = "in (0, 1]" if self.policy in ("factor", "energy") else "above 0"
            raise ConfigError(f"{self.policy} must be {limit}, got {value}")
        for name in ("min_rank", "align"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.tap_ranks is not None and not isinstance(self.tap_ranks, bool):
            raise ConfigError(f"tap_ranks must be True, False or None, got {self.tap_ranks!r}")
        if self.tap_ranks and self.policy != "params":
            raise ConfigError(
                f"tap_ranks saves parameters and nothing else, so it goes with params=, not {self.policy}=; leave it "
                "out"
            )
        if self.rounding not in ("nearest", "ceil"):
            raise ConfigError(f"rounding must be 'nearest' or 'ceil', got {self.rounding!r}")
        for name in ("only_if_cheaper", "skip_transposed", "skip_first", "skip_heads"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.exclude, str) or not all(isinstance(p, str) for p in self.exclude):
            raise ConfigError(f"exclude must be a sequence of patterns, got {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @classmethod
    def weber2024(cls, factor: float) -> CompressionConfig:
        """The rule of Weber et al. (arXiv 2404.09683): every convolution, min(C, max(8, ceil(C·factor)))."""
        return cls(
            factor=factor, align=1, rounding="ceil", only_if_cheaper=False, skip_first=False, skip_heads=False
        )

    @property
    def policy(self) -> str:
        """The one of "factor", "energy", "params", "macs" and "latency_ms" that is set."""
        return next(name for name in POLICIES if getattr(self, name) is not None)

    @property
    def gives_tap_ranks(self) -> bool:
        """Whether layers may get a rank of their kernel's taps."""
        return self.policy == "params" and self.tap_ranks is not False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the format's version."""
        return {"version": VERSION, **asdict(self), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionConfig:
        """Inverse of `to_dict`; missing keys take their defaults.

        Raises ConfigError for unknown keys, values out of range, and versions newer than this package.
        """
        values = dict(data)
        version = values.pop("version", None)
        check_version("compression config", version, VERSION)
        if version == 1 and values.get("params") is not None:
            values.setdefault("tap_ranks", False)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown keys in a compression config: {', '.join(unknown)}; "
                f"known are {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CompressionConfig:
        """Inverse of `to_json`; raises ConfigError for text that is no JSON object, and as `from_dict`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a compression config must be a JSON object: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"a compression config must be a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)


def check_version(what: str, version: Any, newest: int) -> None:
    """Raise ConfigError unless `version` is one that this package reads (1 to `newest`)."""
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= newest:
        raise ConfigError(
            f"a {what} of version {version!r} cannot be read; this tucker_ops reads versions 1 to {newest}, "
            "install the one that wrote it"
        )
