// conv_relu_pool's backward for many channels and 3 x 3 filters, on patches of 6 x 6. Included by
// conv_relu_pool_backward_kernels.h, in which the lists for other shapes are.
//
// The forward's steps from the last to the first, each transposed, with the gradient of a tile's
// 4 x 4 convolution outputs as g, in which each window has one position alive:
//   Z = A g Aᵀ    grad_weight = Gᵀ (Σ over tiles of Z ⊙ V) G    grad_patch = B (Σ_k Z ⊙ U) Bᵀ
// in 9 multiplications a window, as lists take where all windows are alive; but here they are plain
// products of matrices, and both gradients share Z.
//
//   strip, patches, filters                  as in conv_relu_pool_tiles.h, the filters with a
//                                            channel to a lane: [C / lanes][points][K][lanes]
//   windows   [windows][K]                   the pooled gradients of a block, and their codes
//   gradients [points][tiles][K]             Z
//   sums      [points][C][K]                 Σ Z ⊙ V, of all blocks
//   products  [points][tiles][C]             Σ_k Z ⊙ U, in the place of the patches
//   image     [C / lanes][rows][columns][lanes]   the padded image's gradient

// A gradient from which on a product might overflow in this form alone.
inline constexpr float kLargestGradientOfTiles = 1e20f;

// Whether this form is quicker than lists: it has vectors to fill, windows to share the transforms
// of the weight's gradient, and not too many half tiles; and its sums are not too large to keep at
// hand. Without multiply-adds, or for grad_weight alone, lists are as quick.
template <class T>
bool takes_tiles(const ConvBackward<T>& call) {
  constexpr int64_t kFewest = 8, kFewestWindows = 512, kMostPoints = 10, kMostSums = 40'000;
  const TileGrid<T> grid(call);
  const int64_t windows = call.P * call.Q;
  return kVectorBytes > 16 && sizeof(acc_t<T>) == sizeof(float) && call.kernel == 3 &&
         call.grad_input && call.C >= kFewest && call.K >= kFewest && call.Q <= kMostTileWindows &&
         call.C * call.K <= kMostSums && call.N * windows >= kFewestWindows &&
         grid.points() <= kMostPoints * windows;
}

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct TilesBackwardPlan {
  TileGrid<T> grid;
  int64_t rows;                      // of tiles in a block, counted through images
  int64_t filters;                   // K, rounded up
  int64_t strip_block, image_block;  // from one block of channels to the next
  int64_t image_row;                 // from one row of the image to the next
  int64_t patches_plane, gradients_plane, sums_plane;  // from one point to the next
  int64_t strip_at, windows_at, codes_at, bias_at, patches_at, gradients_at, sums_at, taps_at,
      image_at, end;

  explicit TilesBackwardPlan(const ConvBackward<T>& call) : grid(call) {
    constexpr int64_t kBlockBytes = 1024 * 1024, kLine = 64 / sizeof(float);
    constexpr int64_t kSize = sizeof(float), kStep = kLanes<float>;
    filters = round_up(call.K, kStep);
    const int64_t tile_bytes = kSidePoints * (grid.channels + filters) * kSize;
    const int64_t fit = kBlockBytes / (tile_bytes * grid.columns);
    const int64_t fewest = (kFewestTiles + grid.columns - 1) / grid.columns;
    rows = least(fit < fewest ? fewest : fit, call.N * grid.rows);
    const int64_t tiles = rows * grid.columns, windows = tiles * grid.windows * grid.windows;
    strip_block = grid.strip_block(least(rows, grid.rows));
    image_row = grid.width * kStep;
    image_block = grid.strip_block(grid.rows);
    patches_plane = off_pages<float>(tiles * grid.channels);
    gradients_plane = off_pages<float>(tiles * filters + kStep);
    sums_plane = off_pages<float>(call.C * filters);
    const auto next_line = [&](int64_t at) { return round_up(at, kLine); };
    const int64_t blocks = grid.channels / kStep;
    strip_at = 0;
    windows_at = strip_at + (call.needs_weight ? blocks * strip_block : 0);
    codes_at = next_line(windows_at + windows * filters);
    bias_at = next_line(codes_at + (windows * filters + kStep) / kSize + 1);
    patches_at = next_line(bias_at + filters);
    gradients_at = patches_at + kSidePoints * patches_plane;
    sums_at = next_line(gradients_at + kSidePoints * gradients_plane);
    taps_at = next_line(sums_at + (call.needs_weight ? kSidePoints * sums_plane : 0));
    image_at = next_line(taps_at + (call.needs_weight ? 9 * kStep * filters : 0));
    end = image_at + (call.grad_input ? blocks * image_block : 0);
  }
};

