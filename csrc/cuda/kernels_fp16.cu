#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Fp16, TUCKER_TYPE(StreamForms16<Fp16>), TUCKER_TYPE(GatherFormsOf<Fp16, 1, 2>))

}  // namespace tucker_ops::cuda
