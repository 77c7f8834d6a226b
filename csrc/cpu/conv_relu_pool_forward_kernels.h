// The forward loops of conv_relu_pool, compiled once per instruction set by foreach_isa.h.
//
// A tile is what one pooled output needs: a patch of kernel + 1 by kernel + 1 of the padded input,
// of every channel. Tiles are counted through images, rows and columns, and calculated in blocks,
// whose vectors have one tile to a lane: no lane is idle where a row ends.
//
//   strip   [C][rows][width]       some rows of a padded image
//   patches [points][C][tiles]     the tiles of a block, by position in the patch, or transformed
//   pooled  [K][tiles]             the block's results, then written in the output's layout

// Winograd's F(2x2, 3x3): the four convolution outputs of a tile, that is one pooling window, by 16
// multiplications instead of 36:
//   Y = Aᵀ (Σ_c U ⊙ V) A    U = G g Gᵀ of the filter g, V = Bᵀ d B of the patch d
//
//        | 1  0 -1  0 |        |  1   0   0 |         | 1  1  1  0 |
//   Bᵀ = | 0  1  1  0 |    G = | ½   ½   ½ |    Aᵀ = | 0  1 -1 -1 |
//        | 0 -1  1  0 |        | ½  -½   ½ |
//        | 0  1  0 -1 |        |  0   0   1 |
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015.
inline constexpr int kPoints = 16;

// Above this the sums that Winograd's transforms make could overflow where the convolution itself
// does not; NaN and infinity are above it, too.
inline constexpr float kLargest = 1e15f;

inline constexpr int kProductFilters = 4, kProductVectors = 3;
inline constexpr int kDirectFilters = kRegisters == 32 ? 6 : 3;

FASTNET_INLINE int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}
FASTNET_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// The direct form's filters stand in groups of kDirectFilters or one less.
struct FilterGroups {
  int64_t K, count;
  explicit FilterGroups(int64_t K) : K(K), count((K + kDirectFilters - 1) / kDirectFilters) {}
  int64_t begin(int64_t group) const { return group * K / count; }
};

// ---------------------------------------------------------------------------------------------
// Filters, rearranged

template <class T>
int64_t filter_count(const ConvForward<T>& call) {
  return call.by_winograd ? kPoints * round_up(call.K, kProductFilters) * call.C
                          : call.K * call.C * call.kernel * call.kernel;
}

// Filters are shared out in parts, of which the first filter is:
template <class T>
int64_t filter_parts(const ConvForward<T>& call) {
  return call.by_winograd ? round_up(call.K, kProductFilters) / kProductFilters
                          : FilterGroups(call.K).count;
}
template <class T>
static int64_t part_begin(const ConvForward<T>& call, int64_t part) {
  return call.by_winograd ? least(call.K, part * kProductFilters)
                          : FilterGroups(call.K).begin(part);
}

// filters[point][k / 4][c][k % 4] = (G g Gᵀ)[point], of filters that there are not 0.
// Returns whether all of them are small enough.
template <class T>
static bool transform_filters(const ConvForward<T>& call, int64_t part) {
  using V = Vec4<float>;
  const int64_t C = call.C, plane = round_up(call.K, kProductFilters) * C;
  const int64_t first = part_begin(call, part), count = part_begin(call, part + 1) - first;
  float largest = 0;
  bool is_number = true;
  for (int64_t c = 0; c < C; ++c) {
    V g[3][3] = {};
    for (int64_t k = 0; k < count; ++k) {
      const T* from = call.weight + (first + k) * call.weight_at.n + c * call.weight_at.c;
      for (int r = 0; r < 3; ++r) {
        for (int s = 0; s < 3; ++s) {
          const float value = widen(from[r * call.weight_at.y + s * call.weight_at.x]);
          g[r][s][k] = value;
          const float size = value < 0 ? -value : value;
          largest = largest < size ? size : largest;
          is_number &= value == value;
        }
      }
    }
    V half[4][3];
    for (int s = 0; s < 3; ++s) {
      const V outer = (g[0][s] + g[2][s]) * 0.5f, inner = g[1][s] * 0.5f;
      half[0][s] = g[0][s];
      half[1][s] = outer + inner;
      half[2][s] = outer - inner;
      half[3][s] = g[2][s];
    }
    float* to = static_cast<float*>(call.filters) + first * C + c * kProductFilters;
    for (int r = 0; r < 4; ++r) {
      const V outer = (half[r][0] + half[r][2]) * 0.5f, inner = half[r][1] * 0.5f;
      const V row[4] = {half[r][0], outer + inner, outer - inner, half[r][2]};
      for (int s = 0; s < 4; ++s) store_4(to + (r * 4 + s) * plane, row[s]);
    }
  }
  return is_number && largest < kLargest;
}

