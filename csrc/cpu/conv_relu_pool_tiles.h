// Winograd's form on patches of 6 x 6, what both directions of conv_relu_pool share of it. No
// include guard: the files of kernels are compiled once per instruction set.
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
// to the best: with 0, ±1, ±2 the error is 2 to 6 times as large.
//
// Where windows are odd in number, the last row of tiles, or the last column, has only one of them,
// and only the first 4 rows, or columns, of its patch: half a tile takes the points 0, ¾, -¾ and
// infinity alone, with the same filters. What these were divided by for the points left out is made
// up for in the patch:
//
//        | 81⁄64    0   -9⁄4   0 |
//   Bᵀ = |   0   -81⁄64 -27⁄16 0 |         Aᵀ = | 1  1  1  0 |
//        |   0    81⁄64 -27⁄16 0 |              | 0  ¾ -¾  1 |
//        |   0    -9⁄16    0   1 |
//
// Vectors have one channel, or one filter, to a lane:
//   strip     [C / lanes][rows][columns][lanes]   some rows of a padded image
//   patches   [points][tiles][C]                  V of a block of tiles
//   filters   [K / lanes][points][C][lanes]       U
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015; on points
// Barabasz, Anderson, Soodhalter and Gregg, Error Analysis and Improving the Accuracy of Winograd
// Convolution for Deep Neural Networks, 2020.

inline constexpr int kSide = 6, kSidePoints = kSide * kSide;
inline constexpr int kHalfSide = 4;
// Which point the i-th of a tile's, or half a tile's, row or column is; and whether only whole
// tiles have it.
template <int kPoints>
FASTNET_INLINE int point_of(int i) {
  return kPoints == kSide || i < kHalfSide - 1 ? i : kSide - 1;
}
FASTNET_INLINE bool is_of_whole(int i) {
  return i == 3 || i == 4;
}
// Tiles in a block, at least, where there are as many: the filters are fetched for each block.
inline constexpr int64_t kFewestTiles = 24;

// The tiles of an image.
template <class T>
struct TileGrid {
  int64_t windows, step;  // of a tile, in height and width, and from one to the next, in pixels
  int64_t rows, columns;  // of tiles in an image
  bool half_row, half_column;  // whether the last of them is one of half tiles
  int64_t width;               // of the strip
  int64_t channels;            // C, rounded up

  explicit TileGrid(const ConvCall<T>& call)
      : windows(call.kernel == 3 ? 2 : 1),
        step(2 * windows),
        rows((call.P + windows - 1) / windows),
        columns((call.Q + windows - 1) / windows),
        half_row(call.P < rows * windows),
        half_column(call.Q < columns * windows),
        width(step * (columns - 1) + kSide),
        channels(round_up(call.C, kLanes<float>)) {}
  // What a block of channels takes in the strip of some rows of tiles.
  int64_t strip_block(int64_t count) const {
    return off_pages<float>((step * (count - 1) + kSide) * width * kLanes<float>);
  }
  // Of an image.
  int64_t points() const {
    constexpr int64_t kLess = kSide - kHalfSide;
    return (rows * kSide - half_row * kLess) * (columns * kSide - half_column * kLess);
  }
  // Rows of tiles are counted through images.
  bool is_half_row(int64_t row) const { return half_row && row % rows == rows - 1; }
  bool is_half_column(int64_t column) const { return half_column && column == columns - 1; }
  // Where one begins among all windows.
  int64_t first_window(const ConvCall<T>& call, int64_t row) const {
    return (row / rows * call.P + row % rows * windows) * call.Q;
  }
};

// Some neighbouring tiles of a block.
struct TileRange {
  int64_t begin, end;
};

