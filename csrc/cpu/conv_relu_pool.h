// What conv_relu_pool's kernels for the CPU are called with. T is the element as it stands in
// memory, A = acc_t<T> what is calculated in.
#pragma once

#include "../conv_relu_pool.h"
#include "common.h"

namespace fastnet {

// Whether the kernels of our own take it. A processor that multiplies bfloat16 itself does so at
// twice the rate of these kernels, which widen it, but multiply less: measured on Zen 5, they lose
// where filters are many and windows few. A unit for matrices is far faster, given the channels.
inline bool has_own_kernels(const ConvReluPoolShape& shape, ScalarType dtype) {
  if (!shape.is_plain()) return false;
  if (dtype != ScalarType::BFloat16 || !cpu_has_bfloat16()) return true;
  if (shape.C > 4 && cpu_has_bfloat16_tiles()) return false;
  constexpr int64_t kFewFilters = 8'192, kManyFilters = 65'536, kManyWindows = 512;
  const int64_t filters = shape.C * shape.K;
  return filters <= kFewFilters ||
         (filters <= kManyFilters && shape.N * shape.P * shape.Q >= kManyWindows);
}

// How large the largest element of some tensor is.
enum class Magnitude : int {
  small,     // Winograd's form is as good as any
  finite,    // only the direct form is
  infinite,  // or NaN: zeros in the padding may not be multiplied by it
};

// How the forward multiplies the filters.
enum class ConvForm : int {
  direct,
  patches_of_4,  // Winograd's form on patches of 4 x 4, a pooling window's of 3 x 3 filters
  patches_of_6,  // the same on patches of 6 x 6: of many channels
};

// What a thread may keep of filters, rearranged, in elements.
template <class A>
constexpr int64_t most_filters() {
  return (12 << 20) / sizeof(A);
}

// Windows of a row beyond which a row of patches of 6 x 6 is too large to keep at hand.
inline constexpr int64_t kMostTileWindows = 256;

// What both directions are called with.
template <class T>
struct ConvCall {
  int64_t N, C, H, W, K, kernel, P, Q;  // kernel is the height and the width of the filters
  int64_t pad_y, pad_x;
  const T* input;
  Strides4 input_at;
};

template <class T>
ConvCall<element_t<T>> conv_call(const ConvReluPoolShape& shape, const Tensor& input) {
  return {shape.N, shape.C, shape.H,          shape.W,          shape.K,        shape.R,
          shape.P, shape.Q, shape.padding[0], shape.padding[1], data<T>(input), strides_of(input)};
}

template <class T>
struct ConvForward : ConvCall<T> {
  const T* weight;
  Strides4 weight_at;  // of k, c, r, s
  const T* bias;       // or null
  T* output;
  uint8_t* codes;      // or null: no gradient will be asked for
  Strides4 output_at;  // of the codes, too
  int64_t most_units;  // in a block: that all threads have some
  ConvForm form;
  const acc_t<T>* filters;     // the weights, rearranged by a kernel of its own, or as they are
  acc_t<T>* arranged_filters;  // the same, to be written; null where they are taken as they are
  bool is_arranged;
  int64_t first_part;      // of the filters that are at hand
  bool filters_are_small;  // and the bias
};

template <class T>
struct ConvBackward : ConvCall<T> {
  const T* grad_output;
  Strides4 grad_output_at;
  const uint8_t* codes;
  Strides4 codes_at;
  bool needs_weight, needs_bias;
  T* grad_input;  // or null
  Strides4 grad_input_at;
  const acc_t<T>* filters;  // rearranged by a kernel of its own, for grad_input
  bool by_tiles;            // in Winograd's form, on patches of 6 x 6
};

}  // namespace fastnet