// Parts [begin, end). The direct form's: filters[group][c][r][s][k in group].
// Returns whether Winograd's form may be used on them.
template <class T>
bool arrange_filters_kernel(const ConvForward<T>& call, int64_t begin, int64_t end) {
  bool is_small = true;
  const int64_t C = call.C, kernel = call.kernel;
  for (int64_t part = begin; part < end; ++part) {
    if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
      if (call.by_winograd) {
        is_small &= transform_filters(call, part);
        continue;
      }
    }
    const int64_t k_begin = part_begin(call, part), k_end = part_begin(call, part + 1);
    acc_t<T>* to = call.filters + k_begin * C * kernel * kernel;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < kernel; ++r) {
        for (int64_t s = 0; s < kernel; ++s) {
          const T* from = call.weight + c * call.weight_at.c + r * call.weight_at.y +
                          s * call.weight_at.x;
          for (int64_t k = k_begin; k < k_end; ++k) *to++ = widen(from[k * call.weight_at.n]);
        }
      }
    }
  }
  return is_small;
}

// ---------------------------------------------------------------------------------------------
// Patches

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct ForwardPlan {
  using A = acc_t<T>;
  int64_t patch;       // height and width of a patch
  int64_t width;       // of a strip
  int64_t strip_rows;  // of tiles, in a strip
  int64_t tiles;       // in a block
  int64_t patch_row;   // from one channel of the patches to the next
  int64_t plane;       // from one point of the patches to the next
  int64_t filters;     // K, rounded up
  int64_t strip_at, patches_at, products_at, pooled_at, codes_at, end;

  explicit ForwardPlan(const ConvForward<T>& call) {
    constexpr int64_t kStripBytes = 64 * 1024, kPatchBytes = 24 * 1024;
    const int64_t C = call.C;
    patch = call.kernel + 1;
    width = 2 * call.Q + call.kernel - 1;
    const int64_t row_bytes = 2 * C * width * static_cast<int64_t>(sizeof(A));
    strip_rows = least(call.P, kStripBytes / row_bytes);
    if (strip_rows < 1) strip_rows = 1;
    const int64_t points = patch * patch;
    // The direct form goes through the patches of one vector of tiles for every group of filters.
    const bool is_wide =
        call.by_winograd || points * C * kProductVectors * kVectorBytes <= kPatchBytes;
    tiles = (is_wide ? kProductVectors : 1) * kLanes<T>;
    // Patches are written a vector at a time, past the end of a row of tiles, and read so.
    constexpr int64_t kSlack = 4 * kLanes<T>, kLine = 64 / sizeof(A);
    patch_row = tiles + kLanes<T>;
    plane = round_up(C * patch_row, kLine);
    filters = round_up(call.K, kProductFilters);
    strip_at = 0;
    patches_at =
        round_up(strip_at + C * (2 * strip_rows + call.kernel - 1) * width + kSlack, kLine);
    products_at = patches_at + points * plane;
    pooled_at = products_at + (call.by_winograd ? kPoints * filters * tiles : 0);
    codes_at = pooled_at + filters * tiles;
    end = codes_at + filters * tiles / static_cast<int64_t>(sizeof(A)) + kSlack;
  }
};

template <class T>
int64_t forward_scratch(const ConvForward<T>& call) {
  return ForwardPlan<T>(call).end;
}