// ---------------------------------------------------------------------------------------------
// Transforms

// A row or a column of a tile's gradient, A g.
FASTNET_INLINE void points_of_gradient(const Vec<float> (&g)[4], Vec<float> (&z)[kSide]) {
  using V = Vec<float>;
  const V even_near = g[0] + g[2] * kNear2, odd_near = (g[1] + g[3] * kNear2) * kNear;
  const V even_far = g[0] + g[2] * kFar2, odd_far = (g[1] + g[3] * kFar2) * kFar;
  z[0] = g[0];
  z[1] = even_near + odd_near;
  z[2] = even_near - odd_near;
  z[3] = even_far + odd_far;
  z[4] = even_far - odd_far;
  z[5] = g[3];
}

FASTNET_INLINE void points_of_gradient(const Vec<float> (&g)[2], Vec<float> (&z)[kHalfSide]) {
  z[0] = g[0];
  z[1] = g[0] + g[1] * kNear;
  z[2] = g[0] - g[1] * kNear;
  z[3] = g[1];
}

// A row or a column of grad_weight, Gᵀ u.
FASTNET_INLINE void filter_of_points(const Vec<float> (&u)[kSide], Vec<float> (&g)[3]) {
  using V = Vec<float>;
  const V near = (u[1] + u[2]) * kScaleNear, far = (u[3] + u[4]) * kScaleFar;
  g[0] = u[0] * kScaleZero + (near + far);
  g[1] = (u[1] - u[2]) * (kScaleNear * kNear) + (u[3] - u[4]) * (kScaleFar * kFar);
  g[2] = u[5] + (near * kNear2 + far * kFar2);
}

// A row or a column of a patch's gradient, B v.
FASTNET_INLINE void patch_of_points(const Vec<float> (&v)[kSide], Vec<float> (&d)[kSide]) {
  using V = Vec<float>;
  const V near = v[1] + v[2], far = v[3] + v[4];
  const V odd_near = (v[1] - v[2]) * kNear, odd_far = (v[3] - v[4]) * kFar;
  d[0] = v[0] * (kNear2 * kFar2);
  d[1] = v[5] * (kNear2 * kFar2) - (odd_near * kFar2 + odd_far * kNear2);
  d[2] = v[0] * -(kNear2 + kFar2) - (near * kFar2 + far * kNear2);
  d[3] = (odd_near + odd_far) - v[5] * (kNear2 + kFar2);
  d[4] = v[0] + (near + far);
  d[5] = v[5];
}

FASTNET_INLINE void patch_of_points(const Vec<float> (&v)[kHalfSide], Vec<float> (&d)[kHalfSide]) {
  d[0] = v[0] * (kNear2 * kFar2);
  d[1] = (v[1] - v[2]) * (kNear * (kNear2 - kFar2)) - v[3] * kNear2;
  d[2] = (v[1] + v[2]) * (kNear2 - kFar2) - v[0] * kFar2;
  d[3] = v[3];
}

