// conv_relu_pool's forward for many channels, on patches of 6 x 6. Included by
// conv_relu_pool_forward_kernels.h, in which the forms for fewer channels are.
//
//   strip, patches, filters                  as in conv_relu_pool_tiles.h
//   equal     [tiles]                        which elements of its windows are equal
//   products  [points][tiles][filters]       Σ_c U ⊙ V, of some vectors of filters
//   pooled    [windows][filters]             then written in the output's layout
//
// Elements of a window that come from equal patches, as on a plain background, are equal in torch,
// so that the first wins. Here rounding may make them unequal where the rest of the tile differs,
// so the patches themselves are compared.

// Where everything stands in a thread's scratch memory, in elements.
template <class T>
struct TilesForwardPlan {
  TileGrid<T> grid;
  int64_t rows;                           // of tiles in a block, counted through images
  int64_t filters;                        // in a row of the products
  int64_t strip_block;                    // from one block of channels to the next
  int64_t patches_plane, products_plane;  // from one point to the next
  int64_t strip_at, equal_at, patches_at, products_at, pooled_at, codes_at, end;

  explicit TilesForwardPlan(const ConvForward<T>& call) : grid(call) {
    constexpr int64_t kBlockBytes = 1024 * 1024, kLine = 64 / sizeof(float);
    filters = least(kVectorsAtOnce * kLanes<float>, round_up(call.K, kLanes<float>));
    const int64_t tile_bytes =
        kSidePoints * (grid.channels + filters) * static_cast<int64_t>(sizeof(float));
    const int64_t fit = kBlockBytes / (tile_bytes * grid.columns);
    // As few as leave every thread some, but not so few that filters are fetched in vain, unless
    // threads would find none.
    const int64_t few = (kFewestTiles + grid.columns - 1) / grid.columns;
    const int64_t fewest = least(few, 8 * call.most_units);
    rows = least(fit, call.most_units);
    const int64_t all = call.N * grid.rows, threads = all / (8 * call.most_units);
    rows = least(rows < fewest ? fewest : rows, all);
    // As many blocks for each thread, where they are few: the others would wait for the last one.
    const int64_t blocks = threads > 0 ? (all + rows - 1) / rows / threads * threads : 0;
    if (blocks > 0) rows = least(rows < fit ? fit : rows, (all + blocks - 1) / blocks);
    const int64_t tiles = rows * grid.columns;
    strip_block = grid.strip_block(least(rows, grid.rows));
    patches_plane = off_pages<float>(tiles * grid.channels);
    products_plane = off_pages<float>(tiles * filters);
    const int64_t pooled = tiles * grid.windows * grid.windows * filters;
    strip_at = 0;
    equal_at = strip_at + grid.channels / kLanes<float> * strip_block;
    patches_at = round_up(equal_at + tiles, kLine);
    products_at = patches_at + kSidePoints * patches_plane;
    pooled_at = products_at + kSidePoints * products_plane;
    codes_at = round_up(pooled_at + pooled, kLine);
    end = codes_at + pooled / static_cast<int64_t>(sizeof(float)) + kLine;
  }
};

// Elements of a window that come from equal patches, as bits.
inline constexpr int kEqual01 = 1, kEqual23 = 2, kEqual02 = 4, kEqual13 = 8, kEqualBits = 4;

// Whether two patches of kernel x kernel positions are equal, the second `shift` elements after the
// first, in all blocks of channels. Mostly the first two channels say no.
FASTNET_INLINE bool are_equal(const float* patch, int64_t shift, int64_t row, int64_t kernel,
                              int64_t channels, int64_t next_block) {
  uint64_t a, b;
  __builtin_memcpy(&a, patch, sizeof a);
  __builtin_memcpy(&b, patch + shift, sizeof b);
  bool equal = a == b;
  for (int64_t c = 0; equal && c < channels; c += kLanes<float>, patch += next_block) {
    for (int64_t r = 0; equal && r < kernel; ++r) {
      const float* const from = patch + r * row;
      equal = __builtin_memcmp(from, from + shift, static_cast<size_t>(kernel * kVectorBytes)) == 0;
    }
  }
  return equal;
}