// What is copied, and whether all of it is small.
template <class T>
FASTNET_INLINE bool copy_row(const T* from, int64_t stride, acc_t<T>* to, int64_t count) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  bool is_small = true;
  int64_t i = 0;
  if (stride == 1 && count >= kStep) {
    // The last vector reaches back over elements already copied.
    Vec<A> largest = {};
    auto is_number = Vec<A>{} == Vec<A>{};
    for (; i < count; i += kStep) {
      const int64_t at = i + kStep <= count ? i : count - kStep;
      const Vec<A> value = load(from + at);
      store(to + at, value);
      largest = maximum<A>(largest, value < Vec<A>{} ? -value : value);
      is_number &= value == value;
    }
    is_small = reduce_max<A>(is_number ? largest : splat(A(2) * static_cast<A>(kLargest))) <
               static_cast<A>(kLargest);
  }
  for (; i < count; ++i) {
    const A value = widen(from[i * stride]);
    to[i] = value;
    is_small &= value < static_cast<A>(kLargest) && value > -static_cast<A>(kLargest);
  }
  return is_small;
}

// Copies rows [row, row + rows) of image n, counted in the padded image.
template <class T>
static bool fill_strip(const ConvForward<T>& call, int64_t n, int64_t row, int64_t rows,
                       int64_t width, acc_t<T>* strip) {
  using A = acc_t<T>;
  bool is_small = true;
  const int64_t columns = least(call.W, width - call.pad_x);
  const int64_t left = least(call.pad_x, width);
  for (int64_t c = 0; c < call.C; ++c) {
    for (int64_t y = 0; y < rows; ++y) {
      A* to = strip + (c * rows + y) * width;
      const int64_t from_y = row + y - call.pad_y;
      if (from_y < 0 || from_y >= call.H || columns <= 0) {
        for (int64_t x = 0; x < width; ++x) to[x] = 0;
        continue;
      }
      for (int64_t x = 0; x < left; ++x) to[x] = 0;
      for (int64_t x = left + columns; x < width; ++x) to[x] = 0;
      const T* from = call.input + n * call.input_at.n + c * call.input_at.c +
                      from_y * call.input_at.y;
      // A branch on the stride, so that the compiler sees the contiguous copy by itself.
      is_small &= call.input_at.x == 1 ? copy_row<T>(from, 1, to + left, columns)
                                       : copy_row<T>(from, call.input_at.x, to + left, columns);
    }
  }
  return is_small;
}

template <class V, int... kLane>
FASTNET_INLINE void deinterleave(V a, V b, V* even, V* odd, LaneList<kLane...>) {
  *even = __builtin_shufflevector(a, b, (2 * kLane)...);
  *odd = __builtin_shufflevector(a, b, (2 * kLane + 1)...);
}

// Columns j of a patch in one row, for neighbouring tiles: row[2 · tile + j].
template <class A, int kPatch>
FASTNET_INLINE void load_columns(const A* row, Vec<A>* columns) {
  constexpr int kStep = kVectorBytes / sizeof(A);
  for (int j = 0; j < kPatch; j += 2) {
    deinterleave(load(row + j), load(row + j + kStep), columns + j, columns + j + 1,
                 typename MakeLanes<kStep>::type{});
  }
}

// V = Bᵀ d B, stored at `to`, `plane` from one point to the next.
FASTNET_INLINE void transform_patch(const float* strip, int64_t width, float* to, int64_t plane) {
  using V = Vec<float>;
  V d[4][4];
  for (int i = 0; i < 4; ++i) {
    V x[4];
    load_columns<float, 4>(strip + i * width, x);
    d[i][0] = x[0] - x[2];
    d[i][1] = x[1] + x[2];
    d[i][2] = x[2] - x[1];
    d[i][3] = x[1] - x[3];
  }
  for (int j = 0; j < 4; ++j) {
    store(to + j * plane, d[0][j] - d[2][j]);
    store(to + (4 + j) * plane, d[1][j] + d[2][j]);
    store(to + (8 + j) * plane, d[2][j] - d[1][j]);
    store(to + (12 + j) * plane, d[1][j] - d[3][j]);
  }
}

