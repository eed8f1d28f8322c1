"""The accuracy check of a compression: predict with both models, and let through only what loses little."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tucker_ops.errors import AccuracyError
from tucker_ops.nnunet.compare import Gate, compare
from tucker_ops.nnunet.evaluate import evaluate_folder
from tucker_ops.nnunet.folder import DEFAULT_CHECKPOINT, Fold
from tucker_ops.nnunet.predict import predict_folder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AccuracyCheck:
    """Images to judge a compressed model on. Without labels, the dense model's output stands for them.

    `gate` says what may be lost; `mark` lets a model through that loses more, which its manifest then says.
    """

    images: Path
    labels: Path | None = None
    gate: Gate = field(default_factory=Gate)
    mark: bool = False


def check_model(
    check: AccuracyCheck,
    dense: Path,
    compressed: Path,
    folds: Sequence[Fold],
    checkpoint: str = DEFAULT_CHECKPOINT,
    *,
    trust: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures of the comparison for the manifest, with "passed" and "failures".

    Raises AccuracyError where too much is lost and the model is not just to be marked; and the errors of
    `predict_folder` and `evaluate_folder`.
    """
    with tempfile.TemporaryDirectory(prefix="tucker-ops-check-") as scratch:
        folders = {}
        for name, model in (("dense", dense), ("compressed", compressed)):
            folders[name] = Path(scratch) / name
            predict_folder(
                model, check.images, folders[name], folds=folds, checkpoint=checkpoint, mirroring=False,
                precision="fp32", trust=trust, progress=_labelled(progress, name),
            )  # fmt: skip
        reference = check.labels or folders["dense"]
        described = {"dataset_json": dense / "dataset.json", "allow_missing": True}
        comparison = compare(*(evaluate_folder(folders[name], reference, **described) for name in folders))
        agreement = evaluate_folder(folders["compressed"], folders["dense"], **described)
    failures = check.gate.failures(comparison)
    if failures and not check.mark:
        raise AccuracyError(
            f"the compressed model of {dense} loses too much, and nothing was written: {'; '.join(failures)}. Ask "
            "for a larger budget, calibrate on images like these (--calibrate), fine-tune a marked model (--mark), or "
            "allow more"
        )
    return {
        "against": "labels" if check.labels else "the dense model's output",
        "passed": not failures,
        "failures": failures,
        "max_drop": check.gate.max_drop,
        "max_class_drop": check.gate.max_class_drop,
        "agreement": agreement.mean,
        "cases": len(agreement.per_case),
        **comparison.to_dict(),
    }


def _labelled(progress: Progress | None, name: str) -> Progress | None:
    return (
        None if progress is None else lambda case, done, total: progress(f"{name} model, {case}", done, total)
    )
