// conv_relu_pool's forward for many channels, in Winograd's form on patches of 6 x 6. Included by
// conv_relu_pool_forward_kernels.h, in which the forms for fewer channels are.
//
// A patch of 6 x 6 has the 4 x 4 convolution outputs of a filter of 3 x 3, four pooling windows, or
// the 2 x 2 of one of 5 x 5, a single window, in 36 multiplications instead of 144 or 100:
//   Y = Aᵀ (Σ_c U ⊙ V) A    U = G g Gᵀ of the filter g, V = Bᵀ d B of the patch d
// These are polynomials, multiplied by their values at the points 0, ¾, -¾, 3⁄2, -3⁄2 and infinity:
// one row of Bᵀ and G to each, one column of Aᵀ.
//
//        | 81⁄64    0   -45⁄16    0    1  0 |
//        |   0   -27⁄16  -9⁄4    ¾    1  0 |         | 1   1    1     1      1    0 |
//   Bᵀ = |   0    27⁄16  -9⁄4   -¾    1  0 |    Aᵀ = | 0   ¾   -¾    3⁄2   -3⁄2   0 |
//        |   0   -27⁄32  -9⁄16  3⁄2   1  0 |         | 0  9⁄16  9⁄16  9⁄4    9⁄4   0 |
//        |   0    27⁄32  -9⁄16 -3⁄2   1  0 |         | 0 27⁄64 -27⁄64 27⁄8 -27⁄8   1 |
//        |   0    81⁄64    0  -45⁄16  0  1 |
//
// of 5 x 5 the first two rows of Aᵀ, the second ending in 1. G is the filter's value at the point,
// times 64⁄81, -128⁄243 (twice), 32⁄243 (twice) and 1. Among points of few digits these are close
// to the best: with 0, ±1, ±2 the error is 2 to 5 times as large.
//
// Elements of a window that come from equal patches, as on a plain background, are equal in torch,
// so that the first wins. Here rounding may make them unequal where the rest of the tile differs,
// so the patches themselves are compared.
//
// Vectors have one channel to a lane, then one filter to a lane:
//   strip     [C / lanes][rows][columns][lanes]   some rows of a padded image
//   equal     [tiles]                             which elements of its windows are equal
//   patches   [points][tiles][C]                  V of a block of tiles
//   filters   [K / lanes][points][C][lanes]       U
//   products  [points][tiles][filters]            Σ_c U ⊙ V, of some vectors of filters
//   pooled    [windows][filters]                  then written in the output's layout
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015; on points
// Barabasz, Anderson, Soodhalter and Gregg, Error Analysis and Improving the Accuracy of Winograd
// Convolution for Deep Neural Networks, 2020.

#include "conv_relu_pool_patches.h"
#include "conv_relu_pool_windows.h"

inline constexpr int kSide = 6, kSidePoints = kSide * kSide;
// Products of so many tiles and vectors of filters are summed in registers.
inline constexpr int kTilesAtOnce = 6, kFilterVectors = kRegisters == 32 ? 4 : 2;
// Channels are summed in sets, and then the sets: one sum of them all would lose more digits.
inline constexpr int64_t kChannelsAtOnce = 32;
// Tiles in a block, at least, where there are as many: the filters are fetched for each block.
inline constexpr int64_t kFewestTiles = 24;

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct ManyChannelsPlan {
  int64_t step;                           // from one tile to the next, in pixels
  int64_t tile_rows, tile_columns;        // of an image
  int64_t width;                          // of the strip
  int64_t next_channels;                  // from one block of channels to the next in the strip
  int64_t channels;                       // C, rounded up
  int64_t rows;                           // of tiles in a block, counted through images
  int64_t filters;                        // in a row of the products
  int64_t patches_plane, products_plane;  // from one point to the next
  int64_t strip_at, equal_at, patches_at, products_at, pooled_at, codes_at, end;

  static int64_t tile_rows_of(const ConvForward<T>& call) {
    return call.kernel == 3 ? (call.P + 1) / 2 : call.P;
  }

  explicit ManyChannelsPlan(const ConvForward<T>& call) {
    constexpr int64_t kBlockBytes = 768 * 1024, kLine = 64 / sizeof(float);
    const int64_t windows = call.kernel == 3 ? 2 : 1;
    step = 2 * windows;
    tile_rows = tile_rows_of(call);
    tile_columns = (call.Q + windows - 1) / windows;
    width = step * (tile_columns - 1) + kSide;
    channels = round_up(call.C, kLanes<float>);
    filters = least(kFilterVectors * kLanes<float>, round_up(call.K, kLanes<float>));
    const int64_t tile_bytes =
        kSidePoints * (channels + filters) * static_cast<int64_t>(sizeof(float));
    const int64_t fit = kBlockBytes / (tile_bytes * tile_columns);
    const int64_t fewest = (kFewestTiles + tile_columns - 1) / tile_columns;
    rows = fit < call.most_units ? fit : call.most_units;
    rows = least(rows < fewest ? fewest : rows, call.N * tile_rows);
    const int64_t tiles = rows * tile_columns;
    next_channels =
        off_pages<float>((step * (least(rows, tile_rows) - 1) + kSide) * width * kLanes<float>);
    patches_plane = off_pages<float>(tiles * channels);
    products_plane = off_pages<float>(tiles * filters);
    const int64_t pooled = (tiles * windows * windows + 1) * filters;
    strip_at = 0;
    equal_at = strip_at + channels / kLanes<float> * next_channels;
    patches_at = round_up(equal_at + tiles, kLine);
    products_at = patches_at + kSidePoints * patches_plane;
    pooled_at = products_at + kSidePoints * products_plane;
    codes_at = round_up(pooled_at + pooled, kLine);
    end = codes_at + pooled / static_cast<int64_t>(sizeof(float)) + kLine;
  }
};

