// grad_weight and grad_bias of 3 x 3 filters of very few channels, in Winograd's form. Included by
// conv_relu_pool_backward_kernels.h, in which the lists of more channels are.
//
// A window's gradient has 2 x 2 positions, of which one is alive; with its patch of 4 x 4 it makes
// 3 x 3 terms of grad_weight:
//   grad_weight[k][c] = Aᵀ (Σ over windows of U ⊙ V) A    U = G g Gᵀ of the gradient's window g,
//                                                        V = Bᵀ d B of the patch d
//
//       |  1   0 |         | 1  1  1  0 |
//   G = |  ½   ½ |    Aᵀ = | 0  1 -1  0 |    Bᵀ as in conv_relu_pool_patches.h
//       |  ½  -½ |         | 0  1  1 -1 |
//       |  0   1 |
//
// The sum is taken before Aᵀ, which so is applied only once; the halves are left to it, too. As one
// position of g is alive, U then consists of its gradient, with either sign, and of zeros: 16
// multiplications and no sums. A list of so few channels would take 9 of them, but also its time to
// be made, and vectors that are not full.
//
//   patches   [C][points][windows]    V of some rows of windows, one window to a lane
//   gradients [filters][windows]      0 where the window is dead
//   codes     [filters][windows]      as integers
//   sums      [filters][C][points][lanes]

inline constexpr int64_t kMostFewChannels = 3;
// Windows that are at hand together, and whose distance of one point to the next leaves room for a
// vector beyond them, in an odd number of lines.
inline constexpr int64_t kFewWindows = 256, kFewPlane = kFewWindows + 16;
inline constexpr int64_t kFewFilters = 32;
// A gradient from which on a product might overflow in this form alone.
inline constexpr float kLargestGradient = 1e30f;

// Below them a row leaves most of a vector idle.
inline constexpr int64_t kFewestColumns = 4;

// Whether the kernels below are quicker than lists: without vectors of 32 bytes they are not.
template <class T>
static bool has_few_channels(const ConvBackward<T>& call) {
  return kVectorBytes > 16 && sizeof(acc_t<T>) == sizeof(float) && call.needs_weight &&
         call.kernel == 3 && call.C <= kMostFewChannels && call.Q >= kFewestColumns &&
         call.Q <= kFewWindows;
}

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct FewChannelsPlan {
  int64_t rows;     // of windows at a time, counted through images
  int64_t filters;  // whose gradients are at hand: in the cache along with one channel's patches
  int64_t half;     // the even columns of a row of a strip, or the odd ones
  int64_t strip_plane;  // from one channel of a strip to the next
  int64_t strip_at, patches_at, gradients_at, codes_at, bytes_at, sums_at, end;

  explicit FewChannelsPlan(const ConvBackward<T>& call) {
    constexpr int64_t kLine = 64 / sizeof(float), kSlack = 4 * kLine;
    rows = kFewWindows / call.Q;
    if (rows > call.P) rows -= rows % call.P;  // whole images: what is read stands in one piece
    filters = call.C == 1 ? 4 : kFewFilters;
    half = call.Q + 1;
    strip_plane = round_up((2 * least(rows, call.P) + 2) * 2 * half, kLine);
    strip_at = 0;
    patches_at = strip_at + call.C * strip_plane + kSlack;
    gradients_at = patches_at + call.C * kPoints * kFewPlane;
    codes_at = gradients_at + filters * kFewPlane;
    bytes_at = codes_at + filters * kFewPlane;
    sums_at = bytes_at + filters * kFewPlane / static_cast<int64_t>(sizeof(float));
    end = sums_at + kFewFilters * call.C * kPoints * kLanes<float>;
  }
};

template <class T>
int64_t few_channels_scratch(const ConvBackward<T>& call) {
  return has_few_channels(call) ? FewChannelsPlan<T>(call).end : 0;
}

// Where the gradients to be taken next lie: an element of so many bytes a window, `next` bytes from
// one filter to the next. They are asked for while sums are taken; by itself the processor sees too
// late where a filter's few windows go on, and waited for them a tenth of the time.
struct Ahead {
  const char* first;
  int64_t element, next;
};

