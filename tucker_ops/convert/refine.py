"""A compressed network brought nearer to the dense one on unlabelled inputs, by all of its weights together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from tucker_ops.convert.calibrate import LIKELIHOODS
from tucker_ops.convert.divergence import distance
from tucker_ops.convert.precision import PRECISIONS, processor_multiplies_bf16
from tucker_ops.errors import CalibrationError, ConfigError

Progress = Callable[[int, int, str], None]

# Peak step of each weight, as a multiple of √distance; NOTES.md tells what others gave.
RATE = 2e-3
# Inputs on which the distance is measured before and after.
JUDGED = 8
# What computing in bf16 may change the distance by, as a part of it, before "auto" leaves it. Steps leave a third or a
# quarter of the distance, so of that it is about a tenth.
ROUNDING = 0.03
# Bytes of the dense network's outputs that are kept, for inputs come again.
KEPT = 2**30


@dataclass(frozen=True)
class Refined:
    """What `refine` did: distances in nats a voxel, before and after ``steps`` at a peak of ``learning_rate``.

    ``precision`` is what the steps computed in, and why, in words; distances are always those in the model's own.
    """

    steps: int
    learning_rate: float
    before: float
    after: float
    precision: str

    @property
    def kept(self) -> bool:
        """Whether the new weights stayed. Where they came no nearer, the model is as it was."""
        return self.after < self.before

    @property
    def reason(self) -> str:
        """Why the new weights did not stay; empty where they did."""
        if self.kept:
            return ""
        return (
            f"{self.steps} steps at {self.learning_rate:.1g} came no nearer to the dense model ({self.before:.3g} nats "
            f"a voxel before, {self.after:.3g} after), so the weights stayed as they were"
        )


def refine(
    model: nn.Module,
    dense: nn.Module,
    inputs: Sequence[Tensor],
    *,
    steps: int = 100,
    learning_rate: float | None = None,
    likelihood: str = "softmax",
    seed: int = 0,
    precision: str = "auto",
    progress: Progress | None = None,
) -> Refined:
    """Train `model`, in place, to give what `dense` gives on `inputs`; no labels are needed.

    Minimises the KL divergence of `distance`, of which `calibrate` knows the second order at the dense weights and
    layer by layer only: here layers make up for each other's errors. Adam, one input a step, all of them in turn and in
    random order; linear warm-up over a tenth of the steps, then down to 0. The divergence grows as the square of what
    the weights are off by, so the peak is `RATE` times the root of what it is at first: a network that is nearly right
    is moved little. Norms that keep running statistics and dropout stay in evaluation mode.

    Args:
        model: compressed, in float32; parameters that require no gradient stay as they are.
        dense: what it was made from, on the same device; runs in evaluation mode and is not changed.
        inputs: tensors [N, C, *spatial] on that device, as prediction gives them; small ones mislead norms that
            compute their statistics on them. Indexed when needed, so a lazy sequence will do, if it gives the same
            tensor for the same number.
        steps: of the optimizer, each a forward and a backward pass of `model`, and a forward pass of `dense` where
            its output on that input is not kept; up to 1 GiB of outputs is.
        learning_rate: the peak, instead of the rule's.
        likelihood: "softmax" or "sigmoid", as in `calibrate`.
        precision: of the steps' passes through `model`: "fp32"; "bf16", under autocast; or "auto", which is bf16 on a
            processor that multiplies it, where that changes the distance on the first input by at most `ROUNDING` of
            it. The dense network's outputs, the distance and Adam stay in float32.
        progress: called as progress(done, steps, "") after each step.

    The distance on up to `JUDGED` of the inputs is measured before and after; a model that came no nearer gets its
    weights back, and `Refined.reason` says so. The same on an interrupt or error. Raises CalibrationError for no
    inputs, inputs with NaN, or outputs that do not fit each other, and ConfigError for options out of range.
    """
    if likelihood not in LIKELIHOODS:
        raise ConfigError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number of at least 1, got {steps!r}")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(f"learning_rate must be a number above 0, got {learning_rate!r}")
    if not len(inputs):
        raise CalibrationError("no inputs to refine on; give at least one")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    weights = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    if not weights:
        raise ConfigError(
            f"no parameter of {type(model).__name__} requires a gradient; nothing can be refined"
        )
    judged = list(islice(_order(len(inputs), seed), min(JUDGED, len(inputs))))
    kept = [p.detach().clone() for p in weights]
    measure = _Distance(model, dense, inputs, likelihood)
    with _modes(model, dense):
        each = measure.each(judged)
        before = sum(each) / len(each)
        if not math.isfinite(before):
            raise CalibrationError(
                f"the compressed model is {before} from the dense one on these inputs; its output is not finite, so "
                "there is nothing to refine: compress it anew, or look for infinite weights"
            )
        rate = learning_rate or RATE * math.sqrt(before)
        low, why = _chosen(precision, weights, measure, judged[0], each[0])
        try:
            if before > 0:
                _train(measure, weights, steps, rate, before, seed, low, progress)
            after = measure.each(judged)
            result = Refined(steps, rate, before, sum(after) / len(after), why)
        except BaseException:
            _put_back(weights, kept)
            raise
        if not result.kept:
            _put_back(weights, kept)
    return result


class _Distance:
    """Of `model` from `dense` on an input, by its number."""

    def __init__(self, model: nn.Module, dense: nn.Module, inputs: Sequence[Tensor], likelihood: str):
        self._model, self._dense, self.inputs, self._likelihood = model, dense, inputs, likelihood
        self._taught: dict[int, Tensor] = {}
        self._room = KEPT

    def __call__(self, number: int, *, low: bool = False) -> Tensor:
        """With `low` the model computes in bf16."""
        batch = self.inputs[number]
        if not isinstance(batch, Tensor) or not torch.isfinite(batch).all():
            what = "NaN or infinite values" if isinstance(batch, Tensor) else type(batch).__name__
            raise CalibrationError(f"an input to refine on holds {what}; repair or remove it")
        taught = self._dense_output(number, batch)
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=low):
            found = self._model(batch)
        if not (isinstance(found, Tensor) and isinstance(taught, Tensor) and found.shape == taught.shape):
            shapes = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in (found, taught)]
            raise CalibrationError(
                f"refining takes two models whose output is one tensor of logits, the same shape for both; got "
                f"{shapes[0]} from the compressed and {shapes[1]} from the dense one. Switch deep supervision off"
            )
        return distance(found, taught, likelihood=self._likelihood)

    @torch.no_grad()
    def each(self, numbers: Sequence[int], *, low: bool = False) -> list[float]:
        return [float(self(n, low=low)) for n in numbers]

    def _dense_output(self, number: int, batch: Tensor) -> Tensor:
        if number in self._taught:
            return self._taught[number]
        with torch.no_grad():
            taught = self._dense(batch)
        # Those that came first stay: each comes once a round, so the one used longest ago is the next to come.
        if isinstance(taught, Tensor) and taught.nbytes <= self._room:
            self._room -= taught.nbytes
            self._taught[number] = taught
        return taught


def _train(
    measure: _Distance,
    weights: Sequence[nn.Parameter],
    steps: int,
    rate: float,
    scale: float,
    seed: int,
    low: bool,
    progress: Progress | None,
) -> None:
    optimizer = torch.optim.Adam(weights, lr=rate)
    order = _order(len(measure.inputs), seed)
    warmup = max(1, steps // 10)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        with torch.enable_grad():
            # In units of what it was: Adam's own epsilon would else decide where networks are nearly right.
            loss = measure(next(order), low=low) / scale
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        if not all(g is None or torch.isfinite(g).all() for g in gradients):
            raise CalibrationError(
                f"step {step + 1} of refining has a gradient that is not finite; lower learning_rate, {rate:.1g} now"
            )
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps, "")
    for weight in weights:
        weight.grad = None


def _chosen(
    asked: str, weights: Sequence[nn.Parameter], measure: _Distance, number: int, exact: float
) -> tuple[bool, str]:
    """Whether the steps compute in bf16, and why, in words; `exact` is the distance on input `number`."""
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    if dtypes != ["float32"]:
        if asked == "bf16":
            raise ConfigError(f"bf16 is a precision for weights in float32; these are in {', '.join(dtypes)}")
        return False, f"{', '.join(dtypes)}, as the weights are"
    if asked != "auto":
        return asked == "bf16", f"{asked}, as asked for"
    if weights[0].device.type != "cpu":
        return False, "fp32: bf16 on a GPU is for those who ask for it"
    if not processor_multiplies_bf16():
        return False, "fp32: the processor does not multiply bf16"
    (rounded,) = measure.each([number], low=True)
    # Written so that NaN is no reason for it.
    low = abs(rounded - exact) <= ROUNDING * exact
    return low, (
        f"{'bf16' if low else 'fp32'}: on the first input the distance is {exact:.2g} nats a voxel in fp32 and "
        f"{rounded:.2g} in bf16, which may be off by {ROUNDING:.0%}"
    )


def _order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _put_back(weights: Sequence[nn.Parameter], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
            weight.grad = None


@contextmanager
def _modes(model: nn.Module, dense: nn.Module) -> Iterator[None]:
    """`dense` in evaluation mode; `model` in training mode but for what would compute something else there."""
    training = {module: module.training for network in (model, dense) for module in network.modules()}
    model.train()
    dense.eval()
    for module in model.modules():
        if isinstance(module, _DropoutNd) or (isinstance(module, _NormBase) and module.track_running_stats):
            module.eval()
    try:
        yield
    finally:
        for module, value in training.items():
            module.training = value
