"""The command line: ``tucker-ops compress | finetune | sweep | predict | evaluate | report | explain | ...``.

Heavy imports live inside the commands, so that ``tucker-ops --help`` answers at once.
"""

from tucker_ops.cli.app import app, main

__all__ = ["app", "main"]