// The patches of tiles [first, last) of a block, one row of tiles at a time.
template <class T, int kKernel>
static bool gather_patches(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first,
                           int64_t last, int64_t* strip_id, acc_t<T>* scratch) {
  using A = acc_t<T>;
  constexpr int kPatch = kKernel + 1;
  A* const strip = scratch + plan.strip_at;
  bool is_small = true;
  for (int64_t tile = first; tile < last;) {
    const int64_t n = tile / (call.P * call.Q), p = tile / call.Q % call.P, q = tile % call.Q;
    // As far as the strip goes, tiles lie in rows side by side.
    const int64_t strips = (call.P + plan.strip_rows - 1) / plan.strip_rows;
    const int64_t p_first = p / plan.strip_rows * plan.strip_rows;
    const int64_t p_rows = least(plan.strip_rows, call.P - p_first);
    const int64_t rows = 2 * p_rows + kKernel - 1;
    const int64_t id = n * strips + p / plan.strip_rows;
    if (id != *strip_id) {
      is_small &= fill_strip(call, n, 2 * p_first, rows, plan.width, strip);
      *strip_id = id;
    }
    const int64_t stop = least(last, (n * call.P + p_first + p_rows) * call.Q);
    for (int64_t c = 0; c < call.C; ++c) {
      int64_t row = p - p_first, column = q;
      for (int64_t t = tile; t < stop;) {
        // What is written beyond the end of the row, the next row writes over.
        const int64_t count = least(stop - t, call.Q - column);
        const A* from = strip + (c * rows + 2 * row) * plan.width + 2 * column;
        A* to = scratch + plan.patches_at + c * plan.patch_row + (t - first);
        for (int64_t i = 0; i < count; i += kLanes<T>) {
          if constexpr (sizeof(A) == sizeof(float) && kKernel == 3) {
            if (call.by_winograd) {
              transform_patch(from + 2 * i, plan.width, to + i, plan.plane);
              continue;
            }
          }
          for (int r = 0; r < kPatch; ++r) {
            Vec<A> columns[kPatch];
            load_columns<A, kPatch>(from + r * plan.width + 2 * i, columns);
            for (int s = 0; s < kPatch; ++s) {
              store(to + i + (r * kPatch + s) * plan.plane, columns[s]);
            }
          }
        }
        t += count;
        ++row;
        column = 0;
      }
    }
    tile = stop;
  }
  return is_small;
}

// ---------------------------------------------------------------------------------------------
// Winograd's form

// products[k][tile] = Σ_c filters[c][k] · patches[c][tile], for 4 filters and kVectors vectors
template <int kVectors>
FASTNET_INLINE void product_block(const float* filters, const float* patches, int64_t C,
                                  int64_t patch_row, int64_t tiles, float* products) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  V sum[kProductFilters][kVectors] = {};
  for (int64_t c = 0; c < C; ++c) {
    V x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(patches + c * patch_row + v * kStep);
    for (int k = 0; k < kProductFilters; ++k) {
      const V w = splat(filters[c * kProductFilters + k]);
      for (int v = 0; v < kVectors; ++v) sum[k][v] += w * x[v];
    }
  }
  for (int k = 0; k < kProductFilters; ++k) {
    for (int v = 0; v < kVectors; ++v) store(products + k * tiles + v * kStep, sum[k][v]);
  }
}

