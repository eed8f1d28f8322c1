"""How a fine-tuning runs: everything that two runs must share for one to resume the other."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from tucker_ops.convert.precision import PRECISIONS
from tucker_ops.errors import ConfigError


@dataclass(frozen=True)
class FinetuneSettings:
    """
    Args:
        steps: of the optimizer. A few hundred recover most of what a moderate compression lost.
        learning_rate: the peak, for AdamW: linear warm-up over a tenth of the steps, then half a cosine down to a
            hundredth. A constant 1e-5, as published for 50 epochs, moves little in a few hundred steps.
        weight_decay: of AdamW.
        batch_size: of all processes together; the plans' by default.
        patch_size: extents of the patches; the plans' by default.
        distill: weight of KL(dense ‖ compressed) per voxel beside nnU-Net's own loss; 0 for none.
        supervise: weight of nnU-Net's own loss (Dice and cross-entropy, deep supervision); against labels, or against
            the dense model's segmentations where there are none. None, the default, is 1 with labels and 0 without:
            the dense model says nothing there that distillation does not, and where it errs under augmentation the
            two pull apart.
        features: weight of the distance between both networks' encoder features (each channel brought to unit
            variance by the dense one's), stage by stage; 0 for none.
        temperature: of both softmaxes in the distillation (Hinton et al. 2015).
        precision: of the forward pass on the CPU: bf16 under autocast, fp32, or auto, which takes bf16 where the
            processor multiplies it. GPUs run nnU-Net's own fp16 mixed precision.
        steps_per_epoch: after each epoch a checkpoint is written, from which an interrupted run resumes.
        seed: of sampling and augmentation in the training process.

    Raises ConfigError for values out of range.
    """

    steps: int = 300
    learning_rate: float = 3e-4
    weight_decay: float = 1e-2
    batch_size: int | None = None
    patch_size: tuple[int, ...] | None = None
    distill: float = 1.0
    supervise: float | None = None
    features: float = 0.0
    temperature: float = 1.0
    precision: str = "auto"
    steps_per_epoch: int = 25
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "steps_per_epoch"):
            self._check_count(name)
        if self.batch_size is not None:
            self._check_count("batch_size")
        if self.patch_size is not None and not all(isinstance(n, int) and n > 0 for n in self.patch_size):
            raise ConfigError(f"patch_size must be whole numbers above 0, got {self.patch_size}")
        for name in ("learning_rate", "temperature"):
            self._check_number(name, above=True)
        for name in ("weight_decay", "distill", "supervise", "features"):
            if getattr(self, name) is not None or name != "supervise":
                self._check_number(name, above=False)
        if self.supervise is not None and not self.distill + self.supervise + self.features > 0:
            raise ConfigError(
                "distill, supervise and features are all 0, so there is nothing to learn from; set one"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")

    def _check_number(self, name: str, *, above: bool) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above and value == 0):
            raise ConfigError(
                f"{name} must be a number {'above' if above else 'of at least'} 0, got {value!r}"
            )

    def resolved(self, *, has_labels: bool) -> FinetuneSettings:
        """With `supervise` a number. Raises ConfigError where nothing is left to learn from."""
        if self.supervise is not None:
            return self
        return replace(self, supervise=1.0 if has_labels else 0.0)

    @property
    def epochs(self) -> int:
        return math.ceil(self.steps / self.steps_per_epoch)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def learning_rate_at(self, step: int) -> float:
        """For step 0 to `steps` - 1."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
