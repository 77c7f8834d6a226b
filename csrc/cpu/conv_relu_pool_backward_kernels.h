// The backward loops of conv_relu_pool, compiled once per instruction set by foreach_isa.h.
//
// Both gradients are sums over live windows of a gradient times a patch, so both are calculated
// from lists of (where the patch stands, gradient), dead windows left out:
//   grad_weight[k][c] = Σ over windows of g[k] · the input's patch at the window's winner
//   grad_input at a winner's patch += Σ over k of g[k] · weight[k]
// A patch has kernel x kernel positions and some channels, which stand innermost:
//   blocks  [C / channels][...][positions][channels]
// with as many channels to a block as a vector has lanes, or all where that is fewer; positions in
// a row of the patch are then side by side, and `vectors` vectors hold them.

// In the order in which they stand on each other.
// clang-format off
#include "conv_relu_pool_patches.h"
#include "conv_relu_pool_windows.h"
#include "conv_relu_pool_tiles.h"
#include "conv_relu_pool_few_channels_backward_kernels.h"
#include "conv_relu_pool_tiles_backward_kernels.h"
#include "conv_relu_pool_lists.h"
// clang-format on

template <class T>
int64_t backward_scratch(const ConvBackward<T>& call) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    if (call.by_tiles) return TilesBackwardPlan<T>(call).end;
  }
  const int64_t lists = BackwardPlan<T>(call).end, few_channels = few_channels_scratch(call);
  return lists < few_channels ? few_channels : lists;
}

// Elements of grad_weight as it is summed, [k][block][r][vectors · lanes], and of the filters as
// grad_input takes them, [block][k][r][vectors · lanes] or, of tiles, [block][points][k][lanes].
template <class T>
int64_t patch_elements(const ConvBackward<T>& call) {
  const BackwardPlan<T> plan(call);
  return call.K * plan.blocks * plan.patch;
}
template <class T>
int64_t filter_elements(const ConvBackward<T>& call) {
  if (!call.by_tiles) return patch_elements(call);
  return kSidePoints * call.K * BackwardPlan<T>(call).blocks * kLanes<T>;
}

template <class A>
static bool are_finite(const A* values, int64_t count) {
  auto is_finite = Vec<A>{} == Vec<A>{};
  int64_t i = 0;
  constexpr int kStep = kVectorBytes / sizeof(A);
  for (; i + kStep <= count; i += kStep) {
    const Vec<A> value = load(values + i);
    is_finite &= value - value == Vec<A>{};
  }
  bool all = reduce_max<A>(is_finite ? Vec<A>{} : splat(A(1))) == 0;
  for (; i < count; ++i) all &= values[i] - values[i] == 0;
  return all;
}

// ---------------------------------------------------------------------------------------------
// Rearranging

// Whether what no window touches, to the right and below, is finite.
template <class T>
static bool is_rest_finite(const ConvBackward<T>& call, const BackwardPlan<T>& plan, int64_t n) {
  const int64_t touched_y = plan.height - call.pad_y, touched_x = plan.width - call.pad_x;
  bool is_finite = true;
  for (int64_t y = 0; y < call.H; ++y) {
    for (int64_t x = y < touched_y && touched_x > 0 ? touched_x : 0; x < call.W; ++x) {
      for (int64_t c = 0; c < call.C; ++c) {
        const acc_t<T> value = widen(call.input[n * call.input_at.n + c * call.input_at.c +
                                                y * call.input_at.y + x * call.input_at.x]);
        is_finite &= value - value == 0;
      }
    }
  }
  return is_finite;
}

