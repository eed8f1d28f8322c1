"""Tucker decomposition of convolution kernels, and the choice of ranks. Knows tensors, not modules."""

from tucker_ops.decompose.factors import TuckerFactors, decompose
from tucker_ops.decompose.spectrum import Spectrum, spectrum
from tucker_ops.decompose.weighting import Weighting

__all__ = ["Spectrum", "TuckerFactors", "Weighting", "decompose", "spectrum"]
