// The forward of 3 x 3 filters of very few channels, in Winograd's form. Included by
// conv_relu_pool_forward_kernels.h; the blocks of tiles are those of conv_relu_pool_blocks.h.

// ---------------------------------------------------------------------------------------------
// Filters, transformed

// G of one column of a filter's taps.
template <class V>
FASTNET_INLINE void points_of_taps(V g0, V g1, V g2, V (&to)[4]) {
  const V outer = (g0 + g2) * 0.5f, inner = g1 * 0.5f;
  to[0] = g0;
  to[1] = outer + inner;
  to[2] = outer - inner;
  to[3] = g2;
}

// filters[k / 4][point][c][k % 4] = (G g Gᵀ)[point], of filters that there are not 0.
template <class T>
static Magnitude transform_part(const ConvForward<T>& call, int64_t part) {
  using V = Vec4<float>;
  const int64_t C = call.C, step = kProductFilters * C;
  const int64_t first = part_begin(call, part), count = part_begin(call, part + 1) - first;
  V largest = {};
  Vec4<int32_t> is_number = V{} == V{};
  for (int64_t c = 0; c < C; ++c) {
    V g[3][3];
    FASTNET_UNROLL for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = V{};
    for (int64_t k = 0; k < count; ++k) {
      const T* from = call.weight + (first + k) * call.weight_at.n + c * call.weight_at.c;
      for (int r = 0; r < 3; ++r) {
        for (int s = 0; s < 3; ++s) {
          g[r][s][k] = widen(from[r * call.weight_at.y + s * call.weight_at.x]);
        }
      }
    }
    FASTNET_UNROLL for (int tap = 0; tap < 9; ++tap) {
      const V value = g[tap / 3][tap % 3], size = value < V{} ? -value : value;
      largest = largest < size ? size : largest;
      is_number &= value == value;
    }
    V half[3][4];
    for (int s = 0; s < 3; ++s) points_of_taps(g[0][s], g[1][s], g[2][s], half[s]);
    float* to = call.arranged_filters + part * kPoints * step + c * kProductFilters;
    for (int r = 0; r < 4; ++r) {
      V row[4];
      points_of_taps(half[0][r], half[1][r], half[2][r], row);
      for (int s = 0; s < 4; ++s) store_4(to + (r * 4 + s) * step, row[s]);
    }
  }
  LargestOf<float> all;
  for (int k = 0; k < 4; ++k) {
    all.add(largest[k]);
    all.is_number &= is_number[k] != 0;
  }
  return all.magnitude();
}

// ---------------------------------------------------------------------------------------------
// Winograd's form

// Where the points of a filter stand, kProductFilters from one to the next of a channel.
template <class T>
FASTNET_INLINE const float* points_of_filter(const ConvForward<T>& call, int64_t k) {
  const int64_t group = kPoints * call.C * kProductFilters;
  return call.filters + k / kProductFilters * group + k % kProductFilters;
}

// What kFusedFilters filters of kProductVectors vectors give before Aᵀ A from the right:
// sums[filter][column][row][vector]. In any other order the compiler finds sums that two turns of
// the loop over filters seem to share, keeps them, and spills.
using FusedSums = float[kFusedFilters][4][2][kProductVectors][kLanes<float>];

// Products and Aᵀ from the left in registers, a column of points after the other, and so half as
// many results to memory as there are points. After each column comes a part of something else:
// `meanwhile`, which the processor does while it multiplies on.
template <int kChannels, class Meanwhile>
FASTNET_INLINE void fused_products(const float* filters, const float* patches, FusedSums& sums,
                                   const Meanwhile& meanwhile) {
  using V = Vec<float>;
  constexpr int kFilters = kFusedFilters, kVectors = kProductVectors;
#pragma GCC unroll 1
  for (int column = 0; column < 4; ++column) {
    V upper[kFilters][kVectors], lower[kFilters][kVectors];
    const auto multiply = [&](int row, int c, const auto& add) __attribute__((always_inline)) {
      const int point = 4 * row + column;
      const float* const w = filters + (point * kChannels + c) * kProductFilters;
      V x[kVectors];
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        x[v] = in_register(load(patches + (c * kPoints + point) * kFusedRow + v * kLanes<float>));
      }
      FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) add(k, v, splat(w[k]) * x[v]);
      }
    };
    // The second row and the third first, whose sum goes to one result, their difference to the
    // other.
    FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
      multiply(1, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        upper[k][v] = c == 0 ? product : upper[k][v] + product;
      });
      multiply(2, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        lower[k][v] = c == 0 ? product : lower[k][v] + product;
      });
    }
    FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        const V sum = upper[k][v] + lower[k][v];
        lower[k][v] = upper[k][v] - lower[k][v];
        upper[k][v] = sum;
      }
    }
    FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
      multiply(0, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        upper[k][v] += product;
      });
      multiply(3, c, [&](int k, int v, V product) __attribute__((always_inline)) {
        lower[k][v] -= product;
      });
    }
    FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
        store(sums[k][column][0][v], upper[k][v]);
        store(sums[k][column][1][v], lower[k][v]);
      }
    }
    meanwhile(column);
  }
}

