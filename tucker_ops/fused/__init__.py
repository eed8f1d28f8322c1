"""Inference with norm, activation, upsampling and `cat` folded into the convolutions.

Between two blocks only raw values exist, with their norm and activation still to be applied ("pending"): the block
that reads them applies both while it loads. One that writes values also returns their mean and M2, from which the
next norm follows. A transposed convolution whose kernel equals its stride is multiplied into the first stage of the
convolution that reads it, so neither its output nor the concatenation with the skip is ever in memory.
"""

from tucker_ops.fused.executor import Explanation, FusedForward, explain, fuse

__all__ = ["Explanation", "FusedForward", "explain", "fuse"]
