// The first layer of native training, of images that are 0 for the most part, as digits are: the
// zeros are passed over. Included by mlp_kernels.h.
//
// With pixels p the layer's input is x = z + shift, where z = p · scale is 0 wherever p is:
//   x · wᵀ = z · wᵀ + shift · wᵀ        grad_w = dzᵀ · z + (Σ_m dz[m])ᵀ · shift
// in which the second terms take no images.
//
//   values, columns   z of the pixels that are not 0, image after image, and where they stand
//   begins            [rows + 1], where an image's are
//   w                 [K][width], and its gradient and the optimizer's state: a thread's units, in
//                     whole vectors. What lanes behind the last unit hold goes nowhere.

FASTNET_INLINE bool are_zero(const uint8_t* from) {
  using Bits = std::conditional_t<kLanes<float> == 4, uint32_t, uint64_t>;
  Bits all = 0;
  for (int i = 0; i < kLanes<float>; i += static_cast<int>(sizeof(Bits))) {
    Bits bits;
    __builtin_memcpy(&bits, from + i, sizeof bits);
    all |= bits;
  }
  return all == 0;
}
FASTNET_INLINE bool are_zero(const float*) {
  return false;  // to find out takes as long as to pick them
}

// Of images[order[row]] (K). Writes a vector more than there are pixels at most.
template <class Pixel>
void mlp_pick_kernel(const Pixel* images, const int64_t* order, const float* scale, float* values,
                     int32_t* columns, int64_t* begins, int64_t rows, int64_t K) {
  constexpr int kStep = kLanes<float>;
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Pixel* const from = images + order[row] * K;
    begins[row] = count;
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
      if (are_zero(from + k)) continue;
      Vec<float> z = load_pixels(from + k) * load(scale + k);
      Vec<int32_t> column = lane_index<int32_t>() + static_cast<int32_t>(k);
      const int picked = pick(z != Vec<float>{}, &z, &column);
      store(values + count, z);
      store(columns + count, column);
      count += picked;
    }
    for (; k < K; ++k) {
      const float z = static_cast<float>(from[k]) * scale[k];
      values[count] = z;
      columns[count] = static_cast<int32_t>(k);
      count += z != 0;
    }
  }
  begins[rows] = count;
}

// base (width) = bias (units) + shift · wᵀ. In several sums, since each addition waits for the one
// before.
void mlp_base_kernel(const float* w, const float* shift, const float* bias, float* base, int64_t K,
                     int64_t units, int64_t width) {
  constexpr int kStep = kLanes<float>, kSums = 4;
  for (int64_t v = 0; v < width; v += kStep) {
    Vec<float> sum[kSums] = {};
    int64_t k = 0;
    for (; k + kSums <= K; k += kSums) {
      FASTNET_UNROLL for (int i = 0; i < kSums; ++i) {
        sum[i] += splat(shift[k + i]) * load(w + (k + i) * width + v);
      }
    }
    for (; k < K; ++k) sum[0] += splat(shift[k]) * load(w + k * width + v);
    store(base + v, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  for (int64_t unit = 0; unit < units && bias; ++unit) base[unit] += bias[unit];
}

FASTNET_INLINE Vec<float> first_lanes(Vec<float> value, int64_t count) {
  return lane_index<float>() < splat(static_cast<float>(count)) ? value : Vec<float>{};
}

// Vectors of units that a pass over the picked pixels takes.
inline constexpr int kMostUnitVectors = 4;

template <class Pass>
FASTNET_INLINE void each_unit_vectors(int64_t vectors, const Pass& pass) {
  int64_t v = 0;
  for (; v + kMostUnitVectors <= vectors; v += kMostUnitVectors)
    pass(std::integral_constant<int, kMostUnitVectors>{}, v);
  if (v + 2 <= vectors) {
    pass(std::integral_constant<int, 2>{}, v);
    v += 2;
  }
  if (v < vectors) pass(std::integral_constant<int, 1>{}, v);
}

// out (M, units) = relu(base + z · wᵀ), rows `out_stride` apart; `is_own` says that so are as many
// lanes as a row of w has, and all this thread's.
template <bool kRelu>
void mlp_sparse_forward_kernel(const float* values, const int32_t* columns, const int64_t* begins,
                               const float* w, const float* base, float* out, int64_t out_stride,
                               bool is_own, int64_t M, int64_t units, int64_t width) {
  constexpr int kStep = kLanes<float>;
  for (int64_t row = 0; row < M; ++row) {
    const int64_t begin = begins[row], end = begins[row + 1];
    each_unit_vectors(width / kStep, [&](auto vectors,
                                         int64_t first) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value, kSums = kMostUnitVectors / kVectors;
      const float* const from = w + first * kStep;
      Vec<float> sum[kSums][kVectors];
      FASTNET_UNROLL for (int i = 0; i < kSums; ++i) {
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] = Vec<float>{};
      }
      const auto add = [&](int64_t e, int i) __attribute__((always_inline)) {
        const Vec<float> z = splat(values[e]);
        const float* const row = from + columns[e] * width;
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[i][v] += z * load(row + v * kStep);
      };
      int64_t e = begin;
      for (; e + kSums <= end; e += kSums) {
        FASTNET_UNROLL for (int i = 0; i < kSums; ++i) add(e + i, i);
      }
      for (; e < end; ++e) add(e, 0);
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t unit = (first + v) * kStep;
        Vec<float> z = sum[0][v];
        FASTNET_UNROLL for (int i = 1; i < kSums; ++i) z += sum[i][v];
        z = first_lanes(activate<kRelu>(z + load(base + unit)), units - unit);
        float* const to = out + row * out_stride + unit;
        if (is_own || units - unit >= kStep) {
          store(to, z);
        } else if (units > unit) {
          __builtin_memcpy(to, &z, static_cast<size_t>(units - unit) * sizeof(float));
        }
      }
    });
  }
}