// ---------------------------------------------------------------------------------------------
// Transforms

inline constexpr float kNear = 0.75f, kFar = 1.5f;  // the points
inline constexpr float kNear2 = kNear * kNear, kFar2 = kFar * kFar;

// A row or a column of a patch, Bᵀ d.
FASTNET_INLINE void points_of_patch(const Vec<float> (&d)[kSide], Vec<float> (&v)[kSide]) {
  using V = Vec<float>;
  const V even_near = d[4] - d[2] * kFar2, odd_near = (d[3] - d[1] * kFar2) * kNear;
  const V even_far = d[4] - d[2] * kNear2, odd_far = (d[3] - d[1] * kNear2) * kFar;
  v[0] = d[0] * (kNear2 * kFar2) + (d[4] - d[2] * (kNear2 + kFar2));
  v[1] = even_near + odd_near;
  v[2] = even_near - odd_near;
  v[3] = even_far + odd_far;
  v[4] = even_far - odd_far;
  v[5] = d[1] * (kNear2 * kFar2) + (d[5] - d[3] * (kNear2 + kFar2));
}

// A row or a column of a filter, G g, from the even and the odd part of its values.
FASTNET_INLINE void scale_points(Vec<float> first, Vec<float> even_near, Vec<float> odd_near,
                                 Vec<float> even_far, Vec<float> odd_far, Vec<float> last,
                                 Vec<float> (&u)[kSide]) {
  constexpr float kScaleNear = 1 / (2 * kNear2 * (kNear2 - kFar2));
  constexpr float kScaleFar = 1 / (2 * kFar2 * (kFar2 - kNear2));
  u[0] = first * (1 / (kNear2 * kFar2));
  u[1] = (even_near + odd_near * kNear) * kScaleNear;
  u[2] = (even_near - odd_near * kNear) * kScaleNear;
  u[3] = (even_far + odd_far * kFar) * kScaleFar;
  u[4] = (even_far - odd_far * kFar) * kScaleFar;
  u[5] = last;
}
FASTNET_INLINE void points_of_filter(const Vec<float> (&g)[3], Vec<float> (&u)[kSide]) {
  scale_points(g[0], g[0] + g[2] * kNear2, g[1], g[0] + g[2] * kFar2, g[1], g[2], u);
}
FASTNET_INLINE void points_of_filter(const Vec<float> (&g)[5], Vec<float> (&u)[kSide]) {
  scale_points(g[0], g[0] + (g[2] + g[4] * kNear2) * kNear2, g[1] + g[3] * kNear2,
               g[0] + (g[2] + g[4] * kFar2) * kFar2, g[1] + g[3] * kFar2, g[4], u);
}