// What goes through fused_products at a time.
template <class T>
struct FusedStep {
  int64_t k_first;  // of `count` filters
  int count;
  const Target<T>* to;  // of kProductVectors vectors
};

// Filters [begin, end) of a step: their sums times A, bias, ReLU and maximum. All vectors of a
// filter one after the other, so that a line of the output is whole before it leaves the cache.
template <class T>
FASTNET_INLINE void finish_step(const ConvForward<T>& call, const FusedStep<T>& step,
                                const FusedSums& sums, int begin, int end) {
  using V = Vec<float>;
  constexpr int kVectors = kProductVectors;
  for (int i = begin; i < end && i < step.count; ++i) {
    const int64_t k = step.k_first + i;
    V y[kVectors][4], bias[kVectors];
    T* pooled[kVectors];
    uint8_t* codes[kVectors];
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      pooled[v] = step.to[v].pooled + k * step.to[v].next;
      codes[v] = codes_at(step.to[v].codes, k * step.to[v].next);
      bias[v] = splat(call.bias ? widen(call.bias[k]) : 0.0f);
      FASTNET_UNROLL for (int row = 0; row < 2; ++row) {
        const auto m = [&](int column)
                           __attribute__((always_inline)) { return load(sums[i][column][row][v]); };
        y[v][2 * row] = m(0) + (m(1) + m(2));
        y[v][2 * row + 1] = (m(1) - m(2)) - m(3);
      }
    }
    finish_windows<false, float, T, kVectors>(y, bias, pooled, codes);
  }
}

// Filters [k_begin, k_end) of `tiles` tiles. A step is finished during the next one's products. Its
// output is asked for before its own: a store that has to wait for its line keeps those of the
// products after it waiting, too.
template <int kChannels, class T>
static void fused_block(const ConvForward<T>& call, const float* patches, const Target<T>* targets,
                        int64_t tiles, int64_t k_begin, int64_t k_end) {
  constexpr int kFilters = kFusedFilters, kVectors = kProductVectors;
  alignas(64) FusedSums sums[2];
  FusedStep<T> before{0, 0, nullptr};
  int at = 0;
  for (int64_t k_first = k_begin; k_first < k_end; k_first += kFilters) {
    const float* const filters = points_of_filter(call, k_first);
    const int count = static_cast<int>(least(kFilters, k_end - k_first));
    for (int64_t v_first = 0; v_first * kLanes<float> < tiles; v_first += kVectors, at ^= 1) {
      const Target<T>* const to = targets + v_first;
      for (int64_t k = k_first; k < k_first + count; ++k) {
        FASTNET_UNROLL for (int v = 0; v < kVectors; ++v)
            __builtin_prefetch(to[v].pooled + k * to[v].next, 1);
        __builtin_prefetch(codes_at(to[0].codes, k * to[0].next), 1);
      }
      const auto finish = [&](int column) __attribute__((always_inline)) {
        finish_step(call, before, sums[at ^ 1], column * kFilters / 4, (column + 1) * kFilters / 4);
      };
      fused_products<kChannels>(filters, patches + v_first * kLanes<float>, sums[at], finish);
      before = {k_first, count, to};
    }
  }
  finish_step(call, before, sums[at ^ 1], 0, kFilters);
}

// ---------------------------------------------------------------------------------------------
// The same of one channel

