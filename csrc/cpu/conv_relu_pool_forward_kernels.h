// The forward loops of conv_relu_pool, compiled once per instruction set by foreach_isa.h: the
// direct form, and which form goes where.

// In the order in which they stand on each other.
// clang-format off
#include "conv_relu_pool_patches.h"
#include "conv_relu_pool_windows.h"
#include "conv_relu_pool_tiles.h"
#include "conv_relu_pool_tiles_forward_kernels.h"
#include "conv_relu_pool_blocks.h"
#include "conv_relu_pool_few_channels_forward_kernels.h"
// clang-format on

// ---------------------------------------------------------------------------------------------
// Filters, rearranged

// Parts [begin, end). The direct form's: filters[group][c][r][s][k in group].
// Returns the magnitude of the filters and, where it matters, the bias.
template <class T>
Magnitude arrange_filters_kernel(const ConvForward<T>& call, int64_t begin, int64_t end) {
  const int64_t C = call.C, kernel = call.kernel;
  LargestOf<acc_t<T>> bias;
  for (int64_t k = part_begin(call, begin); call.bias && k < part_begin(call, end); ++k) {
    bias.add(widen(call.bias[k]));
  }
  // Whatever it is, the direct form can add it, and the others where nothing overflows. (An
  // infinite one makes the elements of a window equal, of which the first wins.)
  Magnitude met = Magnitude::small;
  if (bias.magnitude(kLargestOfLarge) != Magnitude::small) met = Magnitude::finite;
  for (int64_t part = begin; part < end; ++part) {
    if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
      if (call.form == ConvForm::patches_of_6) {
        const int64_t k = part_begin(call, part);
        const auto transform = call.kernel == 3 ? transform_filters<3, T> : transform_filters<5, T>;
        met = larger(met,
                     transform(call.weight + k * call.weight_at.n, part_begin(call, part + 1) - k,
                               call.weight_at.n, C, call.weight_at.c, call.weight_at,
                               call.arranged_filters +
                                   (part - call.first_part) * kSidePoints * C * kLanes<T>));
        continue;
      }
      if (is_by_patches(call)) {
        met = larger(met, transform_part(call, part));
        continue;
      }
    }
    const int64_t k_begin = part_begin(call, part), k_end = part_begin(call, part + 1);
    LargestOf<acc_t<T>> filters;
    if (!call.is_arranged) {
      const int64_t size = C * kernel * kernel;
      filters.add_all(call.filters + k_begin * size, (k_end - k_begin) * size);
      met = larger(met, filters.magnitude());
      continue;
    }
    acc_t<T>* to = call.arranged_filters + k_begin * C * kernel * kernel;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < kernel; ++r) {
        for (int64_t s = 0; s < kernel; ++s) {
          const T* from =
              call.weight + c * call.weight_at.c + r * call.weight_at.y + s * call.weight_at.x;
          for (int64_t k = k_begin; k < k_end; ++k) {
            const acc_t<T> value = widen(from[k * call.weight_at.n]);
            filters.add(value);
            *to++ = value;
          }
        }
      }
    }
    met = larger(met, filters.magnitude());
  }
  return met;
}

// ---------------------------------------------------------------------------------------------
// The direct form