// sums[filter][c][point] += Σ over windows of U ⊙ V, in kRows rows of points from the first one on.
template <int kFirst, int kRows, int kChannels, int kFilters>
static void add_windows(const float* gradients, const int32_t* codes, const float* patches,
                        int64_t windows, float* sums, const Ahead& ahead) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  constexpr int kStep = kLanes<float>;
  V sum[kFilters][kChannels][kRows][4];
  const auto sum_at = [&](int f, int c, int r, int s) __attribute__((always_inline)) {
    return sums + (((f * kChannels + c) * 4 + kFirst + r) * 4 + s) * kStep;
  };
  FASTNET_UNROLL for (int f = 0; f < kFilters; ++f) {
    FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
      FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
        FASTNET_UNROLL for (int s = 0; s < 4; ++s) sum[f][c][r][s] = load(sum_at(f, c, r, s));
      }
    }
  }
  for (int64_t i = 0; i < windows; i += kStep) {
    I g[kFilters], code[kFilters];
    FASTNET_UNROLL for (int f = 0; f < kFilters; ++f) {
      if constexpr (kFirst == 0) {
        __builtin_prefetch(ahead.first + f * ahead.next + i * ahead.element);
      }
      g[f] = (I)load(gradients + f * kFewPlane + i);
      code[f] = load(codes + f * kFewPlane + i);
    }
    FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
      const int row = kFirst + r;
      // U: the gradient where the row and the column have it, with the sign that the differences in
      // G give it in the lower row and in the odd column.
      I by_row[kFilters], sign[kFilters];
      FASTNET_UNROLL for (int f = 0; f < kFilters; ++f) {
        sign[f] = code[f] << 31;
        by_row[f] = row == 2 ? g[f] ^ (code[f] >> 1 << 31) : g[f];
        if (!kHasMasks && (row == 0 || row == 3)) {
          const I is_lower = code[f] << 30 >> 31;
          by_row[f] &= row == 0 ? ~is_lower : is_lower;
        }
        if (!kHasMasks) by_row[f] = in_register(by_row[f]);
      }
      FASTNET_UNROLL for (int s = 0; s < 4; ++s) {
        I u[kFilters], where[kFilters];
        FASTNET_UNROLL for (int f = 0; f < kFilters; ++f) {
          u[f] = s == 2 ? by_row[f] ^ sign[f] : by_row[f];
          if (kHasMasks && (row == 0 || row == 3)) {
            const int upper = row == 0 ? 0 : 2;
            where[f] = s == 0     ? code[f] == upper
                       : s == 3   ? code[f] == upper + 1
                       : row == 0 ? code[f] < 2
                                  : code[f] >= 2;
          } else if (kHasMasks) {
            where[f] = s == 0 ? sign[f] == 0 : s == 3 ? sign[f] < 0 : I{} == 0;
          } else {
            if (s == 0) u[f] &= ~(sign[f] >> 31);
            if (s == 3) u[f] &= sign[f] >> 31;
            u[f] = in_register(u[f]);
          }
        }
        FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
          const V v = load(patches + (c * kPoints + row * 4 + s) * kFewPlane + i);
          FASTNET_UNROLL for (int f = 0; f < kFilters; ++f) {
            const V more = sum[f][c][r][s] + (V)u[f] * v;
            if constexpr (kHasMasks) {
              sum[f][c][r][s] = where[f] ? more : sum[f][c][r][s];
            } else {
              sum[f][c][r][s] = more;
            }
          }
        }
      }
    }
  }
  FASTNET_UNROLL for (int f = 0; f < kFilters; ++f) {
    FASTNET_UNROLL for (int c = 0; c < kChannels; ++c) {
      FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
        FASTNET_UNROLL for (int s = 0; s < 4; ++s) store(sum_at(f, c, r, s), sum[f][c][r][s]);
      }
    }
  }
}

// The same of all points. A row of them, or two, go past all filters, so that their patches stay in
// the first-level cache; as many sums are taken at a time as there are registers for.
template <int kChannels, int kFirst = 0>
static void add_all_windows(const float* gradients, const int32_t* codes, const float* patches,
                            int64_t windows, int64_t filters, float* sums, const Ahead& ahead) {
  constexpr int kRows = kRegisters == 32 || kChannels == 1 ? 2 : 1;
  constexpr int kFilters = kRegisters == 32 && kChannels == 1 ? 2 : 1;
  constexpr int64_t kSums = kChannels * kPoints * kLanes<float>;
  const auto add = [&](auto add_some, int64_t k) {
    add_some(gradients + k * kFewPlane, codes + k * kFewPlane, patches, windows, sums + k * kSums,
             Ahead{ahead.first + k * ahead.next, ahead.element, ahead.next});
  };
  int64_t k = 0;
  for (; k + kFilters <= filters; k += kFilters) {
    add(add_windows<kFirst, kRows, kChannels, kFilters>, k);
  }
  for (; k < filters; ++k) add(add_windows<kFirst, kRows, kChannels, 1>, k);
  if constexpr (kFirst + kRows < 4) {
    add_all_windows<kChannels, kFirst + kRows>(gradients, codes, patches, windows, filters, sums,
                                               ahead);
  }
}

