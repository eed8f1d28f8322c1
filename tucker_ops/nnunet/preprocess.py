"""One case through nnU-Net's own reading and preprocessing, with the reason where that fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tucker_ops.errors import ImageError
from tucker_ops.nnunet.folder import ModelFolder

Case = tuple[np.ndarray, np.ndarray, dict]


class Preprocessor:
    """nnU-Net's preprocessor of a model's plans, configuration and dataset.json."""

    def __init__(self, source: ModelFolder):
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        self.plans = PlansManager(dict(source.plans))
        self.configuration = self.plans.get_configuration(source.configuration)
        self.dataset_json = dict(source.dataset_json)
        self.labels = self.plans.get_label_manager(self.dataset_json)
        self.preprocessor = self.configuration.preprocessor_class(verbose=False)

    def run(self, name: str, images: Sequence[Path], label: Path | None = None) -> Case:
        """Volume [C, *spatial], segmentation [1, *spatial] and properties of a case.

        Raises ImageError where a file is unreadable, does not fit the others, or holds NaN: nnU-Net's
        normalisation would spread that, or hide it.
        """
        files = [str(file) for file in images]
        reader = self.plans.image_reader_writer_class()
        try:
            volume, properties = reader.read_images(files)
            segmentation = None if label is None else reader.read_seg(str(label))[0]
            bad = max(_undefined(volume), sum(_undefined_in_file(file) for file in files))
            if bad:
                raise ImageError(
                    f"case {name} holds {bad} NaN or infinite values of {volume.size}; repair {', '.join(files)} or "
                    "leave it out"
                )
            # A volume of one value has no deviation to divide by; whoever minds looks at the result.
            with np.errstate(all="ignore"):
                return self.preprocessor.run_case_npy(
                    volume, segmentation, properties, self.plans, self.configuration, self.dataset_json
                )
        except ImageError:
            raise
        except (RuntimeError, OSError, ValueError, IndexError, AssertionError) as error:
            reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
            files += [] if label is None else [str(label)]
            raise ImageError(
                f"case {name} cannot be read or preprocessed ({reason}); check {', '.join(files)}"
            ) from error

    def foreground(self, segmentation: np.ndarray) -> dict:
        """Where each class is, around which training draws patches; as nnU-Net's preprocessing finds it."""
        labels = self.labels
        wanted = list(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
        if labels.has_ignore_label:
            wanted.append([-1, *labels.all_labels])
        return self.preprocessor._sample_foreground_locations(segmentation, wanted)


def _undefined(values: np.ndarray) -> int:
    return int((~np.isfinite(values)).sum()) if np.issubdtype(values.dtype, np.floating) else 0


def _undefined_in_file(file: str) -> int:
    """NaN and infinities in a NIfTI file: SimpleITK, by which nnU-Net reads, makes zeros of them without a word."""
    if not file.endswith((".nii", ".nii.gz")):
        return 0
    import nibabel

    image = nibabel.load(file)
    return (
        _undefined(np.asanyarray(image.dataobj)) if np.issubdtype(image.get_data_dtype(), np.floating) else 0
    )
