// The memory of the last large gradient on the CPU, for the next one of that layout.
//
// Given back to the system and fetched anew at every step, a few hundred megabytes cost several
// times what the kernel does: page faults, and on a virtual machine the host's as well.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <memory>
#include <mutex>

#include "op.h"

namespace fastnet::autograd {

class KeptMemory {
 public:
  static constexpr size_t kLeastBytes = 2 << 20;  // a huge page

  // Memory for a tensor like this one, if there is any: an undefined tensor otherwise.
  Tensor take(const Tensor& like) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool fits = kept_.defined() && kept_.scalar_type() == like.scalar_type() &&
                      kept_.sizes() == like.sizes() && kept_.strides() == like.strides();
    return fits ? std::move(kept_) : Tensor();
  }

  // A tensor in this memory, which comes back here when nobody holds that tensor any more, nor a
  // view of it, nor its storage.
  Tensor lend(const Tensor& memory) {
    at::DataPtr lent(memory.mutable_data_ptr(), new Tensor(memory), &give_back, memory.device());
    auto storage =
        c10::make_intrusive<at::StorageImpl>(at::StorageImpl::use_byte_size_t(), memory.nbytes(),
                                             std::move(lent), c10::GetCPUAllocator(),
                                             /*resizable=*/true);
    Tensor tensor = at::detail::make_tensor<at::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), memory.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(memory.sizes(), memory.strides());
    return tensor;
  }

  // Gives it back to the system.
  void release() { keep(Tensor()); }

 private:
  static void give_back(void* context);

  void keep(Tensor memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(kept_, memory);
  }

  std::mutex mutex_;
  Tensor kept_;
};

// For as long as the process lives: tensors may outlive everything else.
inline KeptMemory& kept_memory() {
  static auto* const memory = new KeptMemory();
  return *memory;
}

inline void KeptMemory::give_back(void* context) {
  const std::unique_ptr<Tensor> memory(static_cast<Tensor*>(context));
  kept_memory().keep(*memory);
}

}  // namespace fastnet::autograd