// Gradients, of dead windows 0, and codes of `count` neighbouring windows. Adds the gradients to
// `bias` and raises `largest` to them.
template <class From>
static void take_run(const From* gradients, const uint8_t* codes, int64_t count,
                     float* gradients_to, int32_t* codes_to, Vec<float>* bias,
                     Vec<int32_t>* largest) {
  constexpr int kStep = kLanes<float>;
  Vec<float> sum = *bias;
  Vec<int32_t> most = *largest;
  // Of a vector's lanes the first ones may have been taken already.
  const auto take = [&](int64_t i, Vec<int32_t> is_new) __attribute__((always_inline)) {
    const Vec<int32_t> code = load_bytes(codes + i);
    const Vec<float> alive = code < kDead ? load(gradients + i) : Vec<float>{};
    store(gradients_to + i, alive);
    store(codes_to + i, code);
    sum += is_new ? alive : Vec<float>{};
    raise_magnitude(&most, alive);
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) take(i, Vec<int32_t>{} == Vec<int32_t>{});
  if (i < count && count >= kStep) {
    const int32_t taken = static_cast<int32_t>(i - (count - kStep));
    take(count - kStep, __builtin_convertvector(lane_index<float>(), Vec<int32_t>) >= taken);
    i = count;
  }
  Vec<float> rest = {};
  for (int lane = 0; i < count; ++i, ++lane) {
    rest[lane] = codes[i] < kDead ? widen(gradients[i]) : 0.0f;
    gradients_to[i] = rest[lane];
    codes_to[i] = codes[i];
  }
  raise_magnitude(&most, rest);
  *bias = sum + rest;
  *largest = most;
}

// The same of `filters` filters from k on and rows [first, last) of windows of image n, kFewPlane
// from one filter to the next. `bytes` is memory for as many codes.
template <class T>
static void take_gradients(const ConvBackward<T>& call, int64_t n, int64_t first, int64_t last,
                           int64_t k, int64_t filters, float* gradients, int32_t* codes,
                           Vec<float>* bias, Vec<int32_t>* largest, uint8_t* bytes) {
  const Strides4 &g_at = call.grad_output_at, &c_at = call.codes_at;
  const T* const g = call.grad_output + n * g_at.n + first * g_at.y + k * g_at.c;
  const uint8_t* const c = call.codes + n * c_at.n + first * c_at.y + k * c_at.c;
  const int64_t rows = last - first, count = rows * call.Q;
  const auto take = [&](const auto* from, int64_t next, const uint8_t* codes_from,
                        int64_t next_code) {
    for (int64_t i = 0; i < filters; ++i) {
      take_run(from + i * next, codes_from + i * next_code, count, gradients + i * kFewPlane,
               codes + i * kFewPlane, bias + i, largest);
    }
  };
  if (g_at.x == 1 && g_at.y == call.Q && c_at.x == 1 && c_at.y == call.Q) {
    take(g, g_at.c, c, c_at.c);
    return;
  }
  // Otherwise a plane of each filter's is made first.
  for (int64_t p = 0; p < rows; ++p) {
    const int64_t row = p * call.Q;
    if (g_at.c == 1) {  // channels_last
      transpose(g + p * g_at.y, g_at.x, gradients + row, kFewPlane, call.Q, filters);
    } else {
      for (int64_t i = 0; i < filters; ++i) {
        for (int64_t q = 0; q < call.Q; ++q) {
          gradients[i * kFewPlane + row + q] = widen(g[i * g_at.c + p * g_at.y + q * g_at.x]);
        }
      }
    }
    if (c_at.c == 1) {
      transpose(c + p * c_at.y, c_at.x, bytes + row, kFewPlane, call.Q, filters);
    } else {
      for (int64_t i = 0; i < filters; ++i) {
        for (int64_t q = 0; q < call.Q; ++q) {
          bytes[i * kFewPlane + row + q] = c[i * c_at.c + p * c_at.y + q * c_at.x];
        }
      }
    }
  }
  take(gradients, kFewPlane, bytes, kFewPlane);
}

// to[r][s] += Aᵀ (the sums of all lanes, with the halves of G) A
FASTNET_INLINE void finish_filter(const float* sums, float* to, int64_t to_row, int64_t to_column) {
  constexpr int kStep = kLanes<float>;
  float m[4][4], half[3][4];
  for (int r = 0; r < 4; ++r) {
    const float* const row = sums + r * 4 * kStep;
    const Vec4<float> sum = reduce_add_4<float>(load(row), load(row + kStep), load(row + 2 * kStep),
                                                load(row + 3 * kStep));
    const float by_row = r == 1 || r == 2 ? 0.5f : 1.0f;
    for (int s = 0; s < 4; ++s) m[r][s] = sum[s] * by_row * (s == 1 || s == 2 ? 0.5f : 1.0f);
  }
  for (int s = 0; s < 4; ++s) {
    half[0][s] = m[0][s] + (m[1][s] + m[2][s]);
    half[1][s] = m[1][s] - m[2][s];
    half[2][s] = (m[1][s] + m[2][s]) - m[3][s];
  }
  for (int r = 0; r < 3; ++r) {
    const float* const h = half[r];
    to[r * to_row] += h[0] + (h[1] + h[2]);
    to[r * to_row + to_column] += h[1] - h[2];
    to[r * to_row + 2 * to_column] += (h[1] + h[2]) - h[3];
  }
}