// A row or a column of the convolution's output, Aᵀ m.
FASTNET_INLINE void outputs_of_points(const Vec<float> (&m)[kSide], Vec<float> (&y)[4]) {
  using V = Vec<float>;
  const V near = m[1] + m[2], far = m[3] + m[4];
  const V odd_near = (m[1] - m[2]) * kNear, odd_far = (m[3] - m[4]) * kFar;
  y[0] = m[0] + (near + far);
  y[1] = odd_near + odd_far;
  y[2] = near * kNear2 + far * kFar2;
  y[3] = m[5] + (odd_near * kNear2 + odd_far * kFar2);
}
FASTNET_INLINE void outputs_of_points(const Vec<float> (&m)[kSide], Vec<float> (&y)[2]) {
  y[0] = m[0] + ((m[1] + m[2]) + (m[3] + m[4]));
  y[1] = m[5] + ((m[1] - m[2]) * kNear + (m[3] - m[4]) * kFar);
}

// V of one vector of channels of a tile, columns first, then rows.
__attribute__((noinline)) static void transform_tile(const float* strip, int64_t row, float* to,
                                                     int64_t plane) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  V half[kSide][kSide], d[kSide], v[kSide];
#pragma GCC unroll 1
  for (int j = 0; j < kSide; ++j) {
    FASTNET_UNROLL for (int i = 0; i < kSide; ++i) d[i] = load(strip + i * row + j * kStep);
    points_of_patch(d, v);
    FASTNET_UNROLL for (int i = 0; i < kSide; ++i) half[i][j] = v[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < kSide; ++i) {
    FASTNET_UNROLL for (int j = 0; j < kSide; ++j) d[j] = half[i][j];
    points_of_patch(d, v);
    FASTNET_UNROLL for (int j = 0; j < kSide; ++j) store(to + (i * kSide + j) * plane, v[j]);
  }
}

// Elements of a window that come from equal patches, as bits.
inline constexpr int kEqual01 = 1, kEqual23 = 2, kEqual02 = 4, kEqual13 = 8, kEqualBits = 4;

// Whether two patches of kernel x kernel positions are equal, the second `shift` elements after the
// first, in all blocks of channels. Mostly the first two channels say no.
FASTNET_INLINE bool are_equal(const float* patch, int64_t shift, int64_t row, int64_t kernel,
                              int64_t channels, int64_t next_channels) {
  uint64_t a, b;
  __builtin_memcpy(&a, patch, sizeof a);
  __builtin_memcpy(&b, patch + shift, sizeof b);
  bool equal = a == b;
  for (int64_t c = 0; equal && c < channels; c += kLanes<float>, patch += next_channels) {
    for (int64_t r = 0; equal && r < kernel; ++r) {
      const float* const from = patch + r * row;
      equal = __builtin_memcmp(from, from + shift, static_cast<size_t>(kernel * kVectorBytes)) == 0;
    }
  }
  return equal;
}

// Those of all windows of the tile at `strip`.
template <class T>
static int equal_elements(const ConvForward<T>& call, const ManyChannelsPlan<T>& plan,
                          const float* strip, int64_t row) {
  constexpr int64_t kStep = kLanes<float>;
  int bits = 0, window = 0;
  for (int64_t y = 0; y < plan.step; y += 2) {
    for (int64_t x = 0; x < plan.step; x += 2, window += kEqualBits) {
      const float* const from = strip + y * row + x * kStep;
      const auto compare = [&](int64_t first, int64_t shift, int bit) {
        if (are_equal(from + first, shift, row, call.kernel, plan.channels, plan.next_channels)) {
          bits |= bit << window;
        }
      };
      compare(0, kStep, kEqual01);
      compare(row, kStep, kEqual23);
      compare(0, row, kEqual02);
      compare(kStep, row, kEqual13);
    }
  }
  return bits;
}

// Filters of one vector, a part. Returns their magnitude.
template <int kKernel, class T>
static Magnitude transform_part(const ConvForward<T>& call, int64_t part) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  const Strides4 at = call.weight_at;
  const int64_t count = least(kStep, call.K - part * kStep), plane = call.C * kStep;
  const T* const weight = call.weight + part * kStep * at.n;
  float* const to = call.arranged_filters + part * kSidePoints * plane;
  alignas(64) float taps[kKernel * kKernel * kStep] = {};
  LargestOf<float> largest;
  for (int64_t c = 0; c < call.C; ++c) {
    for (int64_t k = 0; k < count; ++k) {
      const T* const from = weight + k * at.n + c * at.c;
      for (int r = 0; r < kKernel; ++r) {
        for (int s = 0; s < kKernel; ++s) {
          taps[(r * kKernel + s) * kStep + k] = widen(from[r * at.y + s * at.x]);
        }
      }
    }
    largest.add_all(taps, kKernel * kKernel * kStep);
    V half[kSide][kKernel], u[kSide];
    FASTNET_UNROLL for (int s = 0; s < kKernel; ++s) {
      V g[kKernel];
      FASTNET_UNROLL for (int r = 0; r < kKernel; ++r) g[r] =
          load(taps + (r * kKernel + s) * kStep);
      points_of_filter(g, u);
      FASTNET_UNROLL for (int i = 0; i < kSide; ++i) half[i][s] = u[i];
    }
    for (int i = 0; i < kSide; ++i) {
      points_of_filter(half[i], u);
      FASTNET_UNROLL for (int j = 0; j < kSide; ++j) {
        store(to + (i * kSide + j) * plane + c * kStep, u[j]);
      }
    }
  }
  return largest.magnitude(kLargestOfMany);
}