// One vector of tiles for kFilters filters.
template <bool kMayBeNaN, class A, class T, int kKernel, int kFilters>
static void direct_tile(const A* patches, int64_t patch_row, int64_t plane, const A* filters,
                        int64_t next_filter, int64_t next_tap, const A* bias, int64_t C,
                        Target<T> to) {
  using V = Vec<A>;
  constexpr int kPatch = kKernel + 1;
  V sum[kFilters][4];
  FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
    FASTNET_UNROLL for (int i = 0; i < 4; ++i) sum[k][i] = splat(bias[k]);
  }
  for (int64_t c = 0; c < C; ++c) {
    const A* x = patches + c * patch_row;
#pragma GCC unroll 1
    for (int r = 0; r < kKernel; ++r) {
      const A *upper = x + r * kPatch * plane, *lower = upper + kPatch * plane;
#pragma GCC unroll 1
      for (int s = 0; s < kKernel; ++s) {
        // In this order all there is fits into 16 registers.
        V w[kFilters];
        FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) w[k] = splat(filters[k * next_filter]);
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          const V value = load((i < 2 ? upper : lower) + (s + i % 2) * plane);
          FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) sum[k][i] += w[k] * value;
        }
        filters += next_tap;
      }
    }
  }
  T* pooled[kFilters];
  uint8_t* codes[kFilters];
  FASTNET_UNROLL for (int k = 0; k < kFilters; ++k) {
    pooled[k] = to.pooled + k * to.next;
    codes[k] = codes_at(to.codes, k * to.next);
  }
  finish_windows<kMayBeNaN, A, T, kFilters>(sum, nullptr, pooled, codes);
}

template <class A, class T, int kKernel, int kFilters = kDirectFilters, class... Arguments>
static void direct_group(int64_t filters, bool may_be_nan, Arguments... arguments) {
  if (filters != kFilters) {
    if constexpr (kFilters > 1) {
      direct_group<A, T, kKernel, kFilters - 1>(filters, may_be_nan, arguments...);
    }
  } else if (may_be_nan) {
    direct_tile<true, A, T, kKernel, kFilters>(arguments...);
  } else {
    direct_tile<false, A, T, kKernel, kFilters>(arguments...);
  }
}

// Filters in parts [part_first, part_last) of a block's `count` tiles.
template <class T, int kKernel>
static void direct_block(const ConvForward<T>& call, const ForwardPlan<T>& plan,
                         const Targets<T>& targets, int64_t tiles, int64_t part_first,
                         int64_t part_last, bool may_be_nan, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t C = call.C;
  for (int64_t part = part_first; part < part_last; ++part) {
    const int64_t k = part_begin(call, part), k_stop = part_begin(call, part + 1);
    A bias[kDirectFilters] = {};
    for (int64_t i = k; call.bias && i < k_stop; ++i) bias[i - k] = widen(call.bias[i]);
    const int64_t size = C * kKernel * kKernel, count = k_stop - k;
    const A* const filters = call.filters + k * size;
    const int64_t next_filter = call.is_arranged ? 1 : size;
    const int64_t next_tap = call.is_arranged ? count : 1;
    for (int64_t v = 0; v * kLanes<T> < tiles; ++v) {
      Target<T> to = targets.of[v];
      to.pooled += k * to.next;
      to.codes = codes_at(to.codes, k * to.next);
      direct_group<A, T, kKernel>(count, may_be_nan, scratch + plan.patches_at + v * kLanes<T>,
                                  plan.patch_row, plan.plane, filters, next_filter, next_tap, bias,
                                  C, to);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// All forms

// Threads share out tiles, or rows of them: how many there are, and in a block.
template <class T>
int64_t forward_units(const ConvForward<T>& call) {
  if (call.form == ConvForm::patches_of_6) return call.N * TileGrid<T>(call).rows;
  return call.N * call.P * call.Q;
}
template <class T>
int64_t block_units(const ConvForward<T>& call) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.form == ConvForm::patches_of_6) return TilesForwardPlan<T>(call).rows;
  }
  return ForwardPlan<T>(call).tiles;
}

