// A training of a fully connected network, and what one thread does of it (see mlp.cpp). Stands on
// the kernels of mlp_kernels.h, and is part of that one file.
#pragma once

#include <cmath>

#include "../mlp.h"
#include "common.h"
#include "mlp_threads.h"

namespace fastnet {
namespace {

int64_t in_whole_vectors(int64_t count) {
  return divide_up(count, kWidestVector) * kWidestVector;
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Range share_of(int64_t items, int64_t thread, int64_t threads) {
  return {thread * items / threads, (thread + 1) * items / threads};
}

float* floats(const Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Calls body(pixels) with those of images, of their type.
template <class Body>
void with_pixels(const Tensor& images, const Body& body) {
  if (images.scalar_type() == ScalarType::Byte) {
    body(static_cast<const uint8_t*>(images.const_data_ptr()));
  } else {
    body(static_cast<const float*>(images.const_data_ptr()));
  }
}

struct Training {
  const Tensor& images;
  const int64_t* targets;
  const int64_t* order;
  int64_t count, batch_size;
  const float *scale, *shift;
  const std::vector<MlpLayer>& layers;
  OptimizerKind optimizer;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t first_step;

  int64_t block_rows;  // at most
  int64_t row_stride;  // those, in whole vectors
  int64_t threads;
  SpinBarrier barrier;
  // What threads pass to each other. Logits: per thread and parity of the block, since a fast
  // thread writes those of the next block while a slow one reads. Hidden units (rows, out) of all
  // layers but the last two; and per thread the parts of their gradients.
  std::vector<Floats> logits, hidden, hidden_grads;
  bool is_sparse;  // whether the first layer passes over what is 0

  double loss = 0;
  int64_t right = 0;

  // How many numbers a weight has: itself and the optimizer's.
  int numbers() const { return 1 + static_cast<int>(optimizer); }

  // Whether a batch has several blocks.
  bool is_in_blocks() const { return block_rows < batch_size; }

  OptimizerStep step(int64_t number) const {
    return corrected_step(optimizer, lr, beta1, beta2, eps, weight_decay,
                          static_cast<double>(first_step + number));
  }

  template <OptimizerKind kOptimizer>
  void run(int64_t thread, struct Workspace& space) noexcept;
};

// So that the next batch, which lies anywhere, is on its way while this one is worked on.
void prefetch(const Training& t, const int64_t* order, int64_t rows, Range columns) {
  with_pixels(t.images, [&](const auto* pixels) {
    constexpr int64_t kLine = 64 / sizeof(*pixels);
    for (int64_t row = 0; row < rows; ++row) {
      const auto* const from = pixels + order[row] * t.layers.front().in;
      for (int64_t at = columns.begin; at < columns.end; at += kLine) {
        __builtin_prefetch(from + at, 0, 2);
      }
    }
  });
}

// What one thread has of a layer: its units, that is, rows of the weight; of the last layer,
// columns of it, and all of the bias, in copies of their own. For sparse images the first layer's
// are copies, too, (in, width).
struct Part {
  Range units;
  int64_t width = 0;  // of a copy's rows, in whole vectors: few units would go one by one
  float *weight, *weight_first, *weight_second;
  float *bias = nullptr, *bias_first = nullptr, *bias_second = nullptr;
  int64_t dz_width = 0;  // of the rows of dz
  Floats dz;
  Floats copies[6];
  Floats grad, bias_grad;  // sums over the blocks of a batch; of the weight, none where one is all
  Floats base;             // for sparse images: what a layer's units are where all pixels are 0

  void take_copies() { weight = copies[0], weight_first = copies[1], weight_second = copies[2]; }
};

void copy_columns(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                  int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(from + row * from_stride, columns, to + row * to_stride);
  }
}

// All that a thread writes to, made before there are threads: one that fails in its own would leave
// the others waiting.
struct Workspace {
  std::vector<Part> parts;
  Range pixels;  // the images' columns that the thread needs
  // Of a block's images; of sparse ones the pixels that are not 0, their columns, and where each
  // image's begin. (Much of this memory is never touched.)
  Floats input;
  Numbers<int32_t> columns;
  Numbers<int64_t> begins;
  Floats activations, grads;  // of its units of the last hidden layer
  Floats dlogits;
  std::vector<const float*> from_threads;

  Workspace(const Training& training, int64_t thread);
};

// A layer's tensors, in the order of Part's copies.
std::array<const Tensor*, 6> tensors_of(const MlpLayer& layer) {
  return {&layer.weight, &layer.weight_first, &layer.weight_second,
          &layer.bias,   &layer.bias_first,   &layer.bias_second};
}

Workspace::Workspace(const Training& training, int64_t thread) {
  const std::vector<MlpLayer>& layers = training.layers;
  const int64_t L = static_cast<int64_t>(layers.size());
  const int64_t rows = training.block_rows;
  parts.resize(L);
  for (int64_t l = 0; l + 1 < L; ++l) {
    const MlpLayer& layer = layers[l];
    Part& part = parts[l];
    part.units = share_of(layer.out, thread, training.threads);
    const int64_t from = part.units.begin * layer.in;
    part.weight = floats(layer.weight) + from;
    part.weight_first = floats(layer.weight_first) + from;
    part.weight_second = floats(layer.weight_second) + from;
    if (layer.bias.numel() > 0) {
      part.bias = floats(layer.bias) + part.units.begin;
      part.bias_first = floats(layer.bias_first) + part.units.begin;
      part.bias_second = floats(layer.bias_second) + part.units.begin;
    }
    part.dz_width = part.units.size();
    part.bias_grad = Floats(part.units.size());
    if (l == 0 && training.is_sparse) {
      part.width = in_whole_vectors(part.units.size());
      const std::array<const Tensor*, 6> whole = tensors_of(layer);
      for (int i = 0; i < training.numbers(); ++i) {
        part.copies[i] = Floats(layer.in * part.width);
        FASTNET_BEST_ISA(mlp_transpose_kernel(floats(*whole[i]) + from, layer.in, part.copies[i],
                                              part.width, part.units.size(), layer.in));
      }
      part.take_copies();
      part.grad = Floats(layer.in * part.width);
      part.base = Floats(part.width);
      if (L == 2) part.dz_width = part.width;  // as wide as its units and their gradient are
    } else if (training.is_in_blocks()) {
      part.grad = Floats(part.units.size() * layer.in);
    }
    part.dz = Floats(rows * part.dz_width);
  }
  const MlpLayer& last = layers.back();
  const int64_t C = last.out;
  Part& own = parts[L - 1];
  own.units = share_of(last.in, thread, training.threads);
  // Behind hidden layers.
  own.width = L > 1 ? in_whole_vectors(own.units.size()) : own.units.size();
  const int64_t width = own.width;
  const std::array<const Tensor*, 6> whole = tensors_of(last);
  for (int i = 0; i < training.numbers(); ++i) {
    own.copies[i] = Floats(C * width);
    copy_columns(floats(*whole[i]) + own.units.begin, last.in, own.copies[i], width, C,
                 own.units.size());
    own.copies[3 + i] = Floats(C);
    if (last.bias.numel() > 0) {
      std::copy_n(floats(*whole[3 + i]), C, own.copies[3 + i].operator float*());
    }
  }
  if (training.is_in_blocks()) own.grad = Floats(C * width);
  own.bias_grad = Floats(C);
  own.take_copies();
  if (last.bias.numel() > 0) {
    own.bias = own.copies[3], own.bias_first = own.copies[4], own.bias_second = own.copies[5];
  }
  pixels = L == 1 ? own.units : Range{0, layers.front().in};
  if (training.is_sparse) {
    input = Floats::unset(rows * pixels.size());
    columns = Numbers<int32_t>::unset(rows * pixels.size());
    begins = Numbers<int64_t>(rows + 1);
  } else {
    input = Floats(rows * pixels.size());
  }
  activations = Floats(L == 1 ? 0 : rows * width);
  grads = Floats(rows * width);
  dlogits = Floats(C * training.row_stride);
  from_threads.resize(training.threads);
}

// The block's images, or what is not 0 of them.
void gather(const Training& t, const int64_t* order, int64_t rows, const Workspace& space) {
  const int64_t K = t.layers.front().in;
  with_pixels(t.images, [&](const auto* pixels) {
    if (t.is_sparse) {
      FASTNET_BEST_ISA(mlp_pick_kernel(pixels, order, t.scale, space.input, space.columns,
                                       space.begins, rows, K));
    } else {
      FASTNET_BEST_ISA(mlp_gather_kernel(pixels, order, t.scale, t.shift, space.input, rows, K,
                                         space.pixels.begin, space.pixels.end));
    }
  });
}

template <OptimizerKind kOptimizer>
void Training::run(int64_t thread, Workspace& space) noexcept {
  // Not where a gradient that is as small may be divided by itself.
  const TinyAsZero tiny_as_zero(optimizer != OptimizerKind::adam || eps > 1e-12);
  const int64_t L = static_cast<int64_t>(layers.size());
  const MlpLayer& last = layers.back();
  // Logits and their gradient are (C, rows), with vectors along the rows.
  const int64_t C = last.out, stride = row_stride;
  const std::vector<Part>& parts = space.parts;
  const Range pixels = space.pixels;
  float *const input = space.input, *const activations = space.activations;
  float *const grads = space.grads, *const dlogits = space.dlogits;
  std::vector<const float*>& from_threads = space.from_threads;
  const Part& own = parts[L - 1];
  const int64_t width = own.width;
  double loss_sum = 0;
  int64_t right_sum = 0;

  const auto find_base = [&] {
    const Part& part = parts.front();
    FASTNET_BEST_ISA(mlp_base_kernel(part.weight, shift, part.bias, part.base, layers.front().in,
                                     part.units.size(), part.width));
  };
  if (is_sparse) find_base();
  OptimizerStep now{};
  int64_t M = 0, left = 0;  // rows of a block, and those of its batch from it on
  bool is_more = false;     // whether gradients of the batch's rows before it are there
  float share = 0;
  for (int64_t done = 0, block = 0; done < count; done += M, ++block) {
    if (left == 0) {
      now = step(done / batch_size);
      left = std::min(batch_size, count - done);
      share = 1.0f / static_cast<float>(left);
      is_more = false;
    }
    M = std::min(block_rows, left);
    const bool is_last = M == left;
    gather(*this, order + done, M, space);

    // Forward
    const float* x = input;
    for (int64_t l = 0; l + 1 < L; ++l) {
      const MlpLayer& layer = layers[l];
      const Part& part = parts[l];
      const bool is_private = l + 2 == L;
      const int64_t stride = is_private ? width : layer.out;
      float* const out = is_private ? activations : hidden[l] + part.units.begin;
      const auto forward = [&](auto relu) {
        if (l == 0 && is_sparse) {
          FASTNET_BEST_ISA(mlp_sparse_forward_kernel<relu.value>(
              input, space.columns, space.begins, part.weight, part.base, out, stride, is_private,
              M, part.units.size(), part.width));
          return;
        }
        FASTNET_BEST_ISA(forward_kernel<float, relu.value>(x, part.weight, part.bias, out, layer.in,
                                                           stride, 0, M, 0, part.units.size()));
      };
      layer.relu ? forward(std::true_type{}) : forward(std::false_type{});
      if (!is_private) {
        barrier.wait();
        x = hidden[l];
      }
    }
    const float* const h = L == 1 ? input : activations;
    FASTNET_BEST_ISA(forward_kernel<float, false>(
        own.weight, h, nullptr, logits[2 * thread + block % 2], width, stride, 0, C, 0, M));
    barrier.wait();
    for (int64_t p = 0; p < threads; ++p) from_threads[p] = logits[2 * p + block % 2];
    // Every thread computes the same of all rows: less work than to pass it on.
    loss_sum +=
        FASTNET_BEST_ISA(mlp_loss_kernel(from_threads.data(), threads, own.copies[3], targets,
                                         order + done, dlogits, &right_sum, M, C, stride, share));

    const int64_t next = done + M;
    prefetch(*this, order + next, std::min(block_rows, count - next), pixels);

    // Backward. A weight is read for the gradient of its layer's input before it is updated.
    if (L > 1) {
      FASTNET_BEST_ISA(
          product_kernel<float>(dlogits, 1, stride, own.weight, grads, C, width, 0, M, 0, width));
    }
    const auto update_bias = [&](const Part& part, int64_t N) {
      if (part.bias) {
        FASTNET_BEST_ISA(mlp_update_bias_kernel<kOptimizer>(
            part.bias_grad, part.bias, part.bias_first, part.bias_second, N, now));
      }
    };
    // A layer's gradient, and with a batch's last rows, its step.
    const auto apply = [&](const Part& part, const float* dz, int64_t m_stride, int64_t n_stride,
                           const float* x, int64_t N, int64_t K) {
      if (part.bias) {
        FASTNET_BEST_ISA(mlp_sum_kernel(dz, m_stride, n_stride, part.bias_grad, M, N, is_more));
      }
      if (!is_last) {
        FASTNET_BEST_ISA(
            product_kernel<float>(dz, n_stride, m_stride, x, part.grad, M, K, 0, N, 0, K, is_more));
        return;
      }
      FASTNET_BEST_ISA(mlp_update_kernel<kOptimizer>(
          dz, m_stride, n_stride, x, is_more ? part.grad.operator float*() : nullptr, part.weight,
          part.weight_first, part.weight_second, M, N, K, now));
      update_bias(part, N);
    };
    apply(own, dlogits, 1, stride, h, C, width);
    if (now.eps == 0 && is_last) {  // Adam has divided by zero behind the last unit
      for (int64_t c = 0; c < C; ++c) {
        std::fill(own.weight + c * width + own.units.size(), own.weight + (c + 1) * width, 0.0f);
      }
    }
    for (int64_t l = L - 2; l >= 0; --l) {
      const MlpLayer& layer = layers[l];
      const Part& part = parts[l];
      const int64_t units = part.units.size();
      const bool is_private = l + 2 == L;
      if (is_private) {
        from_threads[0] = grads;
      } else {
        for (int64_t p = 0; p < threads; ++p) {
          from_threads[p] = hidden_grads[l * threads + p] + part.units.begin;
        }
      }
      const auto mask = [&](auto relu) {
        FASTNET_BEST_ISA(mlp_mask_kernel<relu.value>(
            from_threads.data(), is_private ? 1 : threads, is_private ? width : layer.out,
            is_private ? activations : hidden[l] + part.units.begin, is_private ? width : layer.out,
            part.dz, M, part.dz_width));
      };
      layer.relu ? mask(std::true_type{}) : mask(std::false_type{});
      if (l > 0) {
        FASTNET_BEST_ISA(product_kernel<float>(part.dz, part.dz_width, 1, part.weight,
                                               hidden_grads[(l - 1) * threads + thread], units,
                                               layer.in, 0, M, 0, layer.in));
      }
      if (l == 0 && is_sparse) {
        FASTNET_BEST_ISA(
            mlp_sum_kernel(part.dz, part.dz_width, 1, part.bias_grad, M, units, is_more));
        FASTNET_BEST_ISA(mlp_sparse_grad_kernel(input, space.columns, space.begins, part.dz,
                                                part.dz_width, part.grad, M, units, part.width));
        if (is_last) {
          FASTNET_BEST_ISA(mlp_sparse_update_kernel<kOptimizer>(
              part.grad, shift, part.bias_grad, part.weight, part.weight_first, part.weight_second,
              layer.in, part.width, now));
          update_bias(part, units);
          find_base();
        }
      } else {
        const float* const below = l > 0 ? hidden[l - 1] : input;
        apply(part, part.dz, part.dz_width, 1, below, units, layer.in);
      }
      // Also so that nobody writes the next block's units while somebody still reads these.
      if (l > 0) barrier.wait();
    }
    left -= M;
    is_more = true;
  }

  const std::array<const Tensor*, 6> whole = tensors_of(last);
  if (is_sparse) {
    const Part& part = parts[0];
    const MlpLayer& layer = layers.front();
    const std::array<const Tensor*, 6> first = tensors_of(layer);
    for (int i = 0; i < numbers(); ++i) {
      FASTNET_BEST_ISA(mlp_transpose_kernel(part.copies[i], part.width,
                                            floats(*first[i]) + part.units.begin * layer.in,
                                            layer.in, layer.in, part.units.size()));
    }
  }
  for (int i = 0; i < numbers(); ++i) {
    copy_columns(own.copies[i], width, floats(*whole[i]) + own.units.begin, last.in, C,
                 own.units.size());
    if (thread == 0 && last.bias.numel() > 0) {
      std::copy_n(own.copies[3 + i].operator float*(), C, floats(*whole[3 + i]));
    }
  }
  if (thread == 0) {
    loss = loss_sum;
    right = right_sum;
  }
}

}  // namespace
}  // namespace fastnet