// Where the tiles of rows [first, last) stand in a block: those of half the height, whole ones,
// those of half the width, and of half of both, so that those which have a point are neighbours.
template <class T>
class TilePlaces {
 public:
  TilePlaces(const TileGrid<T>& grid, int64_t first, int64_t last) : grid_(grid) {
    const int64_t low = grid.half_row ? last / grid.rows - first / grid.rows : 0;
    const int64_t high = last - first - low;
    const int64_t narrow = grid.half_column, wide = grid.columns - narrow;
    const int64_t counts[kKinds] = {low * wide, high * wide, high * narrow, low * narrow};
    begin_[0] = 0;
    for (int kind = 0; kind < kKinds; ++kind) {
      next_[kind] = begin_[kind];
      begin_[kind + 1] = begin_[kind] + counts[kind];
    }
  }
  // The next tile's, of those that go row by row.
  int64_t next(int64_t row, int64_t column) {
    const bool is_low = grid_.is_half_row(row);
    return next_[grid_.is_half_column(column) ? kNarrow + is_low : is_low ? kLow : kWhole]++;
  }
  // Those that have a point.
  TileRange with_point(int point) const {
    const bool is_high = is_of_whole(point / kSide), is_wide = is_of_whole(point % kSide);
    return {begin_[is_high ? kWhole : kLow], begin_[is_wide   ? kNarrow
                                                    : is_high ? kNarrow + 1
                                                              : kKinds]};
  }

 private:
  enum { kLow, kWhole, kNarrow, kKinds = 4 };
  const TileGrid<T>& grid_;
  int64_t begin_[kKinds + 1], next_[kKinds];
};

// Calls transform(rows, columns), the points of a tile in either direction as constants.
template <class T, class Transform>
FASTNET_INLINE void for_points(const TileGrid<T>& grid, int64_t row, int64_t column,
                               const Transform& transform) {
  using Whole = std::integral_constant<int, kSide>;
  using Half = std::integral_constant<int, kHalfSide>;
  const bool is_narrow = grid.is_half_column(column);
  if (grid.is_half_row(row)) {
    is_narrow ? transform(Half{}, Half{}) : transform(Half{}, Whole{});
  } else {
    is_narrow ? transform(Whole{}, Half{}) : transform(Whole{}, Whole{});
  }
}

#include "conv_relu_pool_tiles_transforms.h"

// ---------------------------------------------------------------------------------------------
// Products

// A product's rows and vectors of columns that are summed in registers.
inline constexpr int kRowsAtOnce = 6, kVectorsAtOnce = kRegisters == 32 ? 4 : 2;
// Terms are summed in sets, and then the sets: one sum of them all would lose more digits.
inline constexpr int64_t kTermsAtOnce = 32;

// to[row][column] = Σ_i a[row][i] · b[i][column], or added to what is there: distances and count,
// `next_vector` from one vector of b's columns to the next.
struct Product {
  int64_t a_row, a_i, b_i, next_vector, to_row, count;
};
using Multiply = void (*)(const Product&, const float* a, const float* b, float* to, bool adds);

