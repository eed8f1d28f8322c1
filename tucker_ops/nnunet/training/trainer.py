"""nnU-Net's trainer, started from a compressed network's weights and taught by the dense one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tucker_ops.nnunet.checkpoint import serialise
from tucker_ops.nnunet.folder import Fold, ModelFolder
from tucker_ops.nnunet.output import write_file
from tucker_ops.nnunet.training.distillation import distillation_loss, encoder_features, feature_loss
from tucker_ops.nnunet.training.settings import FinetuneSettings

LATEST = "checkpoint_latest.pth"
# Mirroring as nnU-Net chooses it, where a checkpoint does not say.
KEEP = "keep"


class FinetuneTrainer(nnUNetTrainer):
    """Loss, sampling, augmentation, deep supervision, mixed precision and DDP are nnU-Net's.

    Differs in: all weights are transferred, heads included; AdamW with a schedule per step; distillation; the CPU may
    run bf16 and DDP on gloo; what is monitored is drawn from the training cases, so that those of the fold's validation
    are never opened; checkpoints are written whole or not at all, and name the trainer of the model's source, so
    that stock nnU-Net loads them.
    """

    @classmethod
    def of(
        cls,
        model: ModelFolder,
        fold: Fold,
        weights: dict[str, Tensor],
        teacher: nn.Module | None,
        settings: FinetuneSettings,
        *,
        preprocessed: Path,
        cases: Sequence[str],
        output: Path,
        device: torch.device,
        precision: str,
        mirror_axes: Sequence[int] | str | None = KEEP,
        progress: Callable[[int], None] | None = None,
    ) -> FinetuneTrainer:
        """A trainer for one fold; nnU-Net's own arguments (the signature is looked at) come from `model`.

        `mirror_axes` are those that the model was trained with; None for none.
        """
        plans = {**model.plans, "continue_training": False}
        # Both are read by the constructor, which makes a folder of its own naming unless it is told where.
        folders = {"nnUNet_results": str(output), "nnUNet_preprocessed": str(preprocessed.parent)}
        with mock.patch.dict(os.environ, folders):
            trainer = cls(plans, model.configuration, fold, dict(model.dataset_json), torch.device("cpu"))
        trainer.model, trainer.weights, trainer.settings = model, weights, settings
        trainer.cases, trainer.bf16, trainer.progress = list(cases), precision == "bf16", progress
        trainer.mirror_axes = mirror_axes
        # nnU-Net's constructor takes every distributed process to have a GPU.
        trainer.device, trainer.grad_scaler = device, None
        if device.type == "cuda":
            trainer.device = torch.device("cuda", trainer.local_rank if trainer.is_ddp else device.index or 0)
            trainer.grad_scaler = torch.amp.GradScaler("cuda")
        if settings.patch_size is not None:
            trainer.configuration_manager.configuration["patch_size"] = list(settings.patch_size)
        trainer.my_init_kwargs = {
            "plans": dict(model.plans),
            "configuration": model.configuration,
            "fold": fold,
            "dataset_json": dict(model.dataset_json),
        }
        trainer.output_folder_base = trainer.output_folder = str(output)
        trainer.preprocessed_dataset_folder_base = str(preprocessed)
        trainer.preprocessed_dataset_folder = str(
            preprocessed / trainer.configuration_manager.data_identifier
        )
        trainer.num_epochs = settings.epochs
        trainer.num_iterations_per_epoch = settings.steps_per_epoch
        trainer.num_val_iterations_per_epoch = 1
        trainer.save_every = 1
        trainer.step = 0
        trainer.teacher = None if teacher is None else teacher.to(trainer.device).eval().requires_grad_(False)
        return trainer

    def initialize(self):
        """As nnU-Net's, with the weights in place before DDP wraps them, and DDP on any device."""
        if self.settings.batch_size is not None:
            self.configuration_manager.configuration["batch_size"] = self.settings.batch_size
        self._set_batch_size_and_oversample()
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        network.load_state_dict(self.weights)
        self.network = network.to(device=self.device, memory_format=self._layout())
        if self._do_i_compile():
            self.network = torch.compile(self.network)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        if self.is_ddp:
            index = [self.device.index] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network, device_ids=index)
        self.loss = self._build_loss()
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        self.was_initialized = True

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            self.settings.learning_rate_at(0),
            weight_decay=self.settings.weight_decay,
        )
        return optimizer, _SetInStep()

    def _do_i_compile(self):
        """Not with features, which are read by hooks that a compiled network need not run."""
        return not self.settings.features and super()._do_i_compile()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """As nnU-Net's, but mirrored only along axes that the model was trained for: it may tell left from right."""
        rotation, dummy_2d, patch, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.mirror_axes != KEEP:
            axes = tuple(self.mirror_axes or ())
            self.inference_allowed_mirroring_axes = axes or None
        return rotation, dummy_2d, patch, axes

    def do_split(self):
        return list(self.cases), list(self.cases)

    def plot_network_architecture(self):
        """Needs packages that are rarely there, and nobody asked."""

    def on_epoch_end(self):
        self._best_ema = float("inf")  # no checkpoint_best: which step ends is settled beforehand
        super().on_epoch_end()

    def train_step(self, batch: dict) -> dict:
        if self.step >= self.settings.steps:
            return {"loss": torch.zeros(()).numpy()}
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.step)
        data = batch["data"].to(self.device, non_blocking=True, memory_format=self._layout())
        target = batch["target"]
        several = isinstance(target, list)
        target = [t.to(self.device, non_blocking=True) for t in target] if several else target.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._objective(data, target)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
        else:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        self.step += 1
        if self.progress is not None:
            self.progress(self.step)
        return {"loss": loss.detach().float().cpu().numpy()}

    def _layout(self) -> torch.memory_format:
        """oneDNN's backward pass takes three quarters of the time in channels-last; GPUs keep nnU-Net's layout."""
        if self.device.type != "cpu":
            return torch.contiguous_format
        ndim = len(self.configuration_manager.patch_size)
        return torch.channels_last_3d if ndim == 3 else torch.channels_last

    def _autocast(self):
        if self.device.type == "cuda":
            return torch.autocast("cuda")
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def _objective(self, data: Tensor, target: Any) -> Tensor:
        settings = self.settings
        with contextlib.ExitStack() as stack:
            ours = theirs = None
            if self.teacher is not None and settings.features:
                ours = stack.enter_context(encoder_features(self._bare()))
                theirs = stack.enter_context(encoder_features(self.teacher))
            # The dense network first, without gradients, so that its activations are gone when ours are made.
            with torch.no_grad():
                taught = None if self.teacher is None else self.teacher(data)
            output = self.network(data)
        loss = settings.supervise * self.loss(output, target)
        if taught is not None and settings.distill:
            finest = output[0] if isinstance(output, list | tuple) else output
            regions = self.label_manager.has_regions
            loss = loss + settings.distill * distillation_loss(
                finest, taught, temperature=settings.temperature, regions=regions
            )
        if ours is not None:
            loss = loss + settings.features * feature_loss(ours, theirs)
        return loss

    def _bare(self) -> nn.Module:
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        checkpoint = {
            "network_weights": self._bare().state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": self.model.trainer_name,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "step": self.step,
            "settings": self.settings.to_dict(),
        }
        write_file(filename, serialise(checkpoint), force=True)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continue after the epoch that `checkpoint` closed."""
        if not self.was_initialized:
            self.initialize()
        self._bare().load_state_dict(checkpoint["network_weights"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        if self.grad_scaler is not None and checkpoint["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(checkpoint["grad_scaler_state"])
        self.logger.load_checkpoint(checkpoint["logging"])
        self.current_epoch, self.step = checkpoint["current_epoch"], checkpoint["step"]


class _SetInStep:
    """nnU-Net asks its scheduler once an epoch; ours is a function of the step."""

    def step(self, epoch: int) -> None:
        pass
