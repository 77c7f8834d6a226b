// The loops of native training, compiled once per instruction set by foreach_isa.h, beside the
// products of linear_relu. Everything is float32, row-major and dense.

#include "linear_relu_kernels.h"

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// ---------------------------------------------------------------------------------------------
// A batch: out (rows, k_end - k_begin) = images[order[row]] (K) · scale + shift

FASTNET_INLINE Vec<float> load_pixels(const uint8_t* from) {
  using Bytes = typename VectorType<uint8_t, kLanes<float>>::unaligned;
  return __builtin_convertvector(
      __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Vec<int32_t>), Vec<float>);
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
// Softmax and cross-entropy: of each row, logits (C) = bias + Σ_p parts[p]; the gradient of the
// mean loss, (softmax - one-hot) / rows, and for the statistics the largest logit, the sum of
// exp(logit - largest) and whether the target had the largest logit, the first of its value.
//
// Rows of grad are `stride` wide, a multiple of the vector; the parts may be read so far, too.

void mlp_loss_kernel(const float* const* parts, int64_t part_count, const float* bias,
                     const int64_t* targets, const int64_t* order, float* grad, float* losses,
                     int64_t* right, int64_t rows, int64_t C, int64_t stride) {
  constexpr int kStep = kLanes<float>;
  const float lowest = -__builtin_huge_valf(), share = 1.0f / static_cast<float>(rows);
  for (int64_t row = 0; row < rows; ++row) {
    float* const z = grad + row * stride;
    Vec<float> largest = splat(lowest);
    for (int64_t c = 0; c < C; c += kStep) {
      Vec<float> sum = load(bias + c);
      for (int64_t p = 0; p < part_count; ++p) sum += load(parts[p] + row * C + c);
      const auto is_class = lane_index<float>() < splat(static_cast<float>(C - c));
      sum = is_class ? sum : splat(lowest);
      store(z + c, sum);
      largest = maximum<float>(largest, sum);
    }
    const float most = reduce_max<float>(largest);
    const int64_t target = targets[order[row]];
    const float target_logit = z[target];
    int64_t first = 0;
    while (first < target && z[first] != most) ++first;
    *right += first == target && target_logit == most;
    Vec<float> sum = Vec<float>{};
    for (int64_t c = 0; c < C; c += kStep) {
      const Vec<float> e = exp(load(z + c) - splat(most));
      store(z + c, e);
      sum += e;
    }
    const float total = reduce_add<float>(sum);
    losses[row] = total;
    const Vec<float> factor = splat(share / total);
    for (int64_t c = 0; c < C; c += kStep) store(z + c, load(z + c) * factor);
    z[target] -= share;
    // log(total) is added for all rows at once, below.
    losses[rows + row] = most - target_logit;
  }
}

// Σ log(losses[row]) + losses[rows + row]
double mlp_loss_sum_kernel(const float* losses, int64_t rows) {
  constexpr int kStep = kLanes<float>;
  double sum = 0;
  for (int64_t row = 0; row < rows; row += kStep) {
    const int64_t count = rows - row < kStep ? rows - row : kStep;
    Vec<float> total = splat(1.0f);
    for (int64_t i = 0; i < count; ++i) total[i] = losses[row + i];
    total = log(total);
    for (int64_t i = 0; i < count; ++i) sum += total[i] + losses[rows + row + i];
  }
  return sum;
}

// ---------------------------------------------------------------------------------------------
// dz (rows, width) = Σ_p parts[p][:, k_begin...] where h > 0, or everywhere. Rows of the parts are
// `part_stride` wide, those of h `h_stride`.

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
// The optimizers, on a vector of gradients that has just been computed