// grad_weight and grad_bias of filters [k_begin, k_end), at most kFewFilters of them, from images
// [n_begin, n_end), added to sums and bias_sums. Returns false, having added nothing, where an
// element of the input or a gradient is too large or not finite.
template <class T>
static bool few_channels_block(const ConvBackward<T>& call, int64_t n_begin, int64_t n_end,
                               int64_t k_begin, int64_t k_end, int64_t filter, int64_t to_row,
                               float* sums, float* bias_sums, float* scratch) {
  const FewChannelsPlan<T> plan(call);
  const int64_t filters = k_end - k_begin, row_end = n_end * call.P;
  float* const strip = scratch + plan.strip_at;
  float* const patches = scratch + plan.patches_at;
  float* const gradients = scratch + plan.gradients_at;
  int32_t* const codes = reinterpret_cast<int32_t*>(scratch + plan.codes_at);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(scratch + plan.bytes_at);
  float* const point_sums = scratch + plan.sums_at;
  constexpr int64_t kSums = kPoints * kLanes<float>;
  const auto add = call.C == 1   ? add_all_windows<1>
                   : call.C == 2 ? add_all_windows<2>
                                 : add_all_windows<3>;
  const auto clear = [&](int64_t begin, int64_t end) {
    __builtin_memset(scratch + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
  };
  // Also the patches: what is multiplied by a dead window's zero must be a number.
  clear(plan.strip_at, plan.gradients_at);
  clear(plan.sums_at, plan.end);
  Vec<float> bias[kFewFilters] = {};
  Vec<int32_t> largest = {};
  for (int64_t first = n_begin * call.P; first < row_end; first += plan.rows) {
    const int64_t last = least(first + plan.rows, row_end);
    const int64_t windows = (last - first) * call.Q, all = round_up(windows, kLanes<float>);
    for (int64_t row = first; row < last;) {
      const int64_t n = row / call.P, p = row % call.P, stop = least(last, (n + 1) * call.P);
      if (!fill_strip(call, plan.half, plan.strip_plane, n, 2 * p, 2 * (stop - row) + 2, strip)) {
        return false;
      }
      for (int64_t c = 0; c < call.C; ++c) {
        for (int64_t y = row; y < stop; ++y) {
          // What is written beyond the end of the row, the next row writes over.
          const float* const from = strip + c * plan.strip_plane + (y - row) * 4 * plan.half;
          float* const to = patches + c * kPoints * kFewPlane + (y - first) * call.Q;
          transform_row<kFewPlane>(from, plan.half, to, call.Q);
        }
      }
      row = stop;
    }
    for (int64_t k = 0; k < filters; k += plan.filters) {
      const int64_t count = least(plan.filters, filters - k);
      for (int64_t row = first; row < last;) {
        const int64_t n = row / call.P, p = row % call.P, stop = least(last, (n + 1) * call.P);
        const int64_t at = (row - first) * call.Q;
        take_gradients(call, n, p, p + (stop - row), k_begin + k, count, gradients + at, codes + at,
                       bias + k, &largest, bytes);
        row = stop;
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t window = windows; window < all; ++window) {
          gradients[i * kFewPlane + window] = 0;
          codes[i * kFewPlane + window] = kDead;
        }
      }
      const Strides4& at = call.grad_output_at;
      const T* const next = call.grad_output + first / call.P * at.n + first % call.P * at.y +
                            (k_begin + k + plan.filters) * at.c;
      constexpr int64_t kSize = sizeof(T);
      add(gradients, codes, patches, all, count, point_sums + k * call.C * kSums,
          {reinterpret_cast<const char*>(next), kSize, at.c * kSize});
    }
  }
  if (!is_below(largest, kLargestGradient)) return false;
  for (int64_t k = 0; k < filters; ++k) {
    bias_sums[k_begin + k] += reduce_add<float>(bias[k]);
    for (int64_t c = 0; c < call.C; ++c) {
      finish_filter(point_sums + (k * call.C + c) * kSums, sums + (k_begin + k) * filter + c,
                    to_row, call.C);
    }
  }
  return true;
}