template <class A>
using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// Eight codes, or as many as a vector has lanes.
template <class A>
FASTNET_INLINE void store_codes(uint8_t* to, Vec<Index<A>> codes) {
  using Bytes = typename VectorType<uint8_t, kVectorBytes / sizeof(A)>::type;
  const Bytes bytes = __builtin_convertvector(codes, Bytes);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

// Aᵀ M A, bias, ReLU and maximum for a vector of tiles of one filter.
FASTNET_INLINE void pool_products(const float* products, int64_t plane, float bias, float* pooled,
                                  uint8_t* codes) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  V half[2][4];
  for (int j = 0; j < 4; ++j) {
    const V m0 = load(products + j * plane), m1 = load(products + (4 + j) * plane);
    const V m2 = load(products + (8 + j) * plane), m3 = load(products + (12 + j) * plane);
    half[0][j] = m0 + (m1 + m2);
    half[1][j] = (m1 - m2) - m3;
  }
  V y[4];
  for (int i = 0; i < 2; ++i) {
    y[2 * i] = half[i][0] + (half[i][1] + half[i][2]);
    y[2 * i + 1] = (half[i][1] - half[i][2]) - half[i][3];
  }
  // Finite, so that > tells everything. The bias moves all four alike.
  V most = y[0];
  I code = {};
  for (int i = 1; i < 4; ++i) {
    const I wins = y[i] > most;
    most = wins ? y[i] : most;
    code = wins ? I{} + i : code;
  }
  most += bias;
  const I dead = most <= V{};
  store(pooled, dead ? V{} : most);
  store_codes<float>(codes, dead ? I{} + kDead : code);
}

template <class T>
static void winograd_block(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t vectors,
                           int64_t k_begin, int64_t k_end, float* scratch) {
  const int64_t C = call.C, tiles = plan.tiles, plane = plan.filters * tiles;
  float* const products = scratch + plan.products_at;
  for (int point = 0; point < kPoints; ++point) {
    const float* patches = scratch + plan.patches_at + point * plan.plane;
    const float* filters = call.filters + point * plan.filters * C;
    for (int64_t k = k_begin; k < k_end; k += kProductFilters) {
      float* to = products + point * plane + k * tiles;
      if (vectors == 3) {
        product_block<3>(filters + k * C, patches, C, plan.patch_row, tiles, to);
      } else if (vectors == 2) {
        product_block<2>(filters + k * C, patches, C, plan.patch_row, tiles, to);
      } else {
        product_block<1>(filters + k * C, patches, C, plan.patch_row, tiles, to);
      }
    }
  }
  float* const pooled = scratch + plan.pooled_at;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + plan.codes_at);
  for (int64_t k = k_begin; k < k_end; ++k) {
    const float bias = call.bias ? widen(call.bias[k]) : 0.0f;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = k * tiles + v * kLanes<float>;
      pool_products(products + at, plane, bias, pooled + at, codes + at);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The direct form

// ReLU and maximum of the four outputs of a window, in the order 2·dy + dx.
template <class A>
FASTNET_INLINE void pool_window(const Vec<A>* y, A* pooled, uint8_t* codes) {
  using V = Vec<A>;
  using I = Vec<Index<A>>;
  V most = y[0];
  I code = {};
  for (int i = 1; i < 4; ++i) {
    const I wins = (y[i] > most) | (y[i] != y[i]);
    most = wins ? y[i] : most;
    code = wins ? I{} + i : code;
  }
  const I dead = most <= V{};
  store(pooled, dead ? V{} : most);
  store_codes<A>(codes, dead ? I{} + kDead : code);
}

// One vector of tiles for kFilters filters.
template <class A, int kKernel, int kFilters>
FASTNET_INLINE void direct_tile(const A* patches, int64_t patch_row, int64_t plane,
                                const A* filters, const A* bias, int64_t C, int64_t tiles,
                                A* pooled, uint8_t* codes) {
  using V = Vec<A>;
  constexpr int kPatch = kKernel + 1;
  V sum[kFilters][4];
  for (int k = 0; k < kFilters; ++k) {
    for (int i = 0; i < 4; ++i) sum[k][i] = splat(bias[k]);
  }
  for (int64_t c = 0; c < C; ++c) {
    const A* x = patches + c * patch_row;
#pragma GCC unroll 1
    for (int r = 0; r < kKernel; ++r) {
      const A *upper = x + r * kPatch * plane, *lower = upper + kPatch * plane;
#pragma GCC unroll 5
      for (int s = 0; s < kKernel; ++s) {
        const V x00 = load(upper + s * plane), x01 = load(upper + (s + 1) * plane);
        const V x10 = load(lower + s * plane), x11 = load(lower + (s + 1) * plane);
        for (int k = 0; k < kFilters; ++k) {
          const V w = splat(filters[k]);
          sum[k][0] += w * x00;
          sum[k][1] += w * x01;
          sum[k][2] += w * x10;
          sum[k][3] += w * x11;
        }
        filters += kFilters;
      }
    }
  }
  for (int k = 0; k < kFilters; ++k) pool_window<A>(sum[k], pooled + k * tiles, codes + k * tiles);
}

template <class A, int kKernel, int kFilters, class... Arguments>
static void direct_group(int64_t filters, Arguments... arguments) {
  if (filters == kFilters) {
    direct_tile<A, kKernel, kFilters>(arguments...);
  } else if constexpr (kFilters > 1) {
    direct_group<A, kKernel, kFilters - 1>(filters, arguments...);
  }
}

template <class T, int kKernel>
static void direct_block(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t vectors,
                         int64_t part_first, int64_t part_last, acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int64_t C = call.C, tiles = plan.tiles;
  A* const pooled = scratch + plan.pooled_at;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + plan.codes_at);
  for (int64_t v = 0; v < vectors; ++v) {
    const A* patches = scratch + plan.patches_at + v * kLanes<T>;
    for (int64_t part = part_first; part < part_last; ++part) {
      const int64_t k = part_begin(call, part), k_stop = part_begin(call, part + 1);
      A bias[kDirectFilters] = {};
      if (call.bias) {
        for (int64_t i = k; i < k_stop; ++i) bias[i - k] = widen(call.bias[i]);
      }
      const int64_t at = k * tiles + v * kLanes<T>;
      direct_group<A, kKernel, kDirectFilters>(
          k_stop - k, patches, plan.patch_row, plan.plane,
          static_cast<const A*>(call.filters + k * C * kKernel * kKernel),
          static_cast<const A*>(bias), C, tiles, pooled + at, codes + at);
    }
  }
}

