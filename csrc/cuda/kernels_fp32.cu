#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Fp32, StreamForms32<Fp32>, 2)

}  // namespace tucker_ops::cuda
