"""The benchmark on an NVIDIA GPU: ceilings of the card, then op, block and network against cuDNN and torch.compile.

`python -m bench.gpu` runs it; `make gpu` builds and tests before. It needs torch and nothing of nnU-Net's.
"""