// Those of all windows of the tile at `strip`.
template <class T>
static int equal_elements(const ConvForward<T>& call, const TilesForwardPlan<T>& plan,
                          const float* strip) {
  constexpr int64_t kStep = kLanes<float>;
  const TileGrid<T>& grid = plan.grid;
  const int64_t row = grid.width * kStep;
  int bits = 0, window = 0;
  for (int64_t y = 0; y < grid.step; y += 2) {
    for (int64_t x = 0; x < grid.step; x += 2, window += kEqualBits) {
      const float* const from = strip + y * row + x * kStep;
      const auto compare = [&](int64_t first, int64_t shift, int bit) {
        if (are_equal(from + first, shift, row, call.kernel, grid.channels, plan.strip_block)) {
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

// Aᵀ M A, bias, ReLU and maximum of one vector of filters of a tile of kRows x kColumns points,
// some of whose elements are known to be equal. kWindows is what a whole tile has in a row.
template <int kWindows, int kRows, int kColumns, class T>
__attribute__((noinline)) static void pool_tile(const float* products, int64_t plane,
                                                const float* bias, int equal, T* const* pooled,
                                                uint8_t* const* codes) {
  using V = Vec<float>;
  constexpr int kHigh = kRows == kSide ? kWindows : 1, kWide = kColumns == kSide ? kWindows : 1;
  V half[2 * kHigh][kColumns], y[2 * kWide];
  const auto outputs = [](const V(&m)[kRows], V(&y)[2 * kHigh])
                           __attribute__((always_inline)) { outputs_of_points(m, y); };
  transform_points<kRows>(products, plane, outputs, half);
#pragma GCC unroll 1
  for (int row = 0; row < kHigh; ++row) {
    V z[kWide][4], its_bias[kWide];
    FASTNET_UNROLL for (int dy = 0; dy < 2; ++dy) {
      outputs_of_points(half[2 * row + dy], y);
      FASTNET_UNROLL for (int x = 0; x < 2 * kWide; ++x) z[x / 2][2 * dy + x % 2] = y[x];
    }
    if (equal) {
      FASTNET_UNROLL for (int i = 0; i < kWide; ++i) {
        const int bits = equal >> (row * kWindows + i) * kEqualBits;
        if (bits & kEqual01) z[i][1] = z[i][0];
        if (bits & kEqual02) z[i][2] = z[i][0];
        if (bits & kEqual13) z[i][3] = z[i][1];
        if (bits & kEqual23) z[i][3] = z[i][2];
      }
    }
    T* to[kWide];
    uint8_t* code_to[kWide];
    FASTNET_UNROLL for (int i = 0; i < kWide; ++i) {
      its_bias[i] = load(bias);
      to[i] = pooled[row * kWindows + i];
      code_to[i] = codes[row * kWindows + i];
    }
    finish_windows<false, float, T, kWide>(z, its_bias, to, code_to);
  }
}

// ---------------------------------------------------------------------------------------------
// A block: rows of tiles [first, last), counted through images

// All points of its tiles and some vectors of filters.
template <class T>
static void products_of_tiles(const ConvForward<T>& call, const TilesForwardPlan<T>& plan,
                              const TilePlaces<T>& places, const float* filters, int64_t vectors,
                              float* scratch) {
  constexpr int64_t kStep = kLanes<float>;
  const int64_t next_point = call.C * kStep;
  const Product at{plan.grid.channels, 1, kStep, kSidePoints * next_point, plan.filters, call.C};
  for (int point = 0; point < kSidePoints; ++point) {
    const TileRange tiles = places.with_point(point);
    MultiplyRows(tiles.end - tiles.begin, vectors)
        .in_sets(
            at,
            scratch + plan.patches_at + point * plan.patches_plane +
                tiles.begin * plan.grid.channels,
            filters + point * next_point,
            scratch + plan.products_at + point * plan.products_plane + tiles.begin * plan.filters);
  }
}

// The pooled outputs of `vectors` vectors of filters, by window and filter, `next` from one window
// to the next.
template <int kWindows, class T>
static void pool_tiles(const ConvForward<T>& call, const TilesForwardPlan<T>& plan, int64_t first,
                       int64_t last, int64_t vectors, const float* bias, T* pooled, uint8_t* codes,
                       int64_t next, const float* scratch) {
  const int32_t* const equal = reinterpret_cast<const int32_t*>(scratch + plan.equal_at);
  const TileGrid<T>& grid = plan.grid;
  TilePlaces<T> places(grid, first, last);
  const int64_t origin = grid.first_window(call, first);
  for (int64_t row = first; row < last; ++row) {
    const int64_t row_window = grid.first_window(call, row) - origin;
    for (int64_t x = 0; x < grid.columns; ++x) {
      const int64_t tile = places.next(row, x);
      const float* const products = scratch + plan.products_at + tile * plan.filters;
      T* to[kWindows * kWindows];
      uint8_t* codes_to[kWindows * kWindows];
      for (int i = 0; i < kWindows * kWindows; ++i) {  // those of half a tile are not all taken
        const int64_t window = row_window + i / kWindows * call.Q + x * kWindows + i % kWindows;
        to[i] = pooled + window * next;
        codes_to[i] = codes_at(codes, window * next);
      }
      for_points(grid, row, x, [&](auto rows, auto columns) {
        for (int64_t v = 0; v < vectors; ++v) {
          pool_tile<kWindows, rows(), columns()>(products + v * kLanes<float>, plan.products_plane,
                                                 bias + v * kLanes<float>, equal[tile], to,
                                                 codes_to);
          for (int i = 0; i < kWindows * kWindows; ++i) {
            to[i] += kLanes<float>;
            codes_to[i] = codes_at(codes_to[i], kLanes<float>);
          }
        }
      });
    }
  }
}

// `count` filters from k_first on, out of the scratch memory into the output.
template <class T>
static void write_windows(const ConvForward<T>& call, const TilesForwardPlan<T>& plan,
                          int64_t first, int64_t last, int64_t k_first, int64_t count,
                          const T* pooled, const uint8_t* codes) {
  const int64_t image = call.P * call.Q, stop = plan.grid.first_window(call, last);
  for (int64_t window = plan.grid.first_window(call, first); window < stop;) {
    const int64_t n = window / image, in_image = least(stop - window, image - window % image);
    const int64_t to =
        n * call.output_at.n + window % image * call.output_at.x + k_first * call.output_at.c;
    if (call.output_at.x == 1) {
      transpose(pooled, plan.filters, call.output + to, image, in_image, count);
      if (codes) transpose(codes, plan.filters, call.codes + to, image, in_image, count);
    } else {  // channels_last
      for (int64_t i = 0; i < in_image; ++i) {
        const int64_t from = i * plan.filters, at = to + i * call.output_at.x;
        __builtin_memcpy(call.output + at, pooled + from, static_cast<size_t>(count) * sizeof(T));
        if (codes) __builtin_memcpy(call.codes + at, codes + from, static_cast<size_t>(count));
      }
    }
    pooled += in_image * plan.filters;
    if (codes) codes += in_image * plan.filters;
    window += in_image;
  }
}

// Filters in parts [part_first, part_last) of rows of tiles [begin, end). Returns false where the
// input has elements that this form cannot take; what was written is then worthless.
template <class T>
static bool tiles_forward(const ConvForward<T>& call, int64_t begin, int64_t end,
                          int64_t part_first, int64_t part_last, float* scratch) {
  constexpr int64_t kStep = kLanes<float>;
  const TilesForwardPlan<T> plan(call);
  T* const pooled = reinterpret_cast<T*>(scratch + plan.pooled_at);
  uint8_t* const codes = call.codes ? reinterpret_cast<uint8_t*>(scratch + plan.codes_at) : nullptr;
  for (int64_t first = begin; first < end; first += plan.rows) {
    const int64_t last = least(end, first + plan.rows);
    int32_t* const equal = reinterpret_cast<int32_t*>(scratch + plan.equal_at);
    if (!gather_tiles(call, plan.grid, first, last, scratch + plan.strip_at, plan.strip_block,
                      scratch + plan.patches_at, plan.patches_plane,
                      [&](int64_t tile, const float* strip) {
                        equal[tile] = equal_elements(call, plan, strip);
                      })) {
      return false;
    }
    const TilePlaces<T> places(plan.grid, first, last);
    for (int64_t part = part_first; part < part_last; part += kVectorsAtOnce) {
      const int64_t vectors = least(kVectorsAtOnce, part_last - part);
      const int64_t k_first = part * kStep, count = least(vectors * kStep, call.K - k_first);
      products_of_tiles(call, plan, places,
                        call.filters + (part - call.first_part) * kSidePoints * call.C * kStep,
                        vectors, scratch);
      alignas(64) float bias[kVectorsAtOnce * kStep] = {};
      for (int64_t k = 0; call.bias && k < count; ++k) bias[k] = widen(call.bias[k_first + k]);
      // Straight into the output where it has one filter beside the other, in whole vectors.
      const bool is_output = call.output_at.x == call.K && count == vectors * kStep;
      const int64_t next = is_output ? call.output_at.x : plan.filters;
      const int64_t to = plan.grid.first_window(call, first) * call.output_at.x + k_first;
      const auto pool = call.kernel == 3 ? pool_tiles<2, T> : pool_tiles<1, T>;
      pool(call, plan, first, last, vectors, bias, is_output ? call.output + to : pooled,
           is_output ? codes_at(call.codes, to) : codes, next, scratch);
      if (!is_output) write_windows(call, plan, first, last, k_first, count, pooled, codes);
    }
  }
  return true;
}
