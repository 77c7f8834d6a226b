// The emulated ops, as torch.ops.fastnet_emulated: the CUDA kernels on CPU tensors, for tests only.

#include "../schemas.h"

STABLE_TORCH_LIBRARY(fastnet_emulated, library) {
  fastnet::define_schemas(library);
}
