"""The plan: ranks, cost and expected error of every convolution, or the reason it stays dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tucker_ops.convert import rules
from tucker_ops.convert.calibrate import Calibration
from tucker_ops.convert.config import CompressionConfig, check_version
from tucker_ops.convert.modules import all_names, convolutions, describe
from tucker_ops.convert.policy import LatencyOf, choose_ranks
from tucker_ops.convert.trace import Trace, probe_and_trace, trace
from tucker_ops.cost import Cost, Voxels, dense_cost, one_pass_cost, three_conv_cost
from tucker_ops.decompose import Spectrum, Weighting, spectrum
from tucker_ops.errors import ConfigError, ConversionError, TuckerOpsError
from tucker_ops.types import ConvSpec, Ranks

VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One convolution: what it is, and either its ranks or the reason it stays dense.

    ``ranks`` are (R_in, R_out), or (R_in, R_out, R_taps) with a rank of the kernel's taps.

    ``aliases`` are the further names of the same module. ``calls`` counts its runs in one forward pass.
    ``dense`` and ``tucker`` are costs of all its runs, batch of the plan's input included; bytes assume one
    pass (three convolutions where transposed). ``expected_error`` is ||W - Ŵ|| / ||W|| of the truncated
    HOSVD, with a calibration in its norm; `apply` improves on it. None for dense layers and for weights on the
    meta device. ``expected_loss`` is what the layer's truncation costs, in nats per calibration input (see
    `tucker_ops.calibrate`); None without a calibration.
    """

    name: str
    aliases: tuple[str, ...]
    spec: ConvSpec
    calls: int
    dense: Cost
    tucker: Cost | None = None
    ranks: Ranks | None = None
    reason: str | None = None
    expected_error: float | None = None
    expected_loss: float | None = None

    @property
    def cost(self) -> Cost:
        """Of the layer as planned."""
        return self.dense if self.ranks is None else self.tucker


