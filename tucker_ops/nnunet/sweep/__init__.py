"""Several budgets of one model side by side: what each loses and saves."""

from tucker_ops.nnunet.sweep.run import Sweep, sweep_folder

__all__ = ["Sweep", "sweep_folder"]