// A filter of all vectors of a block. Of 32 registers all of its points have one while the vectors
// go past. Of 16 nine points have one, and then the other seven, which go on from sums that are
// ready: what waits for the last of many additions keeps a processor from looking ahead.
//
// Where a window's patches are alike, as on a background, its elements stay equal: the first wins,
// as in torch.
template <class T>
__attribute__((noinline)) static void one_channel_filter(const float* patches, int64_t tiles,
                                                         const float* filter, float bias,
                                                         const Target<T>* targets, int64_t k) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  alignas(64) float sums[kMaxVectors][4][kStep];  // the elements of the windows so far
  V left[4], right[4];                            // columns of points
  const auto point = [&](int row, int column) __attribute__((always_inline)) {
    return in_register(splat(filter[(4 * row + column) * kProductFilters]));
  };
  const auto columns = [&](int one, int other) __attribute__((always_inline)) {
    FASTNET_UNROLL for (int row = 0; row < 4; ++row) {
      left[row] = point(row, one);
      right[row] = point(row, other);
    }
  };
  const auto x = [&](int64_t at, int row, int column) __attribute__((always_inline)) {
    return load(patches + (4 * row + column) * kOneChannelPlane + at);
  };

  const V its_bias = in_register(splat(bias));
  if constexpr (kRegisters == 32) {
    V w[4][4];
    FASTNET_UNROLL for (int i = 0; i < 16; ++i) w[i / 4][i % 4] = point(i / 4, i % 4);
    for (int64_t v = 0; v * kStep < tiles; v += targets[v].run) {
      const Target<T> first = targets[v];
      T* pooled = first.pooled + k * first.next;
      uint8_t* codes = codes_at(first.codes, k * first.next);
      for (int64_t n = 0, at = first.at; n < first.run; ++n, at += kStep) {
        V upper[4], lower[4];
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          const V x2 = in_register(x(at, 2, i));
          const V m1 =
              in_register(i == 1 ? w[1][i] * x(at, 1, i) + its_bias : w[1][i] * x(at, 1, i));
          // A product made twice, with the additions in it, is an instruction less than a product,
          // a sum and a difference. In two columns it is: of additions there are then as many as of
          // multiplications, which have units of their own.
          if (i % 2 == 0) {
            upper[i] = in_register(m1 + w[2][i] * x2) + w[0][i] * x(at, 0, i);
            lower[i] = in_register(m1 - w[2][i] * x2) - w[3][i] * x(at, 3, i);
          } else {
            const V m2 = in_register(w[2][i] * x2);
            upper[i] = (m1 + m2) + w[0][i] * x(at, 0, i);
            lower[i] = (m1 - m2) - w[3][i] * x(at, 3, i);
          }
        }
        const V y[1][4] = {{(upper[1] + upper[2]) + upper[0], (upper[1] - upper[2]) - upper[3],
                            (lower[1] + lower[2]) + lower[0], (lower[1] - lower[2]) - lower[3]}};
        __builtin_prefetch(pooled + first.next, 1);  // the next filter's
        if (codes) __builtin_prefetch(codes + first.next, 1);
        finish_windows<false, float, T, 1>(y, nullptr, {pooled}, {codes});
        pooled += kStep;
        codes = codes_at(codes, kStep);
      }
    }
    return;
  }

  columns(1, 2);
  const V ninth = point(1, 0);
  for (int64_t v = 0; v * kStep < tiles; ++v) {
    const int64_t at = targets[v].at;
    V upper[2], lower[2];
    FASTNET_UNROLL for (int i = 0; i < 2; ++i) {
      const V(&w)[4] = i == 0 ? left : right;
      // In registers, or the compiler multiplies once for the sum and once for the difference. Of
      // all points only (1, 1) is added to all four elements, and takes the bias along.
      const V m1 = in_register(i == 0 ? w[1] * x(at, 1, 1) + its_bias : w[1] * x(at, 1, 2));
      const V m2 = in_register(w[2] * x(at, 2, 1 + i));
      upper[i] = (m1 + m2) + w[0] * x(at, 0, 1 + i);
      lower[i] = (m1 - m2) - w[3] * x(at, 3, 1 + i);
    }
    const int64_t to = k * targets[v].next;  // as in fused_block, asked for before it is written
    __builtin_prefetch(targets[v].pooled + to, 1);
    __builtin_prefetch(codes_at(targets[v].codes, to), 1);
    const V x0 = in_register(x(at, 1, 0));
    store(sums[v][0], (upper[0] + upper[1]) + ninth * x0);
    store(sums[v][1], upper[0] - upper[1]);
    store(sums[v][2], (lower[0] + lower[1]) + ninth * x0);
    store(sums[v][3], lower[0] - lower[1]);
  }

  columns(0, 3);
  for (int64_t v = 0; v * kStep < tiles; ++v) {
    const int64_t at = targets[v].at;
    V y[1][4];
    FASTNET_UNROLL for (int i = 0; i < 4; ++i) y[0][i] = load(sums[v][i]);
    const V x1 = in_register(x(at, 1, 3)), x2 = in_register(x(at, 2, 3));
    const V x0 = in_register(x(at, 2, 0));
    y[0][0] += left[0] * x(at, 0, 0);
    y[0][1] -= right[0] * x(at, 0, 3);
    y[0][2] -= left[2] * x0;
    y[0][3] -= right[1] * x1;
    y[0][0] += left[2] * x0;
    y[0][1] -= right[1] * x1;
    y[0][2] -= left[3] * x(at, 3, 0);
    y[0][3] += right[2] * x2;
    y[0][1] -= right[2] * x2;
    y[0][3] += right[3] * x(at, 3, 3);
    const int64_t to = k * targets[v].next;
    finish_windows<false, float, T, 1>(y, nullptr, {targets[v].pooled + to},
                                       {codes_at(targets[v].codes, to)});
  }
}
