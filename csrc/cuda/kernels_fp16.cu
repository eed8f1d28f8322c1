#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Fp16, StreamForms16<Fp16>, 1)

}  // namespace tucker_ops::cuda
