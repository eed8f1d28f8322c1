"""Tucker-2 decomposition of convolution kernels, and the choice of ranks. Knows tensors, not modules."""

from tucker_ops.decompose.factors import TuckerFactors, decompose
from tucker_ops.decompose.spectrum import Spectrum, spectrum

__all__ = ["Spectrum", "TuckerFactors", "decompose", "spectrum"]