// Aᵀ M A, bias, ReLU and maximum of one vector of filters of a tile, some of whose elements are
// known to be equal.
template <int kWindows, class T>
__attribute__((noinline)) static void pool_tile(const float* products, int64_t plane,
                                                const float* bias, int equal, T* const* pooled,
                                                uint8_t* const* codes) {
  using V = Vec<float>;
  constexpr int kOutputs = 2 * kWindows;
  V half[kOutputs][kSide], m[kSide], y[kOutputs];
#pragma GCC unroll 1
  for (int j = 0; j < kSide; ++j) {
    FASTNET_UNROLL for (int i = 0; i < kSide; ++i) m[i] = load(products + (i * kSide + j) * plane);
    outputs_of_points(m, y);
    FASTNET_UNROLL for (int i = 0; i < kOutputs; ++i) half[i][j] = y[i];
  }
#pragma GCC unroll 1
  for (int row = 0; row < kWindows; ++row) {
    V z[kWindows][4], most[kWindows];
    Vec<int32_t> code[kWindows];
    FASTNET_UNROLL for (int dy = 0; dy < 2; ++dy) {
      outputs_of_points(half[2 * row + dy], y);
      FASTNET_UNROLL for (int x = 0; x < kOutputs; ++x) z[x / 2][2 * dy + x % 2] = y[x];
    }
    if (equal) {
      FASTNET_UNROLL for (int i = 0; i < kWindows; ++i, equal >>= kEqualBits) {
        if (equal & kEqual01) z[i][1] = z[i][0];
        if (equal & kEqual02) z[i][2] = z[i][0];
        if (equal & kEqual13) z[i][3] = z[i][1];
        if (equal & kEqual23) z[i][3] = z[i][2];
      }
    }
    window_maxima<false, float>(z, most, code);
    T* to[kWindows];
    uint8_t* code_to[kWindows];
    FASTNET_UNROLL for (int i = 0; i < kWindows; ++i) {
      most[i] += load(bias);  // which moves all four alike
      to[i] = pooled[row * kWindows + i];
      code_to[i] = codes[row * kWindows + i];
    }
    store_windows<float, T, kWindows>(most, code, to, code_to);
  }
}

// ---------------------------------------------------------------------------------------------
// Products

// products[tile][filter] = Σ_c patches[tile][c] · filters[c][filter], for kTiles tiles and kVectors
// vectors of filters, `next_filters` apart. Added to what is there, from the second set of channels
// on.
template <int kTiles, int kVectors>
static void tile_products(const float* filters, int64_t next_filters, const float* patches,
                          int64_t next_patch, int64_t C, float* products, int64_t next_product) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  const auto multiply = [&](int64_t c, int64_t c_last, const auto& put)
                            __attribute__((always_inline)) {
                              V sum[kTiles][kVectors];
                              FASTNET_UNROLL for (int t = 0; t < kTiles; ++t) {
                                FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[t][v] = V{};
                              }
                              for (; c < c_last; ++c) {
                                V w[kVectors];
                                FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
                                  w[v] = in_register(load(filters + v * next_filters + c * kStep));
                                }
                                FASTNET_UNROLL for (int t = 0; t < kTiles; ++t) {
                                  const V x = splat(patches[t * next_patch + c]);
                                  FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
                                    sum[t][v] += x * w[v];
                                  }
                                }
                              }
                              FASTNET_UNROLL for (int t = 0; t < kTiles; ++t) {
                                FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
                                  put(products + t * next_product + v * kStep, sum[t][v]);
                                }
                              }
                            };
  multiply(0, least(C, kChannelsAtOnce),
           [](float* to, V sum) __attribute__((always_inline)) { store(to, sum); });
  for (int64_t c = kChannelsAtOnce; c < C; c += kChannelsAtOnce) {
    multiply(c, least(C, c + kChannelsAtOnce),
             [](float* to, V sum) __attribute__((always_inline)) { store(to, load(to) + sum); });
  }
}

