"""Per layer of a model folder: ranks, error or the reason it is dense, and what runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import tucker_ops
from tucker_ops.errors import DeviceError
from tucker_ops.fused import FusedForward, explain
from tucker_ops.nn import TuckerConv2d, TuckerConv3d, spec_of
from tucker_ops.nnunet.folder import DEFAULT_CHECKPOINT, Fold, ModelFolder, patch_error, read_model_folder
from tucker_ops.nnunet.manifest import MANIFEST_NAME, Manifest, read_manifest
from tucker_ops.nnunet.networks import build_network
from tucker_ops.types import ConvSpec, Ranks

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerExplanation:
    """``ranks`` is None for a dense layer, and ``reason`` says why it is; ``error`` is the relative error
    of the weights, averaged over the folds; ``backend`` what runs the layer and ``backend_reason`` why."""

    name: str
    spec: ConvSpec
    input_size: tuple[int, ...]
    ranks: Ranks | None
    error: float | None
    reason: str
    backend: str
    backend_reason: str


def explain_folder(
    model_dir: str | Path,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    device: str = "cpu",
    trust: bool = False,
) -> list[LayerExplanation]:
    """Explain the convolutions that run for one patch, in the order in which they run.

    Sizes come from a forward pass without data (torch's meta device), dtypes from how nnU-Net predicts:
    float32 on the CPU, float16 on CUDA. Raises DeviceError for an unknown device and the errors of
    `read_model_folder`.
    """
    kind = _device_type(device)
    folder = read_model_folder(model_dir, folds=folds, checkpoint=checkpoint, trust=trust)
    manifest = read_manifest(folder.path) if (folder.path / MANIFEST_NAME).is_file() else None
    network, calls = convolution_calls(folder)
    reasons = {layer.name: layer.reason for layer in manifest.plan.layers} if manifest else {}
    errors = manifest.mean_errors() if manifest else {}
    fused = _fused_layers(network, kind)
    result = []
    for name, shape in calls:
        module = network.get_submodule(name)
        spec = spec_of(module)
        ranks = getattr(module, "ranks", None)
        names = [n for n, m in network.named_modules(remove_duplicate=False) if m is module]
        backend, why = next((fused[n] for n in names if n in fused), None) or _backend(module, shape, kind)
        result.append(
            LayerExplanation(
                name=next((n for n in names if n in errors or n in reasons), name),
                spec=spec,
                input_size=shape[2:],
                ranks=ranks,
                error=next((errors[n] for n in names if n in errors), None),
                reason="" if ranks else _why_dense(names, reasons, manifest),
                backend=backend,
                backend_reason=why,
            )
        )
    return result


def convolution_calls(folder: ModelFolder) -> tuple[nn.Module, list[tuple[str, tuple[int, ...]]]]:
    """The network on the meta device, and (name, input shape) of each convolution call of one patch."""
    network = build_network(folder.architecture, folder.input_channels, folder.num_outputs).to("meta").eval()
    calls = []
    with ExitStack() as stack:
        for name, module in network.named_modules():
            if isinstance(module, CONVOLUTIONS) or hasattr(module, "ranks"):
                hook = module.register_forward_pre_hook(
                    lambda _, inputs, name=name: calls.append((name, tuple(inputs[0].shape)))
                )
                stack.callback(hook.remove)
        try:
            network(torch.empty((1, folder.input_channels, *folder.patch_size), device="meta"))
        except RuntimeError as error:
            raise patch_error(folder, error) from error
    return network, calls


def _fused_layers(network: nn.Module, kind: str) -> dict[str, tuple[str, str]]:
    """What runs the layers that inference folds into blocks, and how; none where it runs as it was."""
    if not isinstance(network, FusedForward):
        return {}
    explanation = explain(network, device=kind, dtype=_dtype(kind))
    if not explanation.used:
        return {}
    return {layer.name: ("fused", layer.reason) for layer in explanation.layers if layer.fused}


def _dtype(kind: str) -> torch.dtype:
    """How nnU-Net predicts."""
    return torch.float16 if kind == "cuda" else torch.float32


def _why_dense(names: list[str], reasons: Mapping[str, str | None], manifest: Manifest | None) -> str:
    if manifest is None:
        return "the model is not compressed"
    return next((reasons[n] for n in names if reasons.get(n)), "no reason recorded")


def _device_type(device: str) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise DeviceError(f"device {device!r} given; use cpu or cuda") from error


def _backend(module: nn.Module, shape: tuple[int, ...], kind: str) -> tuple[str, str]:
    if not isinstance(module, TuckerConv2d | TuckerConv3d):
        return "torch", "torch's own convolution" + ("s" if hasattr(module, "ranks") else "")
    problem = replace(module.problem(shape), device=kind, dtype=_dtype(kind))
    explanation = tucker_ops.explain(problem)
    others = [f"{name}: {v.reason}" for name, v in explanation.verdicts.items() if name != explanation.chosen]
    chosen = explanation.verdicts[explanation.chosen].reason
    return explanation.chosen, chosen if explanation.verdicts[explanation.chosen].ok else "; ".join(others)
