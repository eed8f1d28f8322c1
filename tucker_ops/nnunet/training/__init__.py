"""Fine-tuning of compressed models with nnU-Net's trainer, distilled from the dense model."""

from tucker_ops.nnunet.training.data import TrainingSet
from tucker_ops.nnunet.training.finetune import FinetuneSummary, finetune_folder
from tucker_ops.nnunet.training.settings import FinetuneSettings

__all__ = ["FinetuneSettings", "FinetuneSummary", "TrainingSet", "finetune_folder"]
