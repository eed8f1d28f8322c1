#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Tf32, TUCKER_TYPE(StreamFormsTf32<Tf32>), TUCKER_TYPE(GatherFormsOf<Tf32, 2, 2>))

}  // namespace tucker_ops::cuda
