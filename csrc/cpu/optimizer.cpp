// A step of an optimizer on the CPU, of all tensors at once, elements over threads.

#include "../optimizer.h"

#include "common.h"
#include "ops.h"

#define FASTNET_KERNELS "optimizer_kernels.h"
#include "foreach_isa.h"

namespace fastnet {
namespace {

void apply(const OptimizedTensor& tensor, int64_t begin, int64_t end) {
  switch (tensor.kind) {
    case OptimizerKind::sgd:
      return FASTNET_BEST_ISA(apply_optimizer_kernel<OptimizerKind::sgd>(tensor, begin, end));
    case OptimizerKind::momentum:
      return FASTNET_BEST_ISA(apply_optimizer_kernel<OptimizerKind::momentum>(tensor, begin, end));
    case OptimizerKind::adam:
      return FASTNET_BEST_ISA(apply_optimizer_kernel<OptimizerKind::adam>(tensor, begin, end));
  }
}

// An element takes about as long as so many multiply-adds: Adam's has a root and a division.
int64_t work_of(OptimizerKind kind) {
  return kind == OptimizerKind::adam ? 16 : 6;
}

}  // namespace

void cpu::apply_optimizer(const std::vector<OptimizedTensor>& tensors) {
  int64_t elements = 0, work = 1;
  for (const OptimizedTensor& tensor : tensors) {
    elements += tensor.count;
    work = std::max(work, work_of(tensor.kind));
  }
  parallel(elements, work, [&](int64_t begin, int64_t end) {
    for (const OptimizedTensor& tensor : tensors) {  // begin and end count from where it begins
      if (begin < tensor.count && end > 0) {
        apply(tensor, std::max<int64_t>(0, begin), std::min(end, tensor.count));
      }
      begin -= tensor.count;
      end -= tensor.count;
    }
  });
}

}  // namespace fastnet