// Z of one vector of filters of a tile of kRows x kColumns points, out of its windows' gradients
// and codes. Adds the living ones to the bias's gradient, and returns their sizes.
template <int kRows, int kColumns>
__attribute__((noinline)) static Vec<int32_t> transform_gradient(const float* const* gradients,
                                                                 const uint8_t* const* codes,
                                                                 float* bias, float* to,
                                                                 int64_t plane) {
  using V = Vec<float>;
  constexpr int kHigh = kRows == kSide ? 2 : 1, kWide = kColumns == kSide ? 2 : 1;
  V half[kRows][2 * kWide], column[2 * kWide][2 * kHigh], z[kColumns];
  V sum = load(bias);
  Vec<int32_t> largest = {};
  FASTNET_UNROLL for (int w = 0; w < 4; ++w) {
    if (w / 2 >= kHigh || w % 2 >= kWide) continue;
    const V g = load(gradients[w]);
    const Vec<int32_t> code = load_bytes(codes[w]);
    V alive[4];
    FASTNET_UNROLL for (int i = 0; i < 4; ++i) alive[i] = code == i ? g : V{};
    FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
      column[w % 2 * 2 + i % 2][w / 2 * 2 + i / 2] = alive[i];
    }
    const V one = (alive[0] + alive[1]) + (alive[2] + alive[3]);
    raise_magnitude(&largest, one);
    sum += one;
  }
  store(bias, sum);
  FASTNET_UNROLL for (int j = 0; j < 2 * kWide; ++j) {
    V points[kRows];
    points_of_gradient(column[j], points);
    FASTNET_UNROLL for (int i = 0; i < kRows; ++i) half[i][j] = points[i];
  }
#pragma GCC unroll 1
  for (int i = 0; i < kRows; ++i) {
    points_of_gradient(half[i], z);
    float* const to_row = to + point_of<kRows>(i) * kSide * plane;
    FASTNET_UNROLL for (int j = 0; j < kColumns; ++j) {
      store(to_row + point_of<kColumns>(j) * plane, z[j]);
    }
  }
  return largest;
}

// grad_weight of one vector of filters and a channel, to[tap].
__attribute__((noinline)) static void untransform_filters(const float* sums, int64_t plane,
                                                          float* to, int64_t next_tap) {
  using V = Vec<float>;
  V half[3][kSide], g[3];
  transform_points<kSide>(sums, plane, filter_of_points, half);
#pragma GCC unroll 1
  for (int r = 0; r < 3; ++r) {
    filter_of_points(half[r], g);
    FASTNET_UNROLL for (int s = 0; s < 3; ++s) store(to + (r * 3 + s) * next_tap, g[s]);
  }
}

// The gradient of one vector of channels of a patch, added to the image's.
template <int kRows, int kColumns>
__attribute__((noinline)) static void untransform_patch(const float* products, int64_t plane,
                                                        float* image, int64_t row) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  V half[kRows][kColumns], d[kColumns];
  const auto patch = [](const V(&v)[kRows], V(&d)[kRows])
                         __attribute__((always_inline)) { patch_of_points(v, d); };
  transform_points<kRows>(products, plane, patch, half);