// ---------------------------------------------------------------------------------------------

template <class T>
static void write_block(const ConvForward<T>& call, const ForwardPlan<T>& plan, int64_t first,
                        int64_t last, int64_t k_begin, int64_t k_end, const acc_t<T>* pooled,
                        const uint8_t* codes) {
  const int64_t image = call.P * call.Q, tiles = plan.tiles;
  for (int64_t tile = first; tile < last;) {
    const int64_t n = tile / image, window = tile % image;
    const int64_t count = least(last - tile, image - window);
    if (call.output_at.x == 1) {  // contiguous: the windows of a channel side by side
      for (int64_t k = k_begin; k < k_end; ++k) {
        const int64_t to = n * call.output_at.n + k * call.output_at.c + window;
        const int64_t from = k * tiles + (tile - first);
        for (int64_t i = 0; i < count; ++i) narrow(pooled[from + i], call.output + to + i);
        __builtin_memcpy(call.codes + to, codes + from, static_cast<size_t>(count));
      }
    } else {  // channels_last, or a single channel: those of a window side by side
      for (int64_t i = 0; i < count; ++i) {
        const int64_t to = n * call.output_at.n + (window + i) * call.output_at.x;
        const int64_t from = tile - first + i;
        for (int64_t k = k_begin; k < k_end; ++k) {
          narrow(pooled[k * tiles + from], call.output + to + k);
          call.codes[to + k] = codes[k * tiles + from];
        }
      }
    }
    tile += count;
  }
}

template <class T>
int64_t forward_tiles(const ConvForward<T>& call) {
  return ForwardPlan<T>(call).tiles;
}

