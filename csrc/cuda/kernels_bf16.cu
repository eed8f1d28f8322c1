#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Bf16, TUCKER_TYPE(StreamForms16<Bf16>), TUCKER_TYPE(GatherFormsOf<Bf16, 1, 2>))

}  // namespace tucker_ops::cuda
