// A batch of pictures on CUDA: a thread for a byte of a picture, and for the same one of others.

#include "../gather_pictures.h"

#include "common.cuh"

namespace fastnet {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostRows = 1024;  // of a grid; each goes on to the pictures behind

__global__ void __launch_bounds__(kThreads)
    gather_pictures_kernel(const uint8_t* __restrict__ pictures, const int64_t* __restrict__ order,
                           const float* __restrict__ table, float* __restrict__ out, int64_t count,
                           int64_t chosen, int64_t pixels, int64_t size) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= size) return;
  const float* const row = table + p / pixels * kBytes;
  for (int64_t i = blockIdx.y; i < chosen; i += gridDim.y) {
    const int64_t picture = order ? order[i] : i;
    device_assert(picture >= 0 && picture < count, "gather_pictures: order names no picture");
    out[i * size + p] = row[pictures[picture * size + p]];
  }
}

Tensor gather_pictures(const Tensor& pictures, const std::optional<Tensor>& order,
                       const Tensor& table) {
  const PictureBatch batch = check_gather_pictures(pictures, order, table);
  const OnDeviceOf on_device(pictures);
  const Tensor result = allocate(pictures, batch.sizes, ScalarType::Float);
  if (result.numel() == 0) return result;
  const std::optional<Tensor> indices = order ? std::optional(dense(*order)) : std::nullopt;
  const int64_t size = batch.channels * batch.pixels;
  const unsigned rows = static_cast<unsigned>(std::min(batch.chosen, kMostRows));
  launch(gather_pictures_kernel, dim3(blocks_for(size, kThreads), rows), dim3(kThreads), 0,
         on_device.stream(), static_cast<const uint8_t*>(pictures.const_data_ptr()),
         indices ? static_cast<const int64_t*>(indices->const_data_ptr()) : nullptr,
         data<float>(table), mutable_data<float>(result), batch.count, batch.chosen, batch.pixels,
         size);
  return result;
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("gather_pictures", TORCH_BOX(&gather_pictures));
}

}  // namespace fastnet