#pragma GCC unroll 1
  for (int i = 0; i < kRows; ++i, image += row) {
    patch_of_points(half[i], d);
    FASTNET_UNROLL for (int j = 0; j < kColumns; ++j) {
      store(image + j * kStep, load(image + j * kStep) + d[j]);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// A block: rows of tiles [first, last), counted through images, and filters [k_begin, k_end)

// Returns whether all living gradients are small enough.
template <class T>
static bool gather_gradients(const ConvBackward<T>& call, const TilesBackwardPlan<T>& plan,
                             int64_t first, int64_t last, int64_t k_begin, int64_t k_end,
                             float* scratch) {
  constexpr int64_t kStep = kLanes<float>;
  const TileGrid<T>& grid = plan.grid;
  float* const gradients = scratch + plan.windows_at;
  uint8_t* const codes = reinterpret_cast<uint8_t*>(scratch + plan.codes_at);
  const int64_t origin = grid.first_window(call, first);
  const int64_t windows = grid.first_window(call, last) - origin, filters = plan.filters;
  gather_windows(call, origin, origin + windows, k_begin, k_end, call.grad_output,
                 call.grad_output_at, gradients, filters);
  gather_windows(call, origin, origin + windows, k_begin, k_end, call.codes, call.codes_at, codes,
                 filters);
  // Filters that there are not are dead.
  const int64_t rest = round_up(k_end - k_begin, kStep) - (k_end - k_begin);
  for (int64_t i = 0; i < windows && rest > 0; ++i) {
    __builtin_memset(codes + i * filters + (k_end - k_begin), kDead, static_cast<size_t>(rest));
  }
  Vec<int32_t> largest = {};
  TilePlaces<T> places(grid, first, last);
  for (int64_t row = first; row < last; ++row) {
    const int64_t row_window = grid.first_window(call, row) - origin;
    for (int64_t x = 0; x < grid.columns; ++x) {
      float* const to = scratch + plan.gradients_at + places.next(row, x) * filters;
      const float* from[4];
      const uint8_t* codes_from[4];
      for (int i = 0; i < 4; ++i) {  // those of half a tile are not all taken
        const int64_t window = row_window + i / 2 * call.Q + 2 * x + i % 2;
        from[i] = gradients + window * filters;
        codes_from[i] = codes + window * filters;
      }
      for_points(grid, row, x, [&](auto rows, auto columns) {
        for (int64_t k = 0; k < k_end - k_begin; k += kStep) {
          const Vec<int32_t> size = transform_gradient<rows(), columns()>(
              from, codes_from, scratch + plan.bias_at + k, to + k, plan.gradients_plane);
          largest = size > largest ? size : largest;
          for (int i = 0; i < 4; ++i) {
            from[i] += kStep;
            codes_from[i] += kStep;
          }
        }
      });
    }
  }
  return is_below(largest, kLargestGradientOfTiles);
}

// What is wanted of a block's products: Σ Z ⊙ V of `filters` filters from k_first on, added to what
// is there or not, and Σ_k Z ⊙ U of channels in blocks [block_begin, block_end).
struct Wanted {
  int64_t k_first, filters;
  bool adds;
  int64_t block_begin, block_end;
};

// Point by point, so that what both products read comes into the first-level cache once.
template <class T>
static void multiply_points(const ConvBackward<T>& call, const TilesBackwardPlan<T>& plan,
                            const TilePlaces<T>& places, const Wanted& wanted, float* scratch) {
  constexpr int64_t kStep = kLanes<float>;
  const int64_t channels = plan.grid.channels, filters = plan.filters;
  const int64_t next_vector = kSidePoints * call.K * kStep;
  Product of_weight{1, channels, filters, kStep, filters, 0};
  const Product of_input{filters, 1, kStep, next_vector, channels, call.K};
  for (int point = 0; point < kSidePoints; ++point) {
    const TileRange tiles = places.with_point(point);
    const float* const gradients =
        scratch + plan.gradients_at + point * plan.gradients_plane + tiles.begin * filters;
    float* const patches =
        scratch + plan.patches_at + point * plan.patches_plane + tiles.begin * channels;
    of_weight.count = tiles.end - tiles.begin;
    for (int64_t k = 0; k < wanted.filters; k += kVectorsAtOnce * kStep) {
      const int64_t vectors = least(kVectorsAtOnce, (wanted.filters - k + kStep - 1) / kStep);
      MultiplyRows(call.C, vectors)(of_weight, patches, gradients + wanted.k_first + k,
                                    scratch + plan.sums_at + point * plan.sums_plane + k,
                                    wanted.adds);
    }
    for (int64_t block = wanted.block_begin; block < wanted.block_end; block += kVectorsAtOnce) {
      const int64_t vectors = least(kVectorsAtOnce, wanted.block_end - block);
      MultiplyRows(tiles.end - tiles.begin, vectors)
          .in_sets(of_input, gradients, call.filters + block * next_vector + point * call.K * kStep,
                   patches + block * kStep);
    }
  }
}

// grad_weight of filters [k_begin, k_end) out of the sums, as conv_backward_weight_kernel leaves
// it.
template <class T>
static void write_sums(const ConvBackward<T>& call, const TilesBackwardPlan<T>& plan,
                       int64_t k_begin, int64_t k_end, int64_t channels, int64_t patch,
                       int64_t patch_row, float* to, float* scratch) {
  constexpr int64_t kStep = kLanes<float>;
  const int64_t blocks = (call.C + channels - 1) / channels, filters = plan.filters;
  float* const taps = scratch + plan.taps_at;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t c_first = block * channels, count = least(channels, call.C - c_first);
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t k = 0; k < k_end - k_begin; k += kStep) {
        untransform_filters(scratch + plan.sums_at + (c_first + c) * filters + k, plan.sums_plane,
                            taps + c * filters + k, kStep * filters);
      }
    }
    for (int tap = 0; tap < 9; ++tap) {
      transpose(taps + tap * kStep * filters, filters,
                to + (k_begin * blocks + block) * patch + tap / 3 * patch_row + tap % 3 * channels,
                blocks * patch, count, k_end - k_begin);
    }
  }
}

