// A batch of pictures on the CPU, pictures over threads.

#include "../gather_pictures.h"

#include <cstring>

#include "common.h"

namespace fastnet {
namespace {

// Eight bytes at a time: one load for them, and one of the table for each.
void look_up(const uint8_t* from, const float* row, float* to, int64_t count) {
  int64_t p = 0;
  for (; p + 8 <= count; p += 8) {
    uint64_t bytes;
    std::memcpy(&bytes, from + p, sizeof bytes);
    for (int b = 0; b < 8; ++b) to[p + b] = row[bytes >> (8 * b) & 255];
  }
  for (; p < count; ++p) to[p] = row[from[p]];
}

// Brings a picture on its way from memory.
void prefetch(const uint8_t* picture, int64_t size) {
  constexpr int64_t kLine = 64;
  for (int64_t p = 0; p < size; p += kLine) __builtin_prefetch(picture + p);
}

Tensor gather_pictures(const Tensor& pictures, const std::optional<Tensor>& order,
                       const Tensor& table) {
  const PictureBatch batch = check_gather_pictures(pictures, order, table);
  const std::optional<Tensor> indices = order ? std::optional(dense(*order)) : std::nullopt;
  const auto* const chosen =
      indices ? static_cast<const int64_t*>(indices->const_data_ptr()) : nullptr;
  for (int64_t i = 0; chosen && i < batch.chosen; ++i) {
    if (chosen[i] < 0 || chosen[i] >= batch.count) {
      throw std::out_of_range(text("gather_pictures: order names picture ", chosen[i],
                                   " at position ", i, ", but there are ", batch.count));
    }
  }

  Tensor result = in_huge_pages(allocate(pictures, batch.sizes, ScalarType::Float));
  const auto* const bytes = static_cast<const uint8_t*>(pictures.const_data_ptr());
  const auto* const numbers = static_cast<const float*>(table.const_data_ptr());
  auto* const out = static_cast<float*>(result.mutable_data_ptr());
  const int64_t size = batch.channels * batch.pixels;
  constexpr int64_t kWorkPerByte = 4;
  constexpr int64_t kAhead = 4096;  // bytes; what lies behind, the processor sees coming itself
  parallel(batch.chosen, kWorkPerByte * size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* const from = bytes + (chosen ? chosen[i] : i) * size;
      if (chosen && i + 1 < end) prefetch(bytes + chosen[i + 1] * size, std::min(size, kAhead));
      for (int64_t c = 0; c < batch.channels; ++c) {
        const int64_t first = c * batch.pixels;
        look_up(from + first, numbers + c * batch.channel_stride, out + i * size + first,
                batch.pixels);
      }
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("gather_pictures", TORCH_BOX(&gather_pictures));
}

}  // namespace fastnet
