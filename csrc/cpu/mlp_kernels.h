// The loops of native training, compiled once per instruction set by foreach_isa.h, beside the
// products of linear_relu. Everything is float32, row-major and dense.

#include "linear_relu_kernels.h"
#include "optimizer_kernels.h"

// ---------------------------------------------------------------------------------------------
// A batch: out (rows, k_end - k_begin) = images[order[row]] (K) · scale + shift

FASTNET_INLINE Vec<float> load_pixels(const uint8_t* from) {
  return __builtin_convertvector(load_bytes(from), Vec<float>);
}
FASTNET_INLINE Vec<float> load_pixels(const float* from) {
  return load(from);
}

template <class Pixel>
void mlp_gather_kernel(const Pixel* images, const int64_t* order, const float* scale,
                       const float* shift, float* out, int64_t rows, int64_t K, int64_t k_begin,
                       int64_t k_end) {
  constexpr int kStep = kLanes<float>;
  const int64_t width = k_end - k_begin;
  scale += k_begin;
  shift += k_begin;
  for (int64_t row = 0; row < rows; ++row) {
    const Pixel* const from = images + order[row] * K + k_begin;
    float* const to = out + row * width;
    int64_t k = 0;
    for (; k + kStep <= width; k += kStep) {
      store(to + k, load_pixels(from + k) * load(scale + k) + load(shift + k));
    }
    for (; k < width; ++k) to[k] = static_cast<float>(from[k]) * scale[k] + shift[k];
  }
}

// ---------------------------------------------------------------------------------------------
// Softmax and cross-entropy, with vectors along the rows of the batch: logits (C, rows) = bias +
// Σ_p parts[p]; grad (C, rows) is (softmax - one-hot) · share. Returns the sum of the losses, and
// adds to *right how many targets have the largest logit, the first of its value.
//
// Rows of parts and grad are `stride` wide, a multiple of the vector.

double mlp_loss_kernel(const float* const* parts, int64_t part_count, const float* bias,
                       const int64_t* targets, const int64_t* order, float* grad, int64_t* right,
                       int64_t rows, int64_t C, int64_t stride, float share) {
  constexpr int kStep = kLanes<float>;
  double loss = 0;
  for (int64_t row = 0; row < rows; row += kStep) {
    const int64_t count = rows - row < kStep ? rows - row : kStep;
    Vec<float> most = splat(static_cast<float>(-__builtin_huge_valf()));
    Vec<float> first_most = {};
    for (int64_t c = 0; c < C; ++c) {
      Vec<float> z = splat(bias[c]);
      for (int64_t p = 0; p < part_count; ++p) z += load(parts[p] + c * stride + row);
      store(grad + c * stride + row, z);
      first_most = z > most ? splat(static_cast<float>(c)) : first_most;
      most = maximum<float>(most, z);
    }
    float target_logits[kStep];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t target = targets[order[row + i]];
      target_logits[i] = grad[target * stride + row + i];
      *right += first_most[i] == static_cast<float>(target);
    }
    Vec<float> total = {};
    for (int64_t c = 0; c < C; ++c) {
      const Vec<float> e = exp(load(grad + c * stride + row) - most);
      store(grad + c * stride + row, e);
      total += e;
    }
    const Vec<float> factor = splat(share) / total, log_sum_exp = most + log(total);
    for (int64_t c = 0; c < C; ++c) {
      store(grad + c * stride + row, load(grad + c * stride + row) * factor);
    }
    for (int64_t i = 0; i < count; ++i) {
      grad[targets[order[row + i]] * stride + row + i] -= share;
      loss += log_sum_exp[i] - target_logits[i];
    }
  }
  return loss;
}

// ---------------------------------------------------------------------------------------------
// dz (rows, width) = Σ_p parts[p] where h > 0, or everywhere. Rows of the parts are `part_stride`
// wide, those of h `h_stride`.

template <bool kRelu>
void mlp_mask_kernel(const float* const* parts, int64_t part_count, int64_t part_stride,
                     const float* h, int64_t h_stride, float* dz, int64_t rows, int64_t width) {
  constexpr int kStep = kLanes<float>;
  const Vec<float> zero = {};
  for (int64_t row = 0; row < rows; ++row) {
    int64_t k = 0;
    for (; k + kStep <= width; k += kStep) {
      Vec<float> sum = load(parts[0] + row * part_stride + k);
      for (int64_t p = 1; p < part_count; ++p) sum += load(parts[p] + row * part_stride + k);
      if constexpr (kRelu) sum = load(h + row * h_stride + k) <= zero ? zero : sum;
      store(dz + row * width + k, sum);
    }
    for (; k < width; ++k) {
      float sum = parts[0][row * part_stride + k];
      for (int64_t p = 1; p < part_count; ++p) sum += parts[p][row * part_stride + k];
      if constexpr (kRelu) sum = h[row * h_stride + k] <= 0 ? 0 : sum;
      dz[row * width + k] = sum;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The gradient of a weight, applied where it is computed: of w (N, K), for all K and N,
//   grad[n, k] = before[n, k] + Σ_m dz[m, n] · x[m, k],  m in [0, M)
// `before` is of other rows of the batch, or null. dz[m, n] lies at m · m_stride + n · n_stride.
// Vectors lie along K; dz's elements are broadcast.

template <OptimizerKind kOptimizer, int kRows, int kVectors>
FASTNET_INLINE void mlp_update_tile(const float* dz, int64_t m_stride, int64_t n_stride,
                                    const float* x, const float* before, float* w, float* first,
                                    float* second, int64_t M, int64_t K, int64_t skip,
                                    const OptimizerStep& step) {
  constexpr int kStep = kLanes<float>;
  Vec<float> sum[kRows][kVectors];
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = before ? load(before + r * K + v * kStep) : Vec<float>{};
    }
  }
  for (int64_t m = 0; m < M; ++m) {
    Vec<float> row[kVectors];
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = load(x + m * K + v * kStep);
    FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<float> factor = splat(dz[m * m_stride + r * n_stride]);
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      const int64_t at = r * K + v * kStep;
      update<kOptimizer>(w + at, first + at, second + at, sum[r][v], step, v == 0 ? skip : 0);
    }
  }
}

