// A batch of a set of pictures: rules for every device.
//
//   out[i, c, …] = table[c, pictures[order[i], c, …]]
//
// With the 256 numbers that bytes become made once, a batch is a load for each byte, and has their
// very bits, however they were made.
#pragma once

#include "common.h"

namespace fastnet {

inline constexpr int64_t kBytes = 256;  // that there are

struct PictureBatch {
  int64_t count, chosen;       // pictures there are, and of the batch
  int64_t channels, pixels;    // pixels of a channel
  int64_t channel_stride;      // in the table; 0 where one row of it serves all channels
  std::vector<int64_t> sizes;  // of the batch
};

inline PictureBatch check_gather_pictures(const Tensor& pictures,
                                          const std::optional<Tensor>& order, const Tensor& table) {
  check(
      pictures.scalar_type() == ScalarType::Byte && pictures.dim() >= 2 && pictures.is_contiguous(),
      "gather_pictures: pictures must be (n, channels, ...), uint8 and contiguous, but are ",
      ShapeOf{pictures}, " of ", pictures.scalar_type());
  check(!order || (order->scalar_type() == ScalarType::Long && order->dim() == 1),
        "gather_pictures: order must be int64, of one dimension");
  PictureBatch batch{};
  batch.count = pictures.size(0);
  batch.chosen = order ? order->size(0) : batch.count;
  batch.channels = pictures.size(1);
  check(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.is_contiguous() &&
            table.size(1) == kBytes && (table.size(0) == 1 || table.size(0) == batch.channels),
        "gather_pictures: table must be (1 or ", batch.channels, ", 256), float32 and contiguous, ",
        "but is ", ShapeOf{table}, " of ", table.scalar_type());
  batch.pixels = 1;
  for (int64_t d = 2; d < pictures.dim(); ++d) batch.pixels *= pictures.size(d);
  batch.channel_stride = table.size(0) == 1 ? 0 : kBytes;
  batch.sizes.assign(pictures.sizes().begin(), pictures.sizes().end());
  batch.sizes[0] = batch.chosen;
  return batch;
}

}  // namespace fastnet
