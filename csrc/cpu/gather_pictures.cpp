// A batch of pictures on the CPU, channels of pictures over threads.

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

// Brings a channel on its way from memory: in no order that the processor knows.
void prefetch(const uint8_t* channel, int64_t size) {
  constexpr int64_t kLine = 64;
  for (int64_t p = 0; p < size; p += kLine) __builtin_prefetch(channel + p);
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
  constexpr int64_t kWorkPerByte = 4;  // a load and a store take as long as so many multiply-adds
  constexpr int64_t kAhead = 4096;     // bytes; those behind the processor sees coming
  const int64_t channels = batch.channels, pixels = batch.pixels;
  const auto channel_at = [&](int64_t item) {
    const int64_t i = item / channels;
    return bytes + ((chosen ? chosen[i] : i) * channels + item % channels) * pixels;
  };
  parallel(batch.chosen * channels, kWorkPerByte * pixels, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      if (item + 1 < end) prefetch(channel_at(item + 1), std::min(pixels, kAhead));
      look_up(channel_at(item), numbers + item % channels * kBytes, out + item * pixels, pixels);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("gather_pictures", TORCH_BOX(&gather_pictures));
}

}  // namespace fastnet
