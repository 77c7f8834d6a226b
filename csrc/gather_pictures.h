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
  int64_t channels, pixels;    // that have a row of the table each, and pixels of each
  std::vector<int64_t> sizes;  // of the batch
};

inline PictureBatch check_gather_pictures(const Tensor& pictures,
                                          const std::optional<Tensor>& order, const Tensor& table) {
  check(pictures.scalar_type() == ScalarType::Byte && pictures.dim() >= 2,
        "gather_pictures: pictures must be (n, channels, ...) of uint8, but are ",
        ShapeOf{pictures}, " of ", pictures.scalar_type());
  check(pictures.is_contiguous(), "gather_pictures: pictures must be contiguous");
  if (order) {
    check(order->scalar_type() == ScalarType::Long && order->dim() == 1,
          "gather_pictures: order must be of one dimension and int64, but is ", ShapeOf{*order},
          " of ", order->scalar_type());
    check(order->device() == pictures.device(),
          "gather_pictures: order and pictures are on different devices");
  }
  PictureBatch batch{};
  batch.count = pictures.size(0);
  batch.chosen = order ? order->size(0) : batch.count;
  batch.channels = pictures.size(1);
  check(table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(1) == kBytes &&
            (table.size(0) == 1 || table.size(0) == batch.channels),
        "gather_pictures: table must be (1 or ", batch.channels, ", 256) of float32, but is ",
        ShapeOf{table}, " of ", table.scalar_type());
  check(table.is_contiguous(), "gather_pictures: table must be contiguous");
  check(table.device() == pictures.device(),
        "gather_pictures: table and pictures are on different devices");
  batch.pixels = 1;
  for (int64_t d = 2; d < pictures.dim(); ++d) batch.pixels *= pictures.size(d);
  if (table.size(0) == 1) batch.pixels *= std::exchange(batch.channels, 1);
  batch.sizes.assign(pictures.sizes().begin(), pictures.sizes().end());
  batch.sizes[0] = batch.chosen;
  return batch;
}

}  // namespace fastnet