// Units [begin, end) of the filters in parts [part_first, part_last). Returns false where the input
// has elements that Winograd's form cannot take; what was written is then worthless.
template <class T>
bool conv_forward_kernel(const ConvForward<T>& call, int64_t begin, int64_t end, int64_t part_first,
                         int64_t part_last, acc_t<T>* scratch) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.form == ConvForm::patches_of_6) {
      return tiles_forward(call, begin, end, part_first, part_last, scratch);
    }
  }
  const ForwardPlan<T> plan(call);
  const int64_t k_begin = part_begin(call, part_first), k_end = part_begin(call, part_last);
  Strip strip;
  for (int64_t i = plan.strip_at; i < plan.patches_at; ++i) scratch[i] = 0;
  for (int64_t first = begin; first < end; first += plan.tiles) {
    const int64_t last = least(end, first + plan.tiles), count = last - first;
    const Targets<T> targets(call, plan, first, last, scratch);
    const bool is_small = call.kernel == 3
                              ? gather_patches<T, 3>(call, plan, first, last, &strip, scratch)
                              : gather_patches<T, 5>(call, plan, first, last, &strip, scratch);
    if (is_fused(call)) {
      if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
        if (!is_small) return false;
        const auto block = call.C == 2   ? fused_block<2, T>
                           : call.C == 3 ? fused_block<3, T>
                                         : fused_block<4, T>;
        block(call, scratch + plan.patches_at, targets.of, count, k_begin, k_end);
      }
    } else if (is_one_channel(call)) {
      if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
        if (!is_small) return false;
        for (int64_t k = k_begin; k < k_end; ++k) {
          one_channel_filter(scratch + plan.patches_at, count, points_of_filter(call, k),
                             call.bias ? widen(call.bias[k]) : 0.0f, targets.of, k);
        }
      }
    } else {
      const bool may_be_nan = !is_small || !call.filters_are_small;
      const auto block = call.kernel == 3 ? direct_block<T, 3> : direct_block<T, 5>;
      block(call, plan, targets, count, part_first, part_last, may_be_nan, scratch);
    }
    write_block(call, plan, first, last, k_begin, k_end, targets, scratch);
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Bias, ReLU and maximum by themselves, for a convolution that a library computed: rows
// [begin, end) of the pooled output, counted through images and channels, or for channels_last
// through images. z is laid out as the output is.

template <class T>
void relu_pool_kernel(const T* z, Strides4 z_at, T* output, uint8_t* codes, Strides4 at, int64_t K,
                      int64_t P, int64_t Q, bool channels_last, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const int64_t rows_of_channels = channels_last ? 1 : K;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t p = row % P, k = row / P % rows_of_channels, n = row / P / rows_of_channels;
    const T* const upper = z + n * z_at.n + k * z_at.c + 2 * p * z_at.y;
    const T* const lower = upper + z_at.y;
    const int64_t to = n * at.n + k * at.c + p * at.y;
    const auto one = [&](int64_t from, int64_t offset) {
      A most = widen(upper[from]);
      uint8_t code = 0;
      for (int j = 1; j < 4; ++j) {
        const A y = widen((j < 2 ? upper : lower)[from + j % 2 * z_at.x]);
        if (y > most || y != y) {
          most = y;
          code = static_cast<uint8_t>(j);
        }
      }
      narrow(most <= 0 ? A(0) : most, output + to + offset);
      if (codes) codes[to + offset] = most <= 0 ? kDead : code;
    };
    const auto vector = [&](const Vec<A>(&y)[1][4], int64_t offset) {
      finish_windows<true, A, T, 1>(y, nullptr, {output + to + offset},
                                    {codes_at(codes, to + offset)});
    };
    if (channels_last) {
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t from = 2 * q * z_at.x, offset = q * at.x;
        int64_t i = 0;
        for (; i + kStep <= K; i += kStep) {
          const Vec<A> y[1][4] = {{load(upper + from + i), load(upper + from + i + z_at.x),
                                   load(lower + from + i), load(lower + from + i + z_at.x)}};
          vector(y, offset + i);
        }
        for (; i < K; ++i) one(from + i, offset + i);
      }
      continue;
    }
    int64_t q = 0;
    for (; q + kStep <= Q; q += kStep) {
      Vec<A> y[1][4];
      load_columns(upper + 2 * q, y[0], y[0] + 1);
      load_columns(lower + 2 * q, y[0] + 2, y[0] + 3);
      vector(y, q);
    }
    for (; q < Q; ++q) one(2 * q, q);
  }
}
