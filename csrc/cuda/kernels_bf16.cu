#include "kernels_of.h"

namespace tucker_ops::cuda {

TUCKER_KERNELS_OF(Bf16, StreamForms16<Bf16>, 1)

}  // namespace tucker_ops::cuda
