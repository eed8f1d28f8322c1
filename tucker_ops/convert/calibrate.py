"""Fisher information of a network's convolutions from unlabelled inputs: what a compression must preserve."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tucker_ops.convert.modules import convolutions
from tucker_ops.decompose import Weighting
from tucker_ops.errors import CalibrationError, ConfigError

LIKELIHOODS = ("softmax", "sigmoid")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """A `Weighting` for each convolution that the output depends on, by name, and what they rest on.

    ``samples`` backward passes over inputs of together ``elements`` elements; ``source`` says in words which.
    """

    weightings: Mapping[str, Weighting] = field(repr=False)
    samples: int
    elements: int
    source: str = ""

    @property
    def digest(self) -> str:
        """Short hash of the weightings, by which a plan knows the calibration it was made with."""
        content = hashlib.sha256()
        for name, weighting in sorted(self.weightings.items()):
            content.update(name.encode())
            for matrix in (weighting.input, weighting.output, weighting.taps):
                content.update(matrix.numpy().tobytes())
        return content.hexdigest()[:16]

    def to_dict(self) -> dict:
        """Tensors and plain data, as `torch.save` stores them and `torch.load(weights_only=True)` reads them."""
        return {
            "samples": self.samples,
            "elements": self.elements,
            "source": self.source,
            "weightings": {
                name: {"input": w.input, "output": w.output, "taps": w.taps, "energy": w.energy}
                for name, w in self.weightings.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> Calibration:
        """Inverse of `to_dict`. Raises ConfigError where an entry is missing."""
        try:
            weightings = {name: Weighting(**w) for name, w in data["weightings"].items()}
            return cls(weightings, data["samples"], data["elements"], data["source"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a calibration as Calibration.to_dict writes it: {error}") from None


def calibrate(
    model: nn.Module,
    inputs: Iterable[Tensor],
    *,
    labels_per_input: int = 2,
    likelihood: str = "softmax",
    seed: int = 0,
    source: str = "",
    progress: Progress | None = None,
) -> Calibration:
    """Estimate the Fisher information of every convolution in `model`, which is not changed.

    Objective: compress so that KL(p_dense ‖ p_compressed), summed over all voxels, grows least. To second order that is
    ½ Σ_l E⟨g_l, ΔW_l⟩² with g_l the gradient of the log-likelihood of labels *drawn from the model's own output*
    (the true Fisher, not the empirical one: Martens 2020; no annotated labels are needed), of which each layer
    keeps three Kronecker factors (`Weighting`). The gradient is that of a whole input, so voxels that pull the
    kernel the same way count together; per-voxel statistics of input and output gradient, as in K-FAC, do not see
    that and measured worse (bench/results/NOTES.md).

    Args:
        model: logits [N, K, *spatial] from one tensor. Runs in evaluation mode, in its own dtype.
        inputs: tensors [N, C, *spatial] on the model's device; read once. A batch counts as one draw: labels are
            independent, so the expectation is the same.
        labels_per_input: draws of labels, and so backward passes, per input.
        likelihood: "softmax" for K classes that exclude each other, "sigmoid" for K that overlap (regions).
        source: what the inputs are, in words, for the plan.
        progress: called as progress(done, 0, "") after each input; their number is not known beforehand.

    Memory: what one backward pass takes, and C_in² + C_out² + taps² numbers in float64 per layer.
    Raises CalibrationError for inputs that the model does not take, that hold NaN, or from which nothing can be
    learnt (no gradient anywhere), and ConfigError for options out of range.
    """
    if likelihood not in LIKELIHOODS:
        raise ConfigError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    if isinstance(labels_per_input, bool) or not isinstance(labels_per_input, int) or labels_per_input < 1:
        raise ConfigError(f"labels_per_input must be a whole number of at least 1, got {labels_per_input!r}")
    layers = {name: conv for name, conv in convolutions(model).items() if _has_weights(conv)}
    if not layers:
        raise CalibrationError(f"{type(model).__name__} contains no convolution with weights to calibrate")
    generator = torch.Generator().manual_seed(seed)
    sums = {name: _Sums() for name in layers}
    samples = items = elements = 0
    with _differentiable(model, layers.values()):
        for number, batch in enumerate(inputs):
            logits = _logits(model, batch, likelihood)
            for draw in range(labels_per_input):
                gradients = torch.autograd.grad(
                    _negative_log_likelihood(logits, likelihood, generator),
                    [conv.weight for conv in layers.values()],
                    retain_graph=draw < labels_per_input - 1,
                    allow_unused=True,
                )
                for (name, conv), gradient in zip(layers.items(), gradients, strict=True):
                    if gradient is not None:
                        sums[name].add(gradient.transpose(0, 1) if conv.transposed else gradient)
            samples += labels_per_input
            items += labels_per_input * len(batch)
            elements += batch.numel()
            if progress is not None:
                progress(number + 1, 0, "")
    if not samples:
        raise CalibrationError("no inputs to calibrate with; give at least one")
    weightings = {name: s.weighting(items) for name, s in sums.items() if s.count}
    if not any(w.energy for w in weightings.values()):
        raise CalibrationError(
            "the model's output does not depend on any weight for these inputs (its gradient is zero everywhere), so "
            "they say nothing of what matters; calibrate with images like those that it was trained on"
        )
    return Calibration(weightings, samples, elements, source)


class _Sums:
    """Σ over gradients of g gᵀ in each mode."""

    def __init__(self):
        self.count = 0
        self.input = self.output = self.taps = 0.0

    def add(self, gradient: Tensor) -> None:
        """gradient [C_out, C_in, *kernel]."""
        # float32 sums of a gradient's squares lose digits that a nearly singular factor needs.
        g = gradient.detach().to(device="cpu", dtype=torch.float64).flatten(2)
        rows, columns, taps = (g.movedim(mode, 0).flatten(1) for mode in range(3))
        self.output = self.output + rows @ rows.T
        self.input = self.input + columns @ columns.T
        self.taps = self.taps + taps @ taps.T
        self.count += 1

    def weighting(self, items: int) -> Weighting:
        output = self.output / items
        return Weighting(self.input / items, output, self.taps / items, float(output.trace()))


def _has_weights(conv: nn.Module) -> bool:
    weight = conv._parameters.get("weight")
    return weight is not None and weight.is_floating_point() and not weight.is_meta and conv.groups == 1


@contextmanager
def _differentiable(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode with gradients for the layers' weights alone; everything is put back in the end."""
    training = {module: module.training for module in model.modules()}
    wanted = {id(layer.weight) for layer in layers}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in required:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        for module, value in training.items():
            module.training = value


