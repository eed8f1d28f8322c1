#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Tf32, StreamForms32<Tf32>, 2)

}  // namespace tucker_ops::cuda