// Tiles [begin, end) of the filters in parts [part_first, part_last). Returns false where the input
// has elements that Winograd's form cannot take; what was written is then worthless.
template <class T>
bool conv_forward_kernel(const ConvForward<T>& call, int64_t begin, int64_t end, int64_t part_first,
                         int64_t part_last, acc_t<T>* scratch) {
  const ForwardPlan<T> plan(call);
  const int64_t k_begin = part_begin(call, part_first), k_end = part_begin(call, part_last);
  int64_t strip_id = -1;
  for (int64_t first = begin; first < end; first += plan.tiles) {
    const int64_t last = least(end, first + plan.tiles);
    const int64_t vectors = (last - first + kLanes<T> - 1) / kLanes<T>;
    if (call.kernel == 5) {
      gather_patches<T, 5>(call, plan, first, last, &strip_id, scratch);
      direct_block<T, 5>(call, plan, vectors, part_first, part_last, scratch);
    } else {
      const bool is_small = gather_patches<T, 3>(call, plan, first, last, &strip_id, scratch);
      if (!call.by_winograd) {
        direct_block<T, 3>(call, plan, vectors, part_first, part_last, scratch);
      } else if constexpr (sizeof(acc_t<T>) == sizeof(float)) {
        if (!is_small) return false;
        winograd_block(call, plan, vectors, k_begin, k_end, scratch);
      }
    }
    write_block(call, plan, first, last, k_begin, k_end, scratch + plan.pooled_at,
                reinterpret_cast<const uint8_t*>(scratch + plan.codes_at));
  }
  return true;
}

// ---------------------------------------------------------------------------------------------
// Bias, ReLU and maximum by themselves, for a convolution that a library computed: rows
// [begin, end) of the pooled output, counted through images and channels, or for channels_last
// through images. z is laid out as the output is.

template <class T>
void relu_pool_kernel(const T* z, Strides4 z_at, const T* bias, T* output, uint8_t* codes,
                      Strides4 at, int64_t K, int64_t P, int64_t Q, bool channels_last,
                      int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const int64_t rows_of_channels = channels_last ? 1 : K;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t p = row % P, k = row / P % rows_of_channels, n = row / P / rows_of_channels;
    const T* const upper = z + n * z_at.n + k * z_at.c + 2 * p * z_at.y;
    const T* const lower = upper + z_at.y;
    const int64_t to = n * at.n + k * at.c + p * at.y;
    const auto one = [&](int64_t from, A shift, int64_t offset) {
      A most = widen(upper[from]) + shift;
      uint8_t code = 0;
      for (int j = 1; j < 4; ++j) {
        const A y = widen((j < 2 ? upper : lower)[from + j % 2 * z_at.x]) + shift;
        if (y > most || y != y) {
          most = y;
          code = static_cast<uint8_t>(j);
        }
      }
      narrow(most <= 0 ? A(0) : most, output + to + offset);
      codes[to + offset] = most <= 0 ? kDead : code;
    };
    const auto vector = [&](const Vec<A>* y, int64_t offset) {
      A pooled[kStep];
      pool_window<A>(y, pooled, codes + to + offset);
      store(output + to + offset, load(static_cast<const A*>(pooled)));
    };
    if (channels_last) {
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t from = 2 * q * z_at.x, offset = q * at.x;
        int64_t i = 0;
        for (; i + kStep <= K; i += kStep) {
          const Vec<A> shift = bias ? load(bias + i) : Vec<A>{};
          const Vec<A> y[4] = {load(upper + from + i) + shift,
                               load(upper + from + i + z_at.x) + shift,
                               load(lower + from + i) + shift,
                               load(lower + from + i + z_at.x) + shift};
          vector(y, offset + i);
        }
        for (; i < K; ++i) one(from + i, bias ? widen(bias[i]) : A(0), offset + i);
      }
      continue;
    }
    const A shift = bias ? widen(bias[k]) : A(0);
    int64_t q = 0;
    for (; q + kStep <= Q; q += kStep) {
      constexpr typename MakeLanes<kStep>::type lanes{};
      Vec<A> y[4];
      deinterleave(load(upper + 2 * q), load(upper + 2 * q + kStep), y, y + 1, lanes);
      deinterleave(load(lower + 2 * q), load(lower + 2 * q + kStep), y + 2, y + 3, lanes);
      for (int j = 0; j < 4; ++j) y[j] += shift;
      vector(y, q);
    }
    for (; q < Q; ++q) one(2 * q, shift, q);
  }
}
