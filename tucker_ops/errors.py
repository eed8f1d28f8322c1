"""Typed errors: each says what was given, what the limit is, and what to do.

All derive from ``ValueError`` or ``TypeError`` and never from ``RuntimeError``: nnU-Net reads a
``RuntimeError`` raised on a GPU as lack of memory and silently tries again on the CPU.
"""


class TuckerOpsError(Exception):
    """Base of every error that tucker_ops raises on purpose."""


class ShapeError(TuckerOpsError, ValueError):
    """Tensor shapes or convolution geometry that do not fit together."""


class DtypeError(TuckerOpsError, TypeError):
    """Tensor dtypes that differ from each other or that no backend computes."""


class DeviceError(TuckerOpsError, ValueError):
    """Tensors on different devices."""


class RankError(TuckerOpsError, ValueError):
    """Ranks below 1 or above the number of channels."""


class BackendError(TuckerOpsError, ValueError):
    """A backend named by the user that does not exist or cannot run the problem."""


class ConfigError(TuckerOpsError, ValueError):
    """A configuration value outside its range, or a budget that cannot be met."""


class CalibrationError(TuckerOpsError, ValueError):
    """Calibration inputs that the model does not take, or from which nothing can be learnt."""


class AccuracyError(TuckerOpsError, ValueError):
    """A compressed model that loses more accuracy than was allowed."""


class ResumeError(ConfigError):
    """What an interrupted run left, which does not fit the arguments of the one that would go on from it."""


class ConversionError(TuckerOpsError, ValueError):
    """A plan that does not fit the model it is applied to, or a layer that cannot be factorised."""


class ModelFolderError(TuckerOpsError, ValueError):
    """A folder that is not a trained nnU-Net model, or lacks a part of one."""


class CheckpointError(TuckerOpsError, ValueError):
    """A checkpoint that is truncated, unsafe to read, or lacks what prediction needs."""


class UnsupportedArchitectureError(TuckerOpsError, ValueError):
    """A network class in plans.json that tucker_ops does not know how to rebuild."""


class ImageError(TuckerOpsError, ValueError):
    """An image that cannot be read."""


class SegmentationError(TuckerOpsError, ValueError):
    """Segmentations that are missing, unreadable, or of unknown classes."""


class OutputExistsError(TuckerOpsError, ValueError):
    """Output that exists already and was not to be overwritten."""


class OutputWriteError(TuckerOpsError, OSError, ValueError):
    """The disk refused a write (full, read-only); nothing was left half-made."""