// filters[block][k][r][s][channel] of blocks [begin, end), or as tiles take them. Returns whether
// all are finite, or small.
template <class T>
bool arrange_backward_filters_kernel(const ConvBackward<T>& call, const T* weight,
                                     Strides4 weight_at, acc_t<T>* filters, int64_t begin,
                                     int64_t end) {
  const BackwardPlan<T> plan(call);
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    Magnitude met = Magnitude::small;
    for (int64_t block = begin; block < end && call.by_tiles; ++block) {
      const int64_t c = block * kLanes<T>;
      met = larger(met, transform_filters<3>(weight + c * weight_at.c, least(kLanes<T>, call.C - c),
                                             weight_at.c, call.K, weight_at.n, weight_at,
                                             filters + block * kSidePoints * call.K * kLanes<T>));
    }
    if (call.by_tiles) return met == Magnitude::small;
  }
  const int64_t size = call.K * plan.patch;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t c_first = block * plan.channels;
    const int64_t channels = call.C - c_first < plan.channels ? call.C - c_first : plan.channels;
    acc_t<T>* const to = filters + block * size;
    __builtin_memset(to, 0, static_cast<size_t>(size) * sizeof(acc_t<T>));
    for (int64_t k = 0; k < call.K; ++k) {
      for (int64_t c = 0; c < channels; ++c) {
        const T* from = weight + k * weight_at.n + (c_first + c) * weight_at.c;
        for (int64_t r = 0; r < call.kernel; ++r) {
          for (int64_t s = 0; s < call.kernel; ++s) {
            to[k * plan.patch + r * plan.patch_row + s * plan.channels + c] =
                widen(from[r * weight_at.y + s * weight_at.x]);
          }
        }
      }
    }
  }
  return are_finite(filters + begin * size, (end - begin) * size);
}

template <class T>
int64_t channel_blocks(const ConvBackward<T>& call) {
  return BackwardPlan<T>(call).blocks;
}