def _logits(model: nn.Module, batch: Tensor, likelihood: str) -> Tensor:
    if not isinstance(batch, Tensor) or batch.ndim < 3:
        what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise CalibrationError(f"calibration inputs must be tensors [N, C, *spatial], got {what}")
    if not torch.isfinite(batch).all():
        bad = int((~torch.isfinite(batch)).sum())
        raise CalibrationError(
            f"a calibration input holds {bad} NaN or infinite values of {batch.numel()}; repair or remove that image"
        )
    try:
        logits = model(batch)
    # The model is the user's and may raise anything; the cause travels along.
    except Exception as error:
        raise CalibrationError(
            f"the model does not run on a calibration input of shape {tuple(batch.shape)} ({type(error).__name__}: "
            f"{error}); give inputs with the channels and extents that it was trained on"
        ) from error
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != batch.ndim
        or (likelihood == "softmax" and logits.shape[1] < 2)
    ):
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CalibrationError(
            f"calibrating takes a model whose output is one tensor of logits [N, K, *spatial], got {what}; switch deep "
            "supervision off, and name likelihood='sigmoid' for a single output"
        )
    if not logits.requires_grad:
        raise CalibrationError(
            f"the output of {type(model).__name__} has no gradient by its convolutions; calibrate a model whose "
            "forward pass does not switch gradients off"
        )
    if not torch.isfinite(logits).all():
        raise CalibrationError("the model's output holds NaN or infinite values for a calibration input")
    return logits


def _negative_log_likelihood(logits: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Of labels drawn from the model's own output, summed over voxels."""
    with torch.no_grad():
        if likelihood == "sigmoid":
            drawn = torch.bernoulli(logits.float().sigmoid().cpu(), generator=generator).to(logits.device)
        else:
            probabilities = logits.float().softmax(1).movedim(1, -1).cpu()
            drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
            drawn = drawn.reshape(probabilities.shape[:-1]).to(logits.device)
    if likelihood == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits.float(), drawn, reduction="sum")
    return F.cross_entropy(logits.float(), drawn, reduction="sum")
