"""What a compression did, kept beside the compressed model as ``tucker_ops_manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tucker_ops.convert import CompressionConfig, Plan
from tucker_ops.errors import ModelFolderError
from tucker_ops.nnunet.folder import read_json

MANIFEST_NAME = "tucker_ops_manifest.json"
SCHEMA_VERSION = 1
# Entries that manifests of this schema did not have from the start.
ADDED = ("calibration", "refinement", "check", "finetuning")


@dataclass(frozen=True)
class Totals:
    """Of one network: parameters, multiply-accumulates of one patch, and bytes.

    ``weight_bytes`` are the stored tensors, each counted once; ``file_bytes`` the checkpoint files of one
    fold, which in the source may hold the optimizer's state as well.
    """

    parameters: int
    macs: int
    weight_bytes: int
    file_bytes: int


@dataclass(frozen=True)
class Manifest:
    """``errors`` maps each fold to the achieved relative error of its factorised layers' weights (Frobenius
    norm).

    ``source_sha256`` maps the source's checkpoints, relative to its folder, to their hashes;
    ``input_shape`` is [1, C, *patch], for which MACs are counted; ``dtype`` that of the stored weights;
    ``verification`` names what of nnU-Net loaded the folder for the check of its logits; ``calibration`` what
    ranks and factors were calibrated on, ``refinement`` how near each fold then came to the dense model by
    `tucker_ops.refine` (``errors`` are those before it), ``check`` what it lost on the images that it was checked
    with, and ``finetuning`` how it was trained on; None if not.
    """

    source: str
    source_sha256: Mapping[str, str]
    configuration: str
    trainer_name: str
    network_class_name: str
    input_shape: tuple[int, ...]
    dtype: str
    config: CompressionConfig
    plan: Plan
    errors: Mapping[str, Mapping[str, float]]
    dense: Totals
    tucker: Totals
    verification: str
    versions: Mapping[str, str]
    calibration: Mapping[str, Any] | None = None
    refinement: Mapping[str, Any] | None = None
    check: Mapping[str, Any] | None = None
    finetuning: Mapping[str, Any] | None = None

    def mean_errors(self) -> dict[str, float]:
        """Achieved error of each factorised layer, averaged over the folds."""
        folds = list(self.errors.values())
        return {name: sum(fold[name] for fold in folds) / len(folds) for name in folds[0]}

    def refined_folds(self) -> Mapping[str, Mapping[str, Any]]:
        """Of each fold that was to be refined the fields of `Refined` and its reason; none where none was."""
        return {} if self.refinement is None else self.refinement["folds"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "source_sha256": dict(self.source_sha256),
            "configuration": self.configuration,
            "trainer_name": self.trainer_name,
            "network_class_name": self.network_class_name,
            "input_shape": list(self.input_shape),
            "dtype": self.dtype,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "errors": {fold: dict(layers) for fold, layers in self.errors.items()},
            "dense": asdict(self.dense),
            "tucker": asdict(self.tucker),
            "verification": self.verification,
            "versions": dict(self.versions),
            **{name: getattr(self, name) for name in ADDED},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_dict`; ModelFolderError for another schema version or a missing entry."""
        if content.get("schema_version") != SCHEMA_VERSION:
            raise ModelFolderError(
                f"the manifest has schema version {content.get('schema_version')}, this tucker_ops reads "
                f"{SCHEMA_VERSION}; compress the model again"
            )
        try:
            fields = {name: content[name] for name in cls.__dataclass_fields__ if name not in ADDED}
        except KeyError as error:
            raise ModelFolderError(
                f"the manifest lacks the entry {error}; compress the model again"
            ) from error
        fields |= {name: content.get(name) for name in ADDED}
        fields["config"] = CompressionConfig.from_dict(fields["config"])
        fields["plan"] = Plan.from_dict(fields["plan"])
        try:
            fields["input_shape"] = tuple(fields["input_shape"])
            fields["dense"] = Totals(**fields["dense"])
            fields["tucker"] = Totals(**fields["tucker"])
        except TypeError as error:
            raise ModelFolderError(
                f"the manifest is not as this tucker_ops writes it ({error}); compress the model again"
            ) from error
        return cls(**fields)

    def to_json(self) -> bytes:
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a compressed model folder; ModelFolderError where there is none."""
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise ModelFolderError(f"{path} does not exist; give a folder that tucker-ops compress wrote")
    return Manifest.from_dict(read_json(path))


def installed_versions() -> dict[str, str]:
    """Versions of what took part in a compression."""
    import tucker_ops

    names = ("nnunetv2", "dynamic_network_architectures", "tensorly")
    return {"tucker_ops": tucker_ops.__version__, "torch": torch.__version__} | {n: version(n) for n in names}