// grad_weight and grad_bias of filters [begin, end) out of the sums of several shares, which are
// added up in the first one's.
template <class T>
void collect_weight_kernel(const ConvBackward<T>& call, acc_t<T>* sums, acc_t<T>* bias_sums,
                           int64_t shares, T* grad_weight, Strides4 grad_weight_at, T* grad_bias,
                           int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const BackwardPlan<T> plan(call);
  const int64_t per_filter = plan.blocks * plan.patch, size = call.K * per_filter;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t share = 1; share < shares; ++share) {
      bias_sums[k] += bias_sums[share * call.K + k];
      if (!grad_weight) continue;
      A* const to = sums + k * per_filter;
      const A* const from = to + share * size;
      for (int64_t i = 0; i < per_filter; i += kLanes<T>)
        store(to + i, load(to + i) + load(from + i));
    }
    if (grad_bias) narrow(bias_sums[k], grad_bias + k);
    if (!grad_weight) continue;
    for (int64_t c = 0; c < call.C; ++c) {
      const int64_t block = c / plan.channels;
      const A* from = sums + (k * plan.blocks + block) * plan.patch + c % plan.channels;
      for (int64_t r = 0; r < call.kernel; ++r) {
        for (int64_t s = 0; s < call.kernel; ++s) {
          narrow(from[r * plan.patch_row + s * plan.channels],
                 grad_weight + k * grad_weight_at.n + c * grad_weight_at.c + r * grad_weight_at.y +
                     s * grad_weight_at.x);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// grad_weight and grad_bias of filters [k_begin, k_end) from images [n_begin, n_end), added to sums
// and bias_sums. Returns false where the input or a gradient is not finite: an infinity times the
// gradient of a dead window would be NaN, which this leaves out.

template <class T>
bool conv_backward_weight_kernel(const ConvBackward<T>& call, int64_t n_begin, int64_t n_end,
                                 int64_t k_begin, int64_t k_end, acc_t<T>* sums,
                                 acc_t<T>* bias_sums, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const BackwardPlan<T> plan(call);
  if constexpr (sizeof(A) == sizeof(float)) {
    bool takes_few = has_few_channels(call);
    for (int64_t n = n_begin; takes_few && n < n_end; ++n)
      takes_few = is_rest_finite(call, plan, n);
    while (takes_few && k_begin < k_end) {
      const int64_t k = least(k_begin + kFewFilters, k_end);
      takes_few = few_channels_block(call, n_begin, n_end, k_begin, k, plan.patch, plan.patch_row,
                                     sums, bias_sums, scratch);
      if (takes_few) k_begin = k;
    }
    if (k_begin == k_end) return true;
  }
  const Accumulate<A> add =
      call.kernel == 3 ? accumulate_for<A, 3>(plan.vectors) : accumulate_for<A, 5>(plan.vectors);
  A* const input = scratch + plan.input_at;
  Entry<A>* const entries = reinterpret_cast<Entry<A>*>(scratch + plan.entries_at);
  // Where windows stand, of all strips.
  int32_t* const bases = reinterpret_cast<int32_t*>(scratch + plan.bases_at);
  const int64_t strip_windows = plan.strip_rows * call.Q;
  int32_t* base = bases;
  for (int64_t strip = 0; strip < plan.strips; ++strip) {
    for (int64_t p = 0; p < plan.strip_rows; ++p) {
      const int64_t row = strip * plan.strip_size + 2 * p * plan.row;
      for (int64_t q = 0; q < call.Q; ++q) {
        *base++ = static_cast<int32_t>(row + 2 * q * plan.channels);
      }
    }
  }
  int32_t offsets[kDead + 1] = {};
  for (int code = 0; code < kDead; ++code) {
    offsets[code] = static_cast<int32_t>((code / 2) * plan.row + (code % 2) * plan.channels);
  }
  const int64_t lanes = call.kernel * plan.channels - (plan.vectors - 1) * kLanes<T>;
  const Strides4 g_at = call.grad_output_at, codes_at = call.codes_at;
  // Windows that stand side by side are listed together, otherwise those of a row.
  const bool is_dense = g_at.x == 1 && g_at.y == call.Q && codes_at.x == 1 && codes_at.y == call.Q;
  const int64_t strips_per_image = (call.P + plan.strip_rows - 1) / plan.strip_rows;
  const int64_t strip_end = n_end * strips_per_image;
  for (int64_t first = n_begin * strips_per_image; first < strip_end; first += plan.strips) {
    const int64_t last = first + plan.strips < strip_end ? first + plan.strips : strip_end;
    if (call.needs_weight) {
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t p = strip % strips_per_image * plan.strip_rows;
        if (p == 0 && !is_rest_finite(call, plan, strip / strips_per_image)) return false;
        const int64_t p_rows = call.P - p < plan.strip_rows ? call.P - p : plan.strip_rows;
        const int64_t rows = 2 * p_rows + call.kernel - 1;
        A* const to = input + (strip - first) * plan.strip_size;
        fill_blocks(call, strip / strips_per_image, 2 * p, rows, plan.width, plan.channels,
                    plan.strips * plan.strip_size, to);
        for (int64_t block = 0; block < plan.blocks; ++block) {
          if (!are_finite(to + block * plan.strips * plan.strip_size, rows * plan.row)) {
            return false;
          }
        }
      }
    }
    for (int64_t k = k_begin; k < k_end; ++k) {
      Entry<A>* end = entries;
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t n = strip / strips_per_image;
        const int64_t p_first = strip % strips_per_image * plan.strip_rows;
        const int64_t p_stop = least(p_first + plan.strip_rows, call.P);
        const int64_t rows_at_once = is_dense ? p_stop - p_first : 1;
        for (int64_t p = p_first; p < p_stop; p += rows_at_once) {
          const T* g = call.grad_output + n * g_at.n + k * g_at.c + p * g_at.y;
          const uint8_t* codes = call.codes + n * codes_at.n + k * codes_at.c + p * codes_at.y;
          const int32_t* base = bases + (strip - first) * strip_windows + (p - p_first) * call.Q;
          const int64_t windows = rows_at_once * call.Q;
          if (g_at.x == 1 && codes_at.x == 1) {
            end = list_windows(g, 1, codes, 1, base, windows, offsets, end);
          } else {
            end = list_windows(g, g_at.x, codes, codes_at.x, base, windows, offsets, end);
          }
        }
      }
      const int64_t count = end - entries;
      const A sum = sum_of_gradients(entries, count);
      bias_sums[k] += sum;
      if (!call.needs_weight) continue;
      if (!(sum - sum == 0)) return false;  // an infinite one times the padding would be NaN
      for (int64_t block = 0; block < plan.blocks; ++block) {
        add(entries, count, input + block * plan.strips * plan.strip_size, plan.row,
            sums + (k * plan.blocks + block) * plan.patch, plan.patch_row, lanes);
      }
    }
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// grad_input of image n, channels in blocks [block_begin, block_end), out of its blocks and its
// padding. What no window touches has no gradient.

template <class T>
static void write_image(const ConvBackward<T>& call, int64_t n, int64_t block_begin,
                        int64_t block_end, const acc_t<T>* image, int64_t next_block,
                        int64_t next_row, int64_t next_column) {
  const BackwardPlan<T> plan(call);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t c_first = block * plan.channels;
    const int64_t channels = call.C - c_first < plan.channels ? call.C - c_first : plan.channels;
    for (int64_t y = 0; y < call.H; ++y) {
      const int64_t from_y = y + call.pad_y;
      T* to = call.grad_input + n * call.grad_input_at.n + c_first * call.grad_input_at.c +
              y * call.grad_input_at.y;
      const int64_t touched = from_y < plan.height ? plan.width - call.pad_x : 0;
      const int64_t columns = touched < 0 ? 0 : touched < call.W ? touched : call.W;
      const acc_t<T>* from =
          image + block * next_block + from_y * next_row + call.pad_x * next_column;
      const int64_t x_stride = call.grad_input_at.x, c_stride = call.grad_input_at.c;
      if (x_stride == 1) {
        transpose(from, next_column, to, c_stride, columns, channels);
      } else {
        for (int64_t x = 0; x < columns; ++x) {
          for (int64_t c = 0; c < channels; ++c) {
            narrow(from[x * next_column + c], to + c * c_stride + x * x_stride);
          }
        }
      }
      for (int64_t x = columns; x < call.W; ++x) {
        for (int64_t c = 0; c < channels; ++c)
          narrow(acc_t<T>(0), to + c * c_stride + x * x_stride);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// grad_input of images [n_begin, n_end), channels in blocks [block_begin, block_end)

template <class T>
void conv_backward_input_kernel(const ConvBackward<T>& call, int64_t n_begin, int64_t n_end,
                                int64_t block_begin, int64_t block_end, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const BackwardPlan<T> plan(call);
  const Accumulate<A> add =
      call.kernel == 3 ? accumulate_for<A, 3>(plan.vectors) : accumulate_for<A, 5>(plan.vectors);
  Entry<A>* const entries = reinterpret_cast<Entry<A>*>(scratch + plan.entries_at);
  A* const gradients = scratch + plan.window_gradients_at;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + plan.window_codes_at);
  A* const image = scratch + plan.image_at;
  const int64_t image_size = plan.height * plan.row, all = call.P * call.Q;
  const int64_t lanes = call.kernel * plan.channels - (plan.vectors - 1) * kLanes<T>;
  for (int64_t n = n_begin; n < n_end; ++n) {
    __builtin_memset(image + block_begin * image_size, 0,
                     static_cast<size_t>((block_end - block_begin) * image_size) * sizeof(A));
    for (int64_t k_first = 0; k_first < call.K; k_first += plan.filters) {
      const int64_t K = call.K - k_first < plan.filters ? call.K - k_first : plan.filters;
      for (int64_t first = 0; first < all; first += plan.windows) {
        const int64_t last = first + plan.windows < all ? first + plan.windows : all;
        gather_windows(call, n * all + first, n * all + last, k_first, k_first + K,
                       call.grad_output, call.grad_output_at, gradients, K);
        gather_windows(call, n * all + first, n * all + last, k_first, k_first + K, call.codes,
                       call.codes_at, codes, K);
        constexpr int kCodes = kDead;  // of the living, each of which has a list in every window
        int32_t counts[kMaxWindows][kCodes];
        for (int64_t window = 0; window < last - first; ++window) {
          for (int code = 0; code < kCodes; ++code) {
            counts[window][code] = static_cast<int32_t>(list_filters(
                gradients + window * K, codes + window * K, static_cast<uint8_t>(code), K,
                static_cast<int32_t>(plan.patch), entries + (window * kCodes + code) * K));
          }
        }
        for (int64_t block = block_begin; block < block_end; ++block) {
          const A* const filters = call.filters + (block * call.K + k_first) * plan.patch;
          for (int64_t window = first; window < last; ++window) {
            const int64_t p = window / call.Q, q = window % call.Q;
            for (int code = 0; code < kCodes; ++code) {
              const int32_t count = counts[window - first][code];
              if (count == 0) continue;
              const int64_t y = 2 * p + code / 2, x = 2 * q + code % 2;
              add(entries + ((window - first) * kCodes + code) * K, count, filters, plan.patch_row,
                  image + block * image_size + y * plan.row + x * plan.channels, plan.row, lanes);
            }
          }
        }
      }
    }
    write_image(call, n, block_begin, block_end, image, image_size, plan.row, plan.channels);
  }
}

// All gradients by tiles, of images [n_begin, n_end): of the weight and bias for filters
// [k_begin, k_end), and of the input for channels in blocks [block_begin, block_end). Returns false
// where an operand is not small.
template <class T>
bool conv_backward_tiles_kernel(const ConvBackward<T>& call, int64_t n_begin, int64_t n_end,
                                int64_t k_begin, int64_t k_end, int64_t block_begin,
                                int64_t block_end, acc_t<T>* sums, acc_t<T>* bias_sums,
                                acc_t<T>* scratch) {
  if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
    const BackwardPlan<T> plan(call);
    const TilesBackwardPlan<T> tiles(call);
    for (int64_t n = n_begin; n < n_end && call.needs_weight; ++n) {
      if (!is_rest_finite(call, plan, n)) return false;
    }
    return tiles_backward(call, n_begin, n_end, k_begin, k_end, block_begin, block_end,
                          plan.channels, plan.patch, plan.patch_row, sums, bias_sums, scratch,
                          [&](int64_t n) {
                            write_image(call, n, block_begin, block_end, scratch + tiles.image_at,
                                        tiles.image_block, tiles.image_row, kLanes<T>);
                          });
  }
  return false;
}

// ---------------------------------------------------------------------------------------------
// grad_z, for a library's backward: rows [begin, end) of the convolution's output, counted through
// images and channels.

template <class T>
void expand_kernel(const T* grad_output, Strides4 grad_output_at, const uint8_t* codes,
                   Strides4 codes_at, T* grad_z, Strides4 z_at, int64_t K, int64_t P, int64_t Q,
                   int64_t z_height, int64_t z_width, int64_t begin, int64_t end) {
  const T zero = {};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / z_height, y = row % z_height, p = y / 2;
    const int64_t z_row = n * z_at.n + y * z_at.y;
    const int64_t g_row = n * grad_output_at.n + p * grad_output_at.y;
    const int64_t code_row = n * codes_at.n + p * codes_at.y;
    const auto value = [&](int64_t k, int64_t x) {
      const int64_t q = x / 2;
      if (p >= P || q >= Q) return zero;
      const uint8_t code = codes[code_row + k * codes_at.c + q * codes_at.x];
      return code == 2 * (y % 2) + x % 2
                 ? grad_output[g_row + k * grad_output_at.c + q * grad_output_at.x]
                 : zero;
    };
    if (z_at.c == 1) {
      for (int64_t x = 0; x < z_width; ++x) {
        for (int64_t k = 0; k < K; ++k) grad_z[z_row + k + x * z_at.x] = value(k, x);
      }
    } else {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t x = 0; x < z_width; ++x) {
          grad_z[z_row + k * z_at.c + x * z_at.x] = value(k, x);
        }
      }
    }
  }
}