using TileProducts = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*,
                              int64_t);

template <int kTiles = kTilesAtOnce, int kVectors = kFilterVectors>
static TileProducts tile_products_for(int64_t tiles, int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return tile_products_for<kTiles, kVectors - 1>(tiles, vectors);
  }
  if constexpr (kTiles > 1) {
    if (tiles < kTiles) return tile_products_for<kTiles - 1, kVectors>(tiles, vectors);
  }
  return tile_products<kTiles, kVectors>;
}

// All points of `tiles` tiles, in sets of about the same size.
template <class T>
static void products_of_tiles(const ConvForward<T>& call, const ManyChannelsPlan<T>& plan,
                              int64_t tiles, const float* filters, int64_t vectors,
                              float* scratch) {
  const int64_t next_point = call.C * kLanes<float>;
  const int64_t sets = (tiles + kTilesAtOnce - 1) / kTilesAtOnce;
  for (int point = 0; point < kSidePoints; ++point, filters += next_point) {
    const float* const patches = scratch + plan.patches_at + point * plan.patches_plane;
    float* const products = scratch + plan.products_at + point * plan.products_plane;
    for (int64_t set = 0; set < sets; ++set) {
      const int64_t t = set * tiles / sets, count = (set + 1) * tiles / sets - t;
      tile_products_for(count, vectors)(filters, kSidePoints * next_point,
                                        patches + t * plan.channels, plan.channels, call.C,
                                        products + t * plan.filters, plan.filters);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// A block: rows of tiles [first, last), counted through images

// Returns whether all elements are small.
template <class T>
static bool gather_tiles(const ConvForward<T>& call, const ManyChannelsPlan<T>& plan, int64_t first,
                         int64_t last, float* scratch) {
  constexpr int kStep = kLanes<float>;
  float* const strip = scratch + plan.strip_at;
  float* to = scratch + plan.patches_at;
  int32_t* equal = reinterpret_cast<int32_t*>(scratch + plan.equal_at);
  for (int64_t row = first; row < last;) {
    const int64_t n = row / plan.tile_rows, y = row % plan.tile_rows;
    const int64_t count = least(last - row, plan.tile_rows - y);
    const int64_t rows = plan.step * (count - 1) + kSide, line = plan.width * kStep;
    fill_blocks(call, n, plan.step * y, rows, plan.width, kStep, plan.next_channels, strip);
    Vec<int32_t> largest = {};
    for (int64_t c = 0; c < plan.channels; c += kStep) {
      const float* const block = strip + c / kStep * plan.next_channels;
      for (int64_t i = 0; i < rows * line; i += kStep) raise_magnitude(&largest, load(block + i));
    }
    if (!is_below(largest, kLargestOfMany)) return false;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t x = 0; x < plan.tile_columns; ++x, to += plan.channels) {
        const float* from = strip + plan.step * (i * line + x * kStep);
        *equal++ = equal_elements(call, plan, from, line);
        for (int64_t c = 0; c < plan.channels; c += kStep, from += plan.next_channels) {
          transform_tile(from, line, to + c, plan.patches_plane);
        }
      }
    }
    row += count;
  }
  return true;
}

// Where row `row` of tiles begins among all windows, counted through images.
template <class T>
static int64_t first_window(const ConvForward<T>& call, const ManyChannelsPlan<T>& plan,
                            int64_t row) {
  const int64_t windows = plan.step / 2;
  return (row / plan.tile_rows * call.P + row % plan.tile_rows * windows) * call.Q;
}

// The pooled outputs of `vectors` vectors of filters, by window and filter, `next` from one window
// to the next. What belongs to no window goes to `nowhere`.
template <int kWindows, class T>
static void pool_tiles(const ConvForward<T>& call, const ManyChannelsPlan<T>& plan, int64_t first,
                       int64_t last, int64_t vectors, const float* bias, T* pooled, uint8_t* codes,
                       int64_t next, T* nowhere, uint8_t* no_code, const float* scratch) {
  const float* products = scratch + plan.products_at;
  const int32_t* equal = reinterpret_cast<const int32_t*>(scratch + plan.equal_at);
  const int64_t origin = first_window(call, plan, first);
  for (int64_t row = first; row < last; ++row) {
    const int64_t y = row % plan.tile_rows * kWindows;
    const int64_t row_window = first_window(call, plan, row) - origin;
    for (int64_t x = 0; x < plan.tile_columns; ++x, products += plan.filters, ++equal) {
      T* to[kWindows * kWindows];
      uint8_t* codes_to[kWindows * kWindows];
      for (int i = 0; i < kWindows * kWindows; ++i) {
        const int64_t p = i / kWindows, q = x * kWindows + i % kWindows;
        const bool is_window = y + p < call.P && q < call.Q;
        const int64_t offset = (row_window + p * call.Q + q) * next;
        to[i] = is_window ? pooled + offset : nowhere;
        codes_to[i] = is_window ? codes + offset : no_code;
      }
      for (int64_t v = 0; v < vectors; ++v) {
        pool_tile<kWindows>(products + v * kLanes<float>, plan.products_plane,
                            bias + v * kLanes<float>, *equal, to, codes_to);
        for (int i = 0; i < kWindows * kWindows; ++i) {
          to[i] += kLanes<float>;
          codes_to[i] += kLanes<float>;
        }
      }
    }
  }
}

// `count` filters from k_first on, out of the scratch memory into the output.
template <class T>
static void write_windows(const ConvForward<T>& call, const ManyChannelsPlan<T>& plan,
                          int64_t first, int64_t last, int64_t k_first, int64_t count,
                          const T* pooled, const uint8_t* codes) {
  const int64_t image = call.P * call.Q, stop = first_window(call, plan, last);
  for (int64_t window = first_window(call, plan, first); window < stop;) {
    const int64_t n = window / image, in_image = least(stop - window, image - window % image);
    const int64_t to =
        n * call.output_at.n + window % image * call.output_at.x + k_first * call.output_at.c;
    if (call.output_at.x == 1) {
      transpose(pooled, plan.filters, call.output + to, image, in_image, count);
      transpose(codes, plan.filters, call.codes + to, image, in_image, count);
    } else {  // channels_last
      for (int64_t i = 0; i < in_image; ++i) {
        for (int64_t k = 0; k < count; ++k) {
          call.output[to + i * call.output_at.x + k] = pooled[i * plan.filters + k];
          call.codes[to + i * call.output_at.x + k] = codes[i * plan.filters + k];
        }
      }
    }
    pooled += in_image * plan.filters;
    codes += in_image * plan.filters;
    window += in_image;
  }
}

// Filters in parts [part_first, part_last) of rows of tiles [begin, end). Returns false where the
// input has elements that this form cannot take; what was written is then worthless.
template <class T>
static bool many_channels_forward(const ConvForward<T>& call, int64_t begin, int64_t end,
                                  int64_t part_first, int64_t part_last, float* scratch) {
  constexpr int64_t kStep = kLanes<float>;
  const ManyChannelsPlan<T> plan(call);
  T* const pooled = reinterpret_cast<T*>(scratch + plan.pooled_at);
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + plan.codes_at);
  for (int64_t first = begin; first < end; first += plan.rows) {
    const int64_t last = least(end, first + plan.rows);
    if (!gather_tiles(call, plan, first, last, scratch)) return false;
    const int64_t windows = first_window(call, plan, last) - first_window(call, plan, first);
    for (int64_t part = part_first; part < part_last; part += kFilterVectors) {
      const int64_t vectors = least(kFilterVectors, part_last - part);
      const int64_t k_first = part * kStep, count = least(vectors * kStep, call.K - k_first);
      products_of_tiles(call, plan, (last - first) * plan.tile_columns,
                        call.filters + part * kSidePoints * call.C * kStep, vectors, scratch);
      alignas(64) float bias[kFilterVectors * kStep] = {};
      for (int64_t k = 0; call.bias && k < count; ++k) bias[k] = widen(call.bias[k_first + k]);
      // Straight into the output where it has one filter beside the other, in whole vectors.
      const bool is_output = call.output_at.c == 1 && count == vectors * kStep;
      const int64_t next = is_output ? call.output_at.x : plan.filters;
      const int64_t to = first_window(call, plan, first) * call.output_at.x + k_first;
      const auto pool = call.kernel == 3 ? pool_tiles<2, T> : pool_tiles<1, T>;
      pool(call, plan, first, last, vectors, bias, is_output ? call.output + to : pooled,
           is_output ? call.codes + to : codes, next, pooled + windows * plan.filters,
           codes + windows * plan.filters, scratch);
      if (!is_output) write_windows(call, plan, first, last, k_first, count, pooled, codes);
    }
  }
  return true;
}