template <int kRows, int kVectors>
static void multiply(const Product& at, const float* a, const float* b, float* to, bool adds) {
  using V = Vec<float>;
  constexpr int kStep = kLanes<float>;
  const int64_t a_row = at.a_row, a_i = at.a_i, b_i = at.b_i, next_vector = at.next_vector;
  V sum[kRows][kVectors];
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] = V{};
  }
  for (int64_t i = 0; i < at.count; ++i, a += a_i, b += b_i) {
    V w[kVectors];
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) w[v] = in_register(load(b + v * next_vector));
    FASTNET_UNROLL for (int r = 0; r < kRows; ++r) {
      const V x = splat(a[r * a_row]);
      FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += x * w[v];
    }
  }
  FASTNET_UNROLL for (int r = 0; r < kRows; ++r, to += at.to_row) {
    FASTNET_UNROLL for (int v = 0; v < kVectors; ++v) {
      store(to + v * kStep, adds ? load(to + v * kStep) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int kRows = kRowsAtOnce, int kVectors = kVectorsAtOnce>
static Multiply multiply_for(int64_t rows, int64_t vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return multiply_for<kRows, kVectors - 1>(rows, vectors);
  }
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_for<kRows - 1, kVectors>(rows, vectors);
  }
  return multiply<kRows, kVectors>;
}

// The same of any number of rows, in sets of about the same size, that is of one or two sizes.
class MultiplyRows {
 public:
  MultiplyRows(int64_t rows, int64_t vectors)
      : sets_((rows + kRowsAtOnce - 1) / kRowsAtOnce),
        few_(sets_ > 0 ? rows / sets_ : 0),
        larger_sets_(sets_ > 0 ? rows % sets_ : 0),
        multiply_{multiply_for(few_, vectors), multiply_for(few_ + 1, vectors)} {}
  void operator()(const Product& at, const float* a, const float* b, float* to, bool adds) const {
    for (int64_t set = 0; set < sets_; ++set) {
      const bool is_larger = set < larger_sets_;
      multiply_[is_larger](at, a, b, to, adds);
      a += (few_ + is_larger) * at.a_row;
      to += (few_ + is_larger) * at.to_row;
    }
  }
  // The same in sets of terms.
  void in_sets(const Product& at, const float* a, const float* b, float* to) const {
    for (int64_t i = 0; i < at.count; i += kTermsAtOnce) {
      Product set = at;
      set.count = least(kTermsAtOnce, at.count - i);
      (*this)(set, a + i * at.a_i, b + i * at.b_i, to, i > 0);
    }
  }

 private:
  int64_t sets_, few_, larger_sets_;
  Multiply multiply_[2];
};

// ---------------------------------------------------------------------------------------------
// Patches

// Some elements of a strip: `count` in each of `blocks` blocks of channels.
struct StripPart {
  const float* first;
  int64_t count, blocks, next_block;
};
template <class Visit>
FASTNET_INLINE void each_vector(const StripPart& part, const Visit& visit) {
  for (int64_t block = 0; block < part.blocks; ++block) {
    const float* const from = part.first + block * part.next_block;
    for (int64_t i = 0; i < part.count; i += kLanes<float>) visit(load(from + i));
  }
}

// Whether the elements are small, or else, of those that are not 0, the most part at least a 256th
// of the largest: relative to them it is then no larger than a small one may be.
static bool are_alike(const StripPart& part) {
  using V = Vec<float>;
  Vec<int32_t> sizes = {};
  each_vector(part, [&](V value) { raise_magnitude(&sizes, value); });
  if (is_below(sizes, kLargestOfMany)) return true;
  if (!is_below(sizes, kLargestOfLarge)) return false;
  const V limit = splat(reduce_max<float>((V)sizes) / kLargestOfMany);
  Vec<int32_t> balance = {};  // of those above the limit over those below
  each_vector(part, [&](V value) {
    const V size = value < V{} ? -value : value;
    balance += ((size > V{}) & (size < limit)) - (size >= limit);
  });
  return reduce_add<int32_t>(balance) >= 0;
}

// V of rows of tiles [first, last), counted through images, by way of a strip with `next_block`
// from one block of channels to the next. `visit` is given each tile's number in the block, and its
// place in the strip. Returns false where elements are too large for this form.
template <class T, class Visit>
static bool gather_tiles(const ConvCall<T>& call, const TileGrid<T>& grid, int64_t first,
                         int64_t last, float* strip, int64_t next_block, float* patches,
                         int64_t plane, const Visit& visit) {
  constexpr int kStep = kLanes<float>;
  const int64_t line = grid.width * kStep;
  TilePlaces<T> places(grid, first, last);
  for (int64_t row = first; row < last;) {
    const int64_t n = row / grid.rows, y = row % grid.rows;
    const int64_t count = least(last - row, grid.rows - y);
    const int64_t height = grid.step * (count - 1) + kSide;
    Vec<int32_t> largest = {};
    fill_blocks(call, n, grid.step * y, height, grid.width, kStep, next_block, strip, &largest);
    // With a larger one among them, each row of tiles by itself, however many a block has.
    for (int64_t i = 0; i < count && !is_below(largest, kLargestOfMany); ++i) {
      const float* const first_of_row = strip + grid.step * i * line;
      if (!are_alike({first_of_row, kSide * line, grid.channels / kStep, next_block})) return false;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t x = 0; x < grid.columns; ++x) {
        const float* from = strip + grid.step * (i * line + x * kStep);
        const int64_t tile = places.next(row + i, x);
        visit(tile, from);
        float* const to = patches + tile * grid.channels;
        for_points(grid, row + i, x, [&](auto rows, auto columns) {
          for (int64_t c = 0; c < grid.channels; c += kStep, from += next_block) {
            transform_tile<rows(), columns()>(from, line, to + c, plane);
          }
        });
      }
    }
    row += count;
  }
  return true;
}
