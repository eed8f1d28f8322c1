"""Substitution of convolutions by their factorised form, in every place that refers to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tucker_ops.convert import rules
from tucker_ops.convert.calibrate import Calibration
from tucker_ops.convert.config import CompressionConfig
from tucker_ops.convert.modules import all_names, convolutions, describe, slots
from tucker_ops.convert.plan import Plan, plan
from tucker_ops.convert.trace import trace
from tucker_ops.decompose import Weighting, decompose
from tucker_ops.errors import ConversionError, TuckerOpsError
from tucker_ops.nn import spec_of, tucker_class, tucker_module
from tucker_ops.types import Ranks

Progress = Callable[[int, int, str], None]


def compress(
    model: nn.Module,
    config: CompressionConfig | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """`plan` and `apply` in one: factorises `model` in place and returns it. Raises as those two do."""
    made = plan(model, config, input_shape=input_shape, calibration=calibration)
    return apply(model, made, calibration=calibration, progress=progress)


def apply(
    model: nn.Module, plan: Plan, *, calibration: Calibration | None = None, progress: Progress | None = None
) -> nn.Module:
    """Factorise the layers that `plan` gives ranks to, in place, and return the model.

    A convolution registered under several names is decomposed once and replaced in every place. dtype,
    device, requires_grad and training flag carry over. A model that is itself a convolution cannot be
    changed in place: its replacement is returned.

    Args:
        model: the model the plan was made for, or another of the same structure, such as another fold.
        calibration: of this very model, if the plan was made with one: kernels are truncated in its metric.
        progress: called as progress(done, total, name) after each layer.

    Raises ConversionError, and leaves the model as it was, if the plan does not fit, factorises nothing,
    holds layers that cannot be replaced here, or if the converted model would not run as the dense one did.
    """
    return apply_with_report(model, plan, calibration=calibration, progress=progress)[0]


def apply_with_report(
    model: nn.Module, plan: Plan, *, calibration: Calibration | None = None, progress: Progress | None = None
) -> tuple[nn.Module, dict[str, float]]:
    """As `apply`; also returns the relative error ||W - Ŵ|| / ||W|| that each factorised layer came to."""
    convs = _check(model, plan)
    weightings = _weightings(plan, calibration)
    replacements: dict[int, nn.Module] = {}
    errors: dict[str, float] = {}
    for done, (name, ranks) in enumerate(plan.ranks.items(), start=1):
        conv = convs[name]
        try:
            factors = decompose(
                conv.weight, ranks, transposed=conv.transposed, weighting=weightings.get(name)
            )
            replacements[id(conv)] = tucker_class(spec_of(conv)).from_conv(conv, ranks, factors)
        except TuckerOpsError as error:
            raise type(error)(f"{name or type(conv).__name__}: {error}") from error
        errors[name] = factors.relative_error
        if progress is not None:
            progress(done, len(plan.ranks), name)

    replaced = [convs[name] for name in plan.ranks]
    expected = _runs_on_meta(model, replaced, plan)
    converted, undo = _rebind(model, replacements)
    try:
        _check_gone(converted, replaced)
        if expected is not None:
            new = [replacements[id(conv)] for conv in replaced]
            _check_counts(list(plan.ranks), expected, _runs_on_meta(converted, new, plan))
    except BaseException:
        undo()
        raise
    return converted, errors


def substitute(model: nn.Module, ranks: Mapping[str, Ranks]) -> nn.Module:
    """Put freshly initialised Tucker modules where `ranks` names convolutions; returns the model.

    For a model whose weights are loaded afterwards, under the same aliases. Nothing is decomposed.
    Raises ConversionError for a name that is no convolution of the model, or one that cannot be factorised,
    and RankError for ranks out of range; the model is then as it was.
    """
    names = all_names(model)
    by_name = {alias: conv for conv in convolutions(model).values() for alias in names[id(conv)]}
    replacements: dict[int, nn.Module] = {}
    owned_by = rules.owners(model)
    for name, of_layer in ranks.items():
        if name not in by_name:
            raise ConversionError(
                f"ranks are given for {name!r}, but {type(model).__name__} has no convolution of that name; "
                "the ranks belong to another network"
            )
        conv = by_name[name]
        if id(conv) in replacements:
            raise ConversionError(f"ranks are given twice for one layer, the second time as {name!r}")
        reason = rules.cannot(conv, owned_by)
        if reason is not None:
            raise ConversionError(f"ranks are given for {name!r}, which cannot be factorised: {reason}")
        like = conv.weight
        module = tucker_module(spec_of(conv), tuple(of_layer), device=like.device, dtype=like.dtype)
        replacements[id(conv)] = module.train(conv.training)
    return _rebind(model, replacements)[0]


def check_runs(model: nn.Module, plan: Plan, *inputs: Tensor) -> dict[str, int]:
    """Run the converted `model` on `inputs` and count the runs of each replaced layer, by name.

    Raises ConversionError if one ran more or less often than its convolution did (once, in most networks).
    """
    named = dict(model.named_modules())
    missing = [name for name in plan.ranks if name not in named]
    if missing:
        raise ConversionError(f"the plan names {missing[0]!r}, which the model does not have")
    counts = dict.fromkeys(plan.ranks, 0)

    def counter(name):
        def count(module, args, output):
            counts[name] += 1

        return count

    with ExitStack() as stack, torch.no_grad():
        for name in plan.ranks:
            stack.callback(named[name].register_forward_hook(counter(name)).remove)
        model(*inputs)
    expected = [layer.calls for layer in plan.layers if layer.ranks is not None]
    _check_counts(list(counts), expected, list(counts.values()))
    return counts


def _check(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The model's convolutions by name, once everything that can be wrong has been ruled out."""
    convs = convolutions(model)
    planned = {layer.name: layer for layer in plan.layers}
    absent, extra = sorted(set(planned) - set(convs)), sorted(set(convs) - set(planned))
    if absent or extra:
        what = f"it has no convolution {absent[0]!r}" if absent else f"the plan does not know {extra[0]!r}"
        raise ConversionError(
            f"the plan was made for another model than this {type(model).__name__}: {what}; make a new plan"
        )
    owned_by = rules.owners(model)
    for name, conv in convs.items():
        spec = describe(conv)
        if spec != planned[name].spec:
            raise ConversionError(
                f"the plan was made for another model: {name!r} is {spec}, planned was {planned[name].spec}"
            )
        if planned[name].ranks is None:
            continue
        reason = rules.cannot(conv, owned_by)
        if reason is None and conv.weight.is_meta:
            reason = "its weights are on the meta device; load them first"
        if reason is not None:
            raise ConversionError(f"{name or type(conv).__name__!r} cannot be factorised: {reason}")
    if not plan.ranks:
        reasons = sorted({layer.reason for layer in plan.layers})
        raise ConversionError(
            f"the plan leaves all {len(plan.layers)} convolutions dense, so there is nothing to apply: "
            + "; ".join(reasons[:3])
            + ("; ..." if len(reasons) > 3 else "")
        )
    return convs


