#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Fp32, TUCKER_TYPE(StreamFormsFp32<Fp32>), TUCKER_TYPE(GatherFormsOf<Fp32, 2, 1>))

}  // namespace tucker_ops::cuda