template <OptimizerKind kOptimizer, int kRows, int kVectors>
static void mlp_update_rows(const float* dz, int64_t m_stride, int64_t n_stride, const float* x,
                            const float* before, float* w, float* first, float* second, int64_t M,
                            int64_t K, int64_t rows, int64_t skip, const OptimizerStep& step) {
  if (rows == kRows) {
    mlp_update_tile<kOptimizer, kRows, kVectors>(dz, m_stride, n_stride, x, before, w, first,
                                                 second, M, K, skip, step);
  } else if constexpr (kRows > 1) {
    mlp_update_rows<kOptimizer, kRows - 1, kVectors>(dz, m_stride, n_stride, x, before, w, first,
                                                     second, M, K, rows, skip, step);
  }
}

template <OptimizerKind kOptimizer>
void mlp_update_kernel(const float* dz, int64_t m_stride, int64_t n_stride, const float* x,
                       const float* before, float* w, float* first, float* second, int64_t M,
                       int64_t N, int64_t K, const OptimizerStep& step) {
  constexpr int kStep = kLanes<float>;
  constexpr int kWide = kStep * kProductVectors;
  if (K < kStep) {
    for (int64_t n = 0; n < N; ++n) {
      Vec<float> sum = {};
      for (int64_t k = 0; k < K && before; ++k) sum[k] = before[n * K + k];
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t k = 0; k < K; ++k) sum[k] += dz[m * m_stride + n * n_stride] * x[m * K + k];
      }
      update<kOptimizer>(w + n * K, first + n * K, second + n * K, sum, step, 0, K);
    }
    return;
  }
  // Rows in tiles of equal height: a low one at the end would wait for its additions.
  const int64_t tiles = (N + kProductRows - 1) / kProductRows;
  const auto tile_at = [&](auto vectors, int64_t tile, int64_t k, int64_t skip) {
    const int64_t n = tile * N / tiles, rows = (tile + 1) * N / tiles - n;
    mlp_update_rows<kOptimizer, kProductRows, decltype(vectors)::value>(
        dz + n * n_stride, m_stride, n_stride, x + k, before ? before + n * K + k : nullptr,
        w + n * K + k, first + n * K + k, second + n * K + k, M, K, rows, skip, step);
  };
  const auto columns = [&](int64_t tile, int64_t tile_end) {
    const auto tiles_at = [&](auto vectors, int64_t k, int64_t skip) {
      for (int64_t t = tile; t < tile_end; ++t) tile_at(vectors, t, k, skip);
    };
    int64_t k = 0;
    for (; k + kWide <= K; k += kWide)
      tiles_at(std::integral_constant<int, kProductVectors>{}, k, 0);
    // What is left reaches back over columns already done, and skips them.
    for (; k < K; k += kStep) {
      const int64_t from = k + kStep <= K ? k : K - kStep;
      tiles_at(std::integral_constant<int, 1>{}, from, k - from);
    }
  };
  // Where weight and state stay in the second-level cache, all rows of a few columns, whose x stays
  // in the first; otherwise all columns of a few rows, as they lie in memory.
  constexpr int64_t kCached = 32 * 1024;  // elements
  if (N * K <= kCached) {
    columns(0, tiles);
  } else {
    for (int64_t tile = 0; tile < tiles; ++tile) columns(tile, tile + 1);
  }
}

// sums (N) = Σ_m dz[m, n]; with `is_more`, added to what is there.
void mlp_sum_kernel(const float* dz, int64_t m_stride, int64_t n_stride, float* sums, int64_t M,
                    int64_t N, bool is_more) {
  constexpr int kStep = kLanes<float>;
  for (int64_t n = 0; n < N; n += kStep) {
    const int64_t count = N - n < kStep ? N - n : kStep;
    if (count == kStep && n_stride == 1) {
      Vec<float> sum = is_more ? load(sums + n) : Vec<float>{};
      for (int64_t m = 0; m < M; ++m) sum += load(dz + m * m_stride + n);
      store(sums + n, sum);
      continue;
    }
    for (int64_t i = n; i < n + count; ++i) {
      float sum = is_more ? sums[i] : 0;
      int64_t m = 0;
      if (m_stride == 1) {
        Vec<float> some = {};
        for (; m + kStep <= M; m += kStep) some += load(dz + m + i * n_stride);
        sum += reduce_add<float>(some);
      }
      for (; m < M; ++m) sum += dz[m * m_stride + i * n_stride];
      sums[i] = sum;
    }
  }
}

// A bias (N), by its gradient.
template <OptimizerKind kOptimizer>
void mlp_update_bias_kernel(const float* grad, float* bias, float* first, float* second, int64_t N,
                            const OptimizerStep& step) {
  constexpr int kStep = kLanes<float>;
  for (int64_t n = 0; n < N; n += kStep) {
    update<kOptimizer>(bias + n, first + n, second + n, load(grad + n), step, 0,
                       N - n < kStep ? N - n : kStep);
  }
}

#include "mlp_sparse_kernels.h"
