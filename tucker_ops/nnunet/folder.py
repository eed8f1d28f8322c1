"""A trained nnU-Net model folder: what is in it, or which part of it is missing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tucker_ops.errors import ModelFolderError, UnsupportedArchitectureError
from tucker_ops.nnunet.checkpoint import read_checkpoint

DEFAULT_CHECKPOINT = "checkpoint_final.pth"
# What stood in a configuration before nnU-Net 2.4 in place of the architecture block.
OLD_FORMAT_KEYS = (
    "UNet_class_name",
    "UNet_base_num_features",
    "unet_max_num_features",
    "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder",
    "num_pool_per_axis",
    "pool_op_kernel_sizes",
    "conv_kernel_sizes",
)
UNETS = ("PlainConvUNet", "ResidualEncoderUNet")

Fold = int | str


@dataclass(frozen=True)
class ModelFolder:
    """One trained configuration as nnU-Net stores it.

    ``checkpoints`` maps each fold to the names of its checkpoint files. ``architecture`` is nnU-Net's block
    of ``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``, also where the plans are of the
    older format that has none. ``patch_size`` in voxels, one extent per spatial axis. ``previous_stage`` is
    the configuration whose segmentations a cascade's second stage reads.
    """

    path: Path
    dataset_json: Mapping[str, Any]
    plans: Mapping[str, Any]
    checkpoints: Mapping[Fold, tuple[str, ...]]
    configuration: str
    trainer_name: str
    architecture: Mapping[str, Any]
    input_channels: int
    num_outputs: int
    patch_size: tuple[int, ...]
    previous_stage: str | None = None

    @property
    def folds(self) -> tuple[Fold, ...]:
        return tuple(self.checkpoints)

    @property
    def is_compressed(self) -> bool:
        return "tucker" in self.architecture["arch_kwargs"]

    def checkpoint_path(self, fold: Fold, checkpoint: str = DEFAULT_CHECKPOINT) -> Path:
        return self.path / f"fold_{fold}" / checkpoint

    def select_folds(
        self, folds: Sequence[Fold] | None = None, checkpoint: str = DEFAULT_CHECKPOINT
    ) -> tuple[Fold, ...]:
        """The folds asked for (default: all numbered ones with this checkpoint, else fold ``all``).

        Raises ModelFolderError listing what there is where a fold or its checkpoint is missing.
        """
        return _select_folds(self.path, self.checkpoints, folds, checkpoint)


def read_model_folder(
    path: str | Path,
    *,
    folds: Sequence[Fold] | None = None,
    checkpoint: str = DEFAULT_CHECKPOINT,
    trust: bool = False,
) -> ModelFolder:
    """Read the description of a trained model; the checkpoint of the first fold names its configuration.

    Raises ModelFolderError where `path` is no model folder or lacks a fold or checkpoint, CheckpointError
    for an unreadable checkpoint (`trust` as in `read_checkpoint`), UnsupportedArchitectureError for plans
    of the older format with an unknown network.
    """
    path = Path(path)
    _check_is_model_folder(path)
    dataset_json = read_json(path / "dataset.json")
    plans = read_json(path / "plans.json")
    checkpoints = _list_checkpoints(path)
    first = _select_folds(path, checkpoints, folds, checkpoint)[0]
    content = read_checkpoint(path / f"fold_{first}" / checkpoint, trust=trust)
    return _describe(
        path, dataset_json, plans, checkpoints, content["init_args"]["configuration"], content["trainer_name"]
    )


def find_model_folders(path: str | Path) -> list[Path]:
    """Model folders at `path` or up to two levels below it, sorted (nnU-Net's results and
    TotalSegmentator's).
    """
    path = Path(path)
    if is_model_folder(path):
        return [path]
    found = [p.parent for pattern in ("*/plans.json", "*/*/plans.json") for p in path.glob(pattern)]
    # nnU-Net leaves plans.json beside cross-validation results and ensembles as well.
    models = [p for p in found if is_model_folder(p)]
    return sorted(p for p in models if not any(part.startswith(".") for part in p.relative_to(path).parts))


def is_model_folder(path: Path) -> bool:
    """Whether nnU-Net's files are there, whatever is in them."""
    return not _missing_parts(path)


def patch_error(folder: ModelFolder, cause: Exception) -> ModelFolderError:
    """What to raise where the network does not run on one patch of plans.json."""
    return ModelFolderError(
        f"the network of {folder.path} does not run on one patch of {folder.patch_size} "
        f"({type(cause).__name__}: {cause}); correct patch_size in plans.json: each extent must be a multiple "
        "of the product of the strides along its axis"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ModelFolderError naming file and place otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read ({error.strerror}); give a file that can") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(
            f"{path} is not valid JSON ({error}); restore it from the trained model"
        ) from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds a JSON {type(content).__name__}, not an object; restore it")
    return content


def _missing_parts(path: Path) -> list[str]:
    missing = [name for name in ("dataset.json", "plans.json") if not (path / name).is_file()]
    if not any(p.is_dir() for p in path.glob("fold_*")):
        missing.append("fold_*/")
    return missing


def _check_is_model_folder(path: Path) -> None:
    if not path.exists():
        raise ModelFolderError(f"{path} does not exist; give the folder of a trained nnU-Net model")
    if not path.is_dir():
        raise ModelFolderError(f"{path} is a file; give the folder that holds dataset.json and plans.json")
    missing = _missing_parts(path)
    if not missing:
        return
    nested = find_model_folders(path)
    remedy = (
        f"did you mean {nested[0]}?"
        if nested
        else "give the folder of one trained configuration, such as nnUNetTrainer__nnUNetPlans__3d_fullres"
    )
    raise ModelFolderError(f"{path} is not a trained nnU-Net model: it lacks {', '.join(missing)}; {remedy}")


def _is_number(name: str) -> bool:
    """A fold's number as nnU-Net writes it: fold_01 is not fold 1."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def _list_checkpoints(path: Path) -> dict[Fold, tuple[str, ...]]:
    result: dict[Fold, tuple[str, ...]] = {}
    for folder in sorted(p for p in path.glob("fold_*") if p.is_dir()):
        name = folder.name.removeprefix("fold_")
        if name == "all" or _is_number(name):
            fold: Fold = "all" if name == "all" else int(name)
            result[fold] = tuple(sorted(p.name for p in folder.glob("*.pth")))
    return dict(sorted(result.items(), key=lambda item: (item[0] == "all", item[0])))


def _select_folds(
    path: Path,
    checkpoints: Mapping[Fold, tuple[str, ...]],
    folds: Sequence[Fold] | None,
    checkpoint: str,
) -> tuple[Fold, ...]:
    there = "; ".join(f"fold {f}: {', '.join(names) or 'no checkpoint'}" for f, names in checkpoints.items())
    there = f"{path} holds {there or 'no fold'}"
    if folds is None:
        usable = [f for f, names in checkpoints.items() if checkpoint in names]
        if not usable:
            raise ModelFolderError(f"no fold has a {checkpoint}; {there}; name another one as the checkpoint")
        return tuple(f for f in usable if f != "all") or ("all",)
    if not folds:
        raise ModelFolderError(f"an empty list of folds was given; {there}")
    chosen = tuple(dict.fromkeys(int(f) if _is_number(str(f)) else f for f in folds))
    for fold in chosen:
        if fold not in checkpoints:
            raise ModelFolderError(f"fold {fold} does not exist; {there}; choose one of these folds")
        if checkpoint not in checkpoints[fold]:
            raise ModelFolderError(
                f"fold {fold} has no {checkpoint}; {there}; choose one of these checkpoints"
            )
    return chosen


def _describe(
    path: Path,
    dataset_json: dict[str, Any],
    plans: dict[str, Any],
    checkpoints: Mapping[Fold, tuple[str, ...]],
    configuration: str,
    trainer_name: str,
) -> ModelFolder:
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    if "file_ending" not in dataset_json:
        raise ModelFolderError(
            f"{path / 'dataset.json'} lacks file_ending; restore it from the trained model"
        )
    if not isinstance(plans.get("configurations", {}), dict):
        raise ModelFolderError(
            f"{path / 'plans.json'}: configurations is no object; restore it from the trained model"
        )
    available = list(plans.get("configurations", {}))
    if configuration not in available:
        raise ModelFolderError(
            f"the checkpoint was trained with configuration {configuration!r}, but "
            f"{path / 'plans.json'} holds "
            f"{', '.join(available) or 'none'}; restore the plans.json of this model"
        )
    try:
        manager = PlansManager(plans)
        _check_old_format(path, manager._internal_resolve_configuration_inheritance(configuration))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected old nnU-Net plans format")
            resolved = manager.get_configuration(configuration)
        architecture = resolved.configuration["architecture"]
        outputs = manager.get_label_manager(dataset_json).num_segmentation_heads
        channels = determine_num_input_channels(manager, resolved, dataset_json)
        return ModelFolder(
            path=path,
            dataset_json=dataset_json,
            plans=plans,
            checkpoints=checkpoints,
            configuration=configuration,
            trainer_name=trainer_name,
            architecture={
                "network_class_name": _canonical(architecture["network_class_name"]),
                "arch_kwargs": architecture["arch_kwargs"],
                "_kw_requires_import": architecture["_kw_requires_import"],
            },
            input_channels=channels,
            num_outputs=outputs,
            patch_size=tuple(int(n) for n in resolved.patch_size),
            previous_stage=resolved.previous_stage_name,
        )
    except KeyError as error:
        raise ModelFolderError(
            f"{path}: plans.json or dataset.json lacks the entry {error}; restore both from the trained model"
        ) from error
    except UnsupportedArchitectureError:
        raise
    # nnU-Net checks little of what it reads, and stumbles over what does not fit.
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise ModelFolderError(
            f"{path}: plans.json or dataset.json is not as nnU-Net writes them ({type(error).__name__}: {error}); "
            "restore both from the trained model"
        ) from error


def _canonical(network_class_name: str) -> str:
    """Where dynamic_network_architectures really has the class.

    nnunetv2 translates plans of the older format to a module that is gone (``residual_unet``), and then
    finds the class by importing every module of that package, timm and torchvision included.
    """
    package, _, name = network_class_name.rpartition(".")
    if package.split(".")[0] == "dynamic_network_architectures" and name in UNETS:
        return f"dynamic_network_architectures.architectures.unet.{name}"
    return network_class_name


def _check_old_format(path: Path, configuration: Mapping[str, Any]) -> None:
    name = configuration.get("UNet_class_name")
    if "architecture" not in configuration and name not in UNETS:
        raise UnsupportedArchitectureError(
            f"{path / 'plans.json'} names the network {name!r}; plans of the older format are understood for "
            f"{' and '.join(UNETS)}"
        )