// grad (K, width) += dzᵀ · z, of dz (M, units), rows `dz_stride` apart.
void mlp_sparse_grad_kernel(const float* values, const int32_t* columns, const int64_t* begins,
                            const float* dz, int64_t dz_stride, float* grad, int64_t M,
                            int64_t units, int64_t width) {
  constexpr int kStep = kLanes<float>;
  for (int64_t row = 0; row < M; ++row) {
    const int64_t begin = begins[row], end = begins[row + 1];
    each_unit_vectors(
        width / kStep, [&](auto vectors, int64_t first) __attribute__((always_inline)) {
          constexpr int kVectors = decltype(vectors)::value, kAtOnce = kMostUnitVectors / kVectors;
          Vec<float> d[kVectors];
          FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
            const int64_t unit = (first + v) * kStep;
            d[v] = first_lanes(load(dz + row * dz_stride + unit), units - unit);
          }
          // A row's columns differ: all can be read before one is written.
          const auto add = [&](int64_t e, auto at_once) __attribute__((always_inline)) {
            constexpr int kCount = decltype(at_once)::value;
            float* to[kCount];
            Vec<float> sum[kCount][kVectors];
            FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
              to[i] = grad + columns[e + i] * width + first * kStep;
              FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
                sum[i][v] = load(to[i] + v * kStep) + splat(values[e + i]) * d[v];
              }
            }
            FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
              FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) store(to[i] + v * kStep, sum[i][v]);
            }
          };
          int64_t e = begin;
          for (; e + kAtOnce <= end; e += kAtOnce) add(e, std::integral_constant<int, kAtOnce>{});
          for (; e < end; ++e) add(e, std::integral_constant<int, 1>{});
        });
  }
}

// The gradient, to which sums (units) · shift belongs still, applied, and set to 0 for the next.
template <OptimizerKind kOptimizer>
void mlp_sparse_update_kernel(float* grad, const float* shift, const float* sums, float* w,
                              float* first, float* second, int64_t K, int64_t width,
                              const OptimizerStep& step) {
  constexpr int kStep = kLanes<float>;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t v = 0; v < width; v += kStep) {
      const int64_t at = k * width + v;
      const Vec<float> gradient = load(grad + at) + splat(shift[k]) * load(sums + v);
      store(grad + at, Vec<float>{});
      update<kOptimizer>(w + at, first + at, second + at, gradient, step, 0);
    }
  }
}

// What a thread has of the layer, w (units, K), as these kernels take it, and back.
void mlp_transpose_kernel(const float* from, int64_t from_row, float* to, int64_t to_row,
                          int64_t rows, int64_t columns) {
  transpose(from, from_row, to, to_row, rows, columns);
}