// grad_input's part of a block, channels in blocks [block_begin, block_end), added to the image,
// which is written where it is complete.
template <class T, class Write>
static void add_to_images(const ConvBackward<T>& call, const TilesBackwardPlan<T>& plan,
                          int64_t first, int64_t last, int64_t block_begin, int64_t block_end,
                          float* scratch, const Write& write) {
  constexpr int64_t kStep = kLanes<float>;
  const TileGrid<T>& grid = plan.grid;
  TilePlaces<T> places(grid, first, last);
  const float* const products = scratch + plan.patches_at;
  for (int64_t row = first; row < last; ++row) {
    const int64_t y = row % grid.rows;
    float* const images = scratch + plan.image_at;
    for (int64_t block = block_begin; y == 0 && block < block_end; ++block) {
      __builtin_memset(images + block * plan.image_block, 0,
                       static_cast<size_t>(plan.image_block) * sizeof(float));
    }
    for (int64_t x = 0; x < grid.columns; ++x) {
      const float* const from = products + places.next(row, x) * grid.channels;
      float* const image = images + grid.step * (y * plan.image_row + x * kStep);
      for_points(grid, row, x, [&](auto rows, auto columns) {
        for (int64_t block = block_begin; block < block_end; ++block) {
          untransform_patch<rows(), columns()>(from + block * kStep, plan.patches_plane,
                                               image + block * plan.image_block, plan.image_row);
        }
      });
    }
    if (y == grid.rows - 1) write(row / grid.rows);
  }
}

// The same of images [n_begin, n_end), as conv_backward_weight_kernel and
// conv_backward_input_kernel leave it, for filters [k_begin, k_end) and channels in blocks
// [block_begin, block_end), where those are wanted at all. `write` is given each image's number.
// Returns false where an operand is too large for this form.
template <class T, class Write>
static bool tiles_backward(const ConvBackward<T>& call, int64_t n_begin, int64_t n_end,
                           int64_t k_begin, int64_t k_end, int64_t block_begin, int64_t block_end,
                           int64_t channels, int64_t patch, int64_t patch_row, float* sums,
                           float* bias_sums, float* scratch, const Write& write) {
  const TilesBackwardPlan<T> plan(call);
  const bool needs_weight = call.needs_weight && k_begin < k_end;
  const bool needs_input = call.grad_input && block_begin < block_end;
  const int64_t k_first = needs_input ? 0 : k_begin, k_last = needs_input ? call.K : k_end;
  float* const bias = scratch + plan.bias_at;
  __builtin_memset(bias, 0, static_cast<size_t>(plan.filters) * sizeof(float));
  const int64_t begin = n_begin * plan.grid.rows, end = n_end * plan.grid.rows;
  const int64_t blocks = (end - begin + plan.rows - 1) / plan.rows;
  for (int64_t block = 0; block < blocks; ++block) {  // of about the same size
    const int64_t first = begin + block * (end - begin) / blocks;
    const int64_t last = begin + (block + 1) * (end - begin) / blocks;
    if (!gather_gradients(call, plan, first, last, k_first, k_last, scratch)) return false;
    if (needs_weight) {
      if (!gather_tiles(call, plan.grid, first, last, scratch + plan.strip_at, plan.strip_block,
                        scratch + plan.patches_at, plan.patches_plane,
                        [](int64_t, const float*) {})) {
        return false;
      }
    }
    multiply_points(call, plan, TilePlaces<T>(plan.grid, first, last),
                    {k_begin - k_first, needs_weight ? k_end - k_begin : 0, first > begin,
                     block_begin, needs_input ? block_end : block_begin},
                    scratch);
    if (needs_input) {
      add_to_images(call, plan, first, last, block_begin, block_end, scratch, write);
    }
  }
  for (int64_t k = k_begin; k < k_end; ++k) bias_sums[k] += bias[k - k_first];
  if (needs_weight) {
    write_sums(call, plan, k_begin, k_end, channels, patch, patch_row, sums, scratch);
  }
  return true;
}