def _weightings(plan: Plan, calibration: Calibration | None) -> Mapping[str, Weighting]:
    if calibration is None:
        if plan.calibration is not None:
            raise ConversionError(
                "the plan's ranks were chosen with a calibration, without which the same ranks lose far more; pass "
                "apply(..., calibration=...) one of this model"
            )
        return {}
    absent = [name for name in plan.ranks if name not in calibration.weightings]
    if absent:
        raise ConversionError(
            f"the calibration knows nothing of {absent[0]!r}; calibrate this very model and pass that"
        )
    return calibration.weightings


def _rebind(model: nn.Module, replacements: Mapping[int, nn.Module]) -> tuple[nn.Module, Callable[[], None]]:
    """Put each replacement (by the id of the old module) into every slot of the old one.

    Returns the model (or what replaces it, if it is a convolution itself) and a function that undoes it all.
    """
    if id(model) in replacements:
        return replacements[id(model)], lambda: None
    changed = [slot for slot in slots(model) if id(slot[2]) in replacements]
    for parent, key, child in changed:
        parent.add_module(key, replacements[id(child)])

    def undo():
        for parent, key, child in changed:
            parent.add_module(key, child)

    return model, undo


def _check_gone(model: nn.Module, replaced: Sequence[nn.Module]) -> None:
    modules = {id(module) for module in model.modules()}
    parameters = {id(parameter) for parameter in model.parameters()}
    for conv in replaced:
        if id(conv) in modules or any(id(p) in parameters for p in conv.parameters()):
            raise ConversionError(
                f"{conv} is still part of the model after its replacement; its parent does not let go of it"
            )


def _runs_on_meta(model: nn.Module, watched: Sequence[nn.Module], plan: Plan) -> list[int] | None:
    """Runs of each watched module in one traced pass; None where the plan had no trace either."""
    if plan.input_shape is None:
        return None
    try:
        calls = trace(model, watched, plan.input_shape).calls
    # The model is the user's and may raise anything; the cause travels along.
    except Exception as error:
        raise ConversionError(
            f"the model does not run on the plan's input of shape {plan.input_shape} "
            f"({type(error).__name__}: {error}); plan this model anew"
        ) from error
    return [len(calls.get(id(module), ())) for module in watched]


def _check_counts(names: Sequence[str], expected: Sequence[int], found: Sequence[int]) -> None:
    for name, before, after in zip(names, expected, found, strict=True):
        if before != after:
            raise ConversionError(
                f"{name!r} ran {before} time(s) as a convolution but {after} time(s) once replaced: the "
                "model reaches it by another way than its registered modules; exclude it"
            )