FASTNET_INLINE Vec<float> square_root(Vec<float> x) {
  Vec<float> root;
  for (int i = 0; i < kLanes<float>; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
}

// As torch.optim's; `first` and `second` are exp_avg and exp_avg_sq, or momentum_buffer and unused.
template <MlpOptimizer kOptimizer>
FASTNET_INLINE Vec<float> updated(Vec<float> w, Vec<float> gradient, Vec<float>& first,
                                  Vec<float>& second, const MlpStep& step) {
  gradient += w * splat(step.weight_decay);
  if constexpr (kOptimizer == MlpOptimizer::sgd) {
    return w - splat(step.lr) * gradient;
  } else if constexpr (kOptimizer == MlpOptimizer::momentum) {
    first = first * splat(step.beta1) + gradient;
    return w - splat(step.lr) * first;
  } else {
    first += (gradient - first) * splat(1 - step.beta1);
    second = second * splat(step.beta2) + (gradient * gradient) * splat(1 - step.beta2);
    const Vec<float> deviation = square_root(second) * splat(step.second_scale) + splat(step.eps);
    return w - (first * splat(step.lr)) / deviation;
  }
}

// In memory: `skip` lanes, and those from `end` on, stay as they are.
template <MlpOptimizer kOptimizer>
FASTNET_INLINE void update(float* w, float* first, float* second, Vec<float> gradient,
                           const MlpStep& step, int64_t skip, int64_t end = kLanes<float>) {
  constexpr int kStep = kLanes<float>;
  const bool whole = skip == 0 && end == kStep;
  Vec<float> a = {}, b = {}, value = {};
  const auto read = [&](const float* from, Vec<float>& to) {
    if (whole) {
      to = load(from);
    } else {
      for (int64_t i = skip; i < end; ++i) to[i] = from[i];
    }
  };
  const auto write = [&](float* to, Vec<float> from) {
    if (whole) {
      store(to, from);
    } else {
      for (int64_t i = skip; i < end; ++i) to[i] = from[i];
    }
  };
  read(w, value);
  if constexpr (kOptimizer != MlpOptimizer::sgd) read(first, a);
  if constexpr (kOptimizer == MlpOptimizer::adam) read(second, b);
  write(w, updated<kOptimizer>(value, gradient, a, b, step));
  if constexpr (kOptimizer != MlpOptimizer::sgd) write(first, a);
  if constexpr (kOptimizer == MlpOptimizer::adam) write(second, b);
}

// ---------------------------------------------------------------------------------------------
// The gradient of a weight, applied where it is computed: of w (N, K), for all K and N,
//   grad[n, k] = Σ_m dz[m, n] · x[m, k],  m in [0, M)
// Rows of dz are `dz_stride` wide. Vectors lie along K; dz's elements are broadcast.

template <MlpOptimizer kOptimizer, int kRows, int kVectors>
FASTNET_INLINE void mlp_update_tile(const float* dz, int64_t dz_stride, const float* x, float* w,
                                    float* first, float* second, int64_t M, int64_t K,
                                    int64_t skip, const MlpStep& step) {
  constexpr int kStep = kLanes<float>;
  Vec<float> sum[kRows][kVectors];
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<float>{};
  }
  for (int64_t m = 0; m < M; ++m) {
    Vec<float> row[kVectors];
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) row[v] = load(x + m * K + v * kStep);
    FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<float> factor = splat(dz[m * dz_stride + r]);
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

template <MlpOptimizer kOptimizer, int kRows, int kVectors>
static void mlp_update_rows(const float* dz, int64_t dz_stride, const float* x, float* w,
                            float* first, float* second, int64_t M, int64_t K, int64_t rows,
                            int64_t skip, const MlpStep& step) {
  if (rows == kRows) {
    mlp_update_tile<kOptimizer, kRows, kVectors>(dz, dz_stride, x, w, first, second, M, K, skip,
                                                 step);
  } else if constexpr (kRows > 1) {
    mlp_update_rows<kOptimizer, kRows - 1, kVectors>(dz, dz_stride, x, w, first, second, M, K,
                                                     rows, skip, step);
  }
}

template <MlpOptimizer kOptimizer>
void mlp_update_kernel(const float* dz, int64_t dz_stride, const float* x, float* w, float* first,
                       float* second, int64_t M, int64_t N, int64_t K, const MlpStep& step) {
  constexpr int kStep = kLanes<float>;
  constexpr int kWide = kStep * kProductVectors;
  if (K < kStep) {
    for (int64_t n = 0; n < N; ++n) {
      Vec<float> sum = {};
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t k = 0; k < K; ++k) sum[k] += dz[m * dz_stride + n] * x[m * K + k];
      }
      update<kOptimizer>(w + n * K, first + n * K, second + n * K, sum, step, 0, K);
    }
    return;
  }
  // Rows in tiles of equal height: a low one at the end would wait for its additions.
  const int64_t tiles = (N + kProductRows - 1) / kProductRows;
  const auto columns = [&](auto vectors, int64_t k, int64_t skip) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t n = tile * N / tiles, rows = (tile + 1) * N / tiles - n;
      mlp_update_rows<kOptimizer, kProductRows, decltype(vectors)::value>(
          dz + n, dz_stride, x + k, w + n * K + k, first + n * K + k, second + n * K + k, M, K,
          rows, skip, step);
    }
  };
  int64_t k = 0;
  for (; k + kWide <= K; k += kWide) columns(Constant<kProductVectors>{}, k, 0);
  // What is left reaches back over columns already done, and skips them.
  for (; k < K; k += kStep) {
    const int64_t from = k + kStep <= K ? k : K - kStep;
    columns(Constant<1>{}, from, k - from);
  }
}

// The same of a bias (N): grad[n] = Σ_m dz[m, n].
template <MlpOptimizer kOptimizer>
void mlp_update_bias_kernel(const float* dz, int64_t dz_stride, float* bias, float* first,
                            float* second, int64_t M, int64_t N, const MlpStep& step) {
  constexpr int kStep = kLanes<float>;
  for (int64_t n = 0; n < N; n += kStep) {
    const int64_t count = N - n < kStep ? N - n : kStep;
    Vec<float> sum = {};
    if (count == kStep) {
      for (int64_t m = 0; m < M; ++m) sum += load(dz + m * dz_stride + n);
    } else {
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t i = 0; i < count; ++i) sum[i] += dz[m * dz_stride + n + i];
      }
    }
    update<kOptimizer>(bias + n, first + n, second + n, sum, step, 0, count);
  }
}