@dataclass(frozen=True)
class Plan:
    """What `apply` will do to a model. Print it, or see `to_dict` for all figures.

    ``input_shape`` is the [N, C, *spatial] that the costs are for; None if no forward pass could be traced:
    then MACs and bytes are per output voxel. ``total_params`` counts the dense model's parameters;
    ``norm_elements`` the elements that norms write in one pass. ``calibration`` is the digest of the calibration
    that the ranks rest on, which `apply` then needs too.
    """

    config: CompressionConfig
    input_shape: tuple[int, ...] | None
    layers: tuple[LayerPlan, ...]
    total_params: int
    norm_elements: int = 0
    notes: tuple[str, ...] = ()
    calibration: str | None = None

    @property
    def ranks(self) -> dict[str, Ranks]:
        """(R_in, R_out) or (R_in, R_out, R_taps) of each factorised layer, by name."""
        return {layer.name: layer.ranks for layer in self.layers if layer.ranks is not None}

    @property
    def dense(self) -> Cost:
        """Of the dense network: parameters of the whole model; MACs and bytes of its convolutions."""
        return self._total([layer.dense for layer in self.layers])

    @property
    def compressed(self) -> Cost:
        """Of the network as planned, counted as in `dense`."""
        saved = sum(layer.dense.params - layer.cost.params for layer in self.layers)
        return replace(self._total([layer.cost for layer in self.layers]), params=self.total_params - saved)

    def _total(self, costs: Sequence[Cost]) -> Cost:
        return replace(sum(costs, Cost()), params=self.total_params)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the format's version."""
        return {
            "version": VERSION,
            "config": self.config.to_dict(),
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "total_params": self.total_params,
            "norm_elements": self.norm_elements,
            "notes": list(self.notes),
            "calibration": self.calibration,
            "layers": [_as_lists(asdict(layer)) for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`, also after a round through JSON.

        Raises ConfigError for versions newer than this package and for unknown or missing keys.
        """
        values = dict(data)
        check_version("compression plan", values.pop("version", None), VERSION)
        try:
            shape = values.pop("input_shape")
            return cls(
                config=CompressionConfig.from_dict(values.pop("config")),
                input_shape=None if shape is None else tuple(shape),
                layers=tuple(_layer(layer) for layer in values.pop("layers")),
                notes=tuple(values.pop("notes")),
                **values,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a compression plan as Plan.to_dict writes it: {error}") from None

    def __str__(self) -> str:
        from tucker_ops.convert.report import as_text

        return as_text(self)

    def __rich__(self):
        from tucker_ops.convert.report import as_table

        return as_table(self)


def plan(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    calibration: Calibration | None = None,
    latency: LatencyOf | None = None,
) -> Plan:
    """Decide what becomes of every convolution in `model`, which is not changed.

    Args:
        model: any torch module; weights on any device, also meta (then only the `factor` policy works).
        config: defaults to `CompressionConfig()`.
        input_shape: [N, C, *spatial] of one input. Costs are for it. Left out, a shape is guessed; and if the
            model cannot be run on a guess, layers are judged by structure alone and `Plan.notes` says so.
        calibration: what matters to the model's output, from `tucker_ops.calibrate`. Kernels are then truncated in
            its metric, and budgets spent where they lower the expected loss in nats most.
        latency: latency(name, ranks) in milliseconds of a layer at ranks, or dense where they are None; what a budget
            of `latency_ms` is counted in.

    One forward pass is traced on the meta device to learn which layers run, in what order and at what size;
    nothing is computed. Raises ConfigError for a budget that cannot be met, an unused `exclude` pattern, or
    where `input_shape` is needed; ConversionError for a model without convolutions, weights with NaN in them,
    or an `input_shape` that the model does not take.
    """
    config = CompressionConfig() if config is None else config
    convs = convolutions(model)
    if not convs:
        raise ConversionError(
            f"{type(model).__name__} contains no convolution (torch.nn.Conv2d, Conv3d, ConvTranspose2d or "
            "ConvTranspose3d); layers of scripted or already converted models do not count"
        )
    names = all_names(model)
    _check_patterns(config, [names[id(conv)] for conv in convs.values()])
    record, notes = _trace(model, list(convs.values()), input_shape)
    if config.policy == "macs" and (record is None or (config.macs > 1 and input_shape is None)):
        raise ConfigError(
            f"macs={config.macs:g} counts the MACs of one input, whose size is not known; pass "
            "input_shape, as in plan(model, config, input_shape=(1, 1, 128, 128, 128))"
        )

    if config.policy == "latency_ms" and latency is None:
        raise ConfigError(
            "latency_ms counts times measured on this machine, which plan(..., latency=...) must be given; for an "
            "nnU-Net tucker-ops compress --latency-ms measures them"
        )

    owned_by = rules.owners(model)
    last_name = list(convs)[-1]
    layers: dict[str, LayerPlan] = {}
    voxels: dict[str, list[tuple[int, Voxels]]] = {}
    for name, conv in convs.items():
        spec = describe(conv)
        voxels[name], use = _use(record, conv, spec, first=not layers, last=name == last_name)
        aliases = tuple(n for n in names[id(conv)] if n != name)
        reason = rules.cannot(conv, owned_by) or rules.unwanted(spec, use, (name, *aliases), config)
        dense = _sum([dense_cost(spec, v, batch=n, itemsize=_itemsize(conv)) for n, v in voxels[name]])
        if not voxels[name]:
            dense = Cost(params=dense_cost(spec, Voxels(0, 0)).params)
        layers[name] = LayerPlan(name, aliases, spec, use.calls, dense, reason=reason)

    weightings = {} if calibration is None else _weightings(calibration, layers)
    spectra = {
        name: _spectrum(name, convs[name], weightings.get(name), config.gives_tap_ranks)
        for name, layer in layers.items()
        if layer.reason is None
    }
    total_params = sum(p.numel() for p in model.parameters() if not is_lazy(p))

    def tucker(name: str, ranks: Ranks) -> Cost:
        spec = layers[name].spec
        cost = three_conv_cost if spec.transposed else one_pass_cost
        size = _itemsize(convs[name])
        return _sum([cost(spec, ranks, v, batch=n, itemsize=size) for n, v in voxels[name]])

    layers = choose_ranks(layers, spectra, tucker, total_params, config, latency)
    if all(layer.ranks is None for layer in layers.values()):
        notes.append(f"no layer is factorised: all {len(layers)} convolutions stay dense, see the reasons")
    return Plan(
        config=config,
        input_shape=None if record is None else record.input_shape,
        layers=tuple(layers.values()),
        total_params=total_params,
        norm_elements=0 if record is None else record.norm_elements,
        notes=tuple(notes),
        calibration=None if calibration is None else calibration.digest,
    )


def _weightings(calibration: Calibration, layers: Mapping[str, LayerPlan]) -> Mapping[str, Weighting]:
    """The calibration's weightings, once it is sure that they are for these layers."""
    absent = [
        name for name, layer in layers.items() if layer.reason is None and name not in calibration.weightings
    ]
    if absent:
        raise ConfigError(
            f"the calibration knows nothing of {absent[0]!r}, whose ranks the plan must choose; it was made with "
            f"another model (its layers are like {next(iter(calibration.weightings))!r}): calibrate this one"
        )
    return calibration.weightings


def _check_patterns(config: CompressionConfig, names: Sequence[Sequence[str]]) -> None:
    unused = [p for p in config.exclude if all(rules.matching(n, (p,)) is None for n in names)]
    if unused:
        raise ConfigError(
            f"exclude pattern {', '.join(map(repr, unused))} matches none of the {len(names)} convolutions; "
            f"their names are like {names[0][0]!r}"
        )


def _trace(
    model: nn.Module, convs: Sequence[nn.Module], input_shape: Sequence[int] | None
) -> tuple[Trace | None, list[str]]:
    if input_shape is None:
        record, problem = probe_and_trace(model, convs)
        if record is not None:
            return record, [f"costs are for an input of {list(record.input_shape)}, which was guessed"]
        return None, [
            f"no forward pass could be traced ({problem}): all layers are taken to run once, in the order of "
            "registration; MACs and bytes are per output voxel"
        ]
    shape = tuple(input_shape)
    if len(shape) < 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ConfigError(f"input_shape must be [N, C, *spatial] in whole numbers above 0, got {shape}")
    try:
        return trace(model, convs, shape), []
    # The model is the user's and may raise anything; the cause travels along.
    except Exception as error:
        raise ConversionError(
            f"the model does not run on an input of shape {shape} ({type(error).__name__}: {error}); correct "
            "input_shape, or leave it out to plan without it"
        ) from error


def _use(
    record: Trace | None, conv: nn.Module, spec: ConvSpec, *, first: bool, last: bool
) -> tuple[list[tuple[int, Voxels]], rules.Use]:
    """(batch, voxels) of each run of `conv`, and its part in the network."""
    if record is None:
        return [(1, Voxels.per_unit(spec))], rules.Use(calls=1, reads_input=first, returned=False, last=last)
    calls = record.calls.get(id(conv), ())
    ndim = spec.ndim
    sizes = [(c.input_shape[0] if len(c.input_shape) == ndim + 2 else 1, c.voxels(ndim)) for c in calls]
    return sizes, rules.Use(
        calls=len(calls),
        reads_input=any(c.reads_input for c in calls),
        returned=any(c.returned for c in calls),
        last=record.last == id(conv),
    )


def _spectrum(name: str, conv: nn.Module, weighting: Weighting | None, taps: bool) -> Spectrum | None:
    if conv.weight.is_meta:
        return None
    try:
        found = spectrum(conv.weight, transposed=conv.transposed, weighting=weighting)
    except TuckerOpsError as error:
        raise type(error)(f"{name or type(conv).__name__}: {error}") from None
    return found if taps else found.without_taps()


def _sum(costs: Sequence[Cost]) -> Cost:
    """Cost of several runs of one layer: its parameters count once."""
    total = sum(costs, Cost())
    return replace(total, params=costs[0].params) if costs else total


def _itemsize(conv: nn.Module) -> int:
    weight = conv._parameters.get("weight")
    return (torch.get_default_dtype() if weight is None else weight.dtype).itemsize


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _layer(data: Mapping[str, Any]) -> LayerPlan:
    values = dict(data)
    spec = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("spec").items()}
    ranks, tucker = values.pop("ranks"), values.pop("tucker")
    unknown = set(values) - {f.name for f in fields(LayerPlan)}
    if unknown:
        raise KeyError(f"unknown keys {sorted(unknown)}")
    return LayerPlan(
        spec=ConvSpec(**spec),
        ranks=None if ranks is None else tuple(ranks),
        aliases=tuple(values.pop("aliases")),
        dense=Cost(**values.pop("dense")),
        tucker=None if tucker is None else Cost(**tucker),
        **values,
    )
